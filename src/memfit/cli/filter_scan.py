"""``memfit filter-scan``: which convolutions are worth a gradient filter?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast, get_args

import torch
import typer

from memfit.activations.gradient_filter import GradientFilter
from memfit.activations.plan import Taps
from memfit.cli.console import say, show, show_table
from memfit.cli.outputs import check_outputs, write_output
from memfit.errors import MemfitError
from memfit.ledger.picture import check_can_draw
from memfit.ledger.report import format_bytes
from memfit.ledger.target import Task, load_target, users_code
from memfit.vision.batches import cross_entropy
from memfit.vision.filter_scan import PATCHES
from memfit.vision.filter_scan import filter_scan as scan_task
from memfit.vision.finetune import FinetuneConfig, load
from memfit.vision.models import ZOO
from memfit.vision.scan_figures import LEAST_COSINE, FilterScan
from memfit.vision.scan_page import render
from memfit.vision.scan_picture import draw_png
from memfit.vision.scan_words import agreement_in_words, keepers_in_words, spared_in_words, times, together_rows

_TAPS = "|".join(get_args(Taps))
_WITHOUT_MEMORY = "a smaller batch needs less, or fewer layers: --where"
_OF_DATA = ("model", "weights", "width", "size", "train", "batch_size", "seed")


def filter_scan(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            help="A function that returns (model, batch, loss): package.module:function or file.py:function. "
            "loss(model, batch) returns a scalar tensor. Leave it out to scan a classifier of --model on --data.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Images, as memfit finetune takes them: a folder or an .npz file.", metavar="PATH"),
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"With --data: {', '.join(ZOO)}, or a function of one's own.", metavar="NAME")
    ] = "resnet18",
    weights: Annotated[
        Path | None, typer.Option(help="With --data: the weights that the training starts from.", metavar="FILE")
    ] = None,
    width: Annotated[float, typer.Option(help="With --data: multiplies the channels of the model.")] = 1.0,
    size: Annotated[int, typer.Option(help="With --data: pixels of the square that each image becomes.")] = 224,
    train: Annotated[
        list[str] | None,
        typer.Option(help="With --data: modules that train, as memfit finetune takes them.", metavar="GLOB"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --data: images in the batch.")] = 16,
    seed: Annotated[int, typer.Option(help="With --data: which images.")] = 0,
    patch: Annotated[
        list[int] | None,
        typer.Option(help=f"A size of patches to try; may be repeated. {', '.join(map(str, PATCHES))} when left out."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to look at, by name or glob; may be repeated. All that train when left out.", metavar="GLOB"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each way is timed, in turn with the others.")] = 5,
    cosine: Annotated[
        float, typer.Option(help="From this cosine to the exact gradient on, a layer is worth filtering.")
    ] = LEAST_COSINE,
    taps: Annotated[
        str,
        typer.Option(help="How the scanned filters take the taps of kernels, as GradientFilter(taps=).", metavar=_TAPS),
    ] = "summed",
    native: Annotated[bool, typer.Option("--native", help="Scan filters with native=True, the C++ operator.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to this file: all that is printed, and a picture.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file (needs matplotlib).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Show which convolutions are worth a gradient filter: their time, memory and gradients, exact and filtered."""
    if (target is None) == (data is None):
        raise MemfitError("give either a target, such as file.py:function, or images by --data.")
    if target is not None and (unused := [name for name in _OF_DATA if _was_given(context, name)]):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise MemfitError(f"{options}: such options go with --data; what {target} returns has its own: leave them out.")
    counted = cast(Taps, taps)  # the technique itself refuses other words
    if png is not None:
        check_can_draw()
    check_outputs({"page": html, "picture": png, "scan": json_file}, target)
    what = target or f"{model} on {data}"
    config = None
    if data is not None:
        config = FinetuneConfig(
            data=data,
            model=model,
            weights=weights,
            width=width,
            size=size,
            train=tuple(train) if train else None,
            batch_size=batch_size,
            flip=False,
            seed=seed,
        )
    with users_code(what, _WITHOUT_MEMORY):
        task = load_target(str(target))() if config is None else _classifier(config)
        layers = "*" if not where else where[0] if len(where) == 1 else where
        scan = scan_task(
            *task,
            patch or PATCHES,
            layers,
            rounds,
            least_cosine=cosine,
            taps=counted,
            native=native,
            notify=say,
        )

    outputs = (
        (html, "page", lambda: render(scan, what).encode()),
        (png, "picture", lambda: draw_png(scan, what)),
        (json_file, "scan", lambda: json.dumps({"target": what, **scan.to_dict()}).encode() + b"\n"),
    )
    failures = [failure for file, kind, make in outputs if file and (failure := write_output(file, kind, make()))]
    show_scan(scan, lambda patch: GradientFilter(patch, counted, native))
    if failures:  # a full disk does not take away what was found
        raise failures[0]


def show_scan(scan: FilterScan, technique: Callable[[int], GradientFilter]) -> None:
    """Print the layers, what a filter does to each, and whole steps; ``technique`` as it was scanned, for a patch."""
    show_table(
        ["layer", "", "exact backward", "keeps", "input kept by others"],
        [
            [_named(layer.name), layer.shape, f"{layer.ms:.2f} ms", format_bytes(layer.nbytes), keepers_in_words(layer)]
            for layer in scan.layers
        ],
    )
    show("")
    show_table(
        ["layer", "patch", "backward", "faster", "keeps", "spared", "weight", "input"],
        [
            [
                _named(layer.name),
                str(each.patch),
                f"{each.ms:.2f} ms",
                times(layer.speedup(each)),
                format_bytes(each.nbytes),
                spared_in_words(each.spared),
                agreement_in_words(each.weight),
                agreement_in_words(each.input),
            ]
            for layer in scan.layers
            for each in layer.filtered
        ],
    )
    show("")
    show_table(*together_rows(scan))
    show("")
    show(
        "weight, input, gradient: cosine of the filtered gradient to the exact one and, in brackets, its length in "
        "lengths of the exact one; spared: bytes, with that layer alone filtered."
    )
    show("")
    for sentence in scan.advice:
        show(sentence)
    for sentence in _options(scan, technique):
        show(sentence)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _classifier(config: FinetuneConfig) -> Task:
    """The classifier as the fine-tuning of it would begin, and a batch of its images."""
    start = load(config, say)
    torch.manual_seed(config.seed)
    return Task(start.model, next(iter(start.batches)), cross_entropy)


def _options(scan: FilterScan, technique: Callable[[int], GradientFilter]) -> list[str]:
    """The advice as options of the commands that train."""
    chosen = [f"{technique(patch)}@{name}" for patch, names in scan.chosen.items() for name in names if name]
    options = [f'--convert "{each}"' if "'" in each else f"--convert '{each}'" for each in chosen]
    return [f"As options: {' '.join(options)}"] if options else []


def _named(name: str) -> str:
    return name or "(the model itself)"
