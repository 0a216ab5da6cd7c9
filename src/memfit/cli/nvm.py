"""``memfit nvm``: learn online on a device whose weights are in non-volatile memory, simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from memfit.cli import console
from memfit.cli.console import say, show_table
from memfit.cli.runs import AsJson, Resume, stoppable
from memfit.ledger.target import users_code
from memfit.nvm.page import joules, lifetime
from memfit.nvm.run_report import NvmReport
from memfit.nvm.schemes import SCHEMES, TITLES, Scheme
from memfit.nvm.simulate import FIGURE, NvmConfig, simulate
from memfit.nvm.worlds import WORLDS, World
from memfit.report_page import percent
from memfit.run.results import PAGE
from memfit.weights.technology import TECHNOLOGIES


def nvm(
    data: Annotated[
        Path | None,
        typer.Option(
            help="MNIST: an .npz file with x_train and y_train, or a folder of IDX files; when left out, the digits "
            "of 8 x 8 pixels that come with scikit-learn, which are not MNIST.",
            metavar="PATH",
        ),
    ] = None,
    world: Annotated[
        list[str] | None,
        typer.Option(help="What the device meets; may be repeated, all four when left out.", metavar="|".join(WORLDS)),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="How it learns; may be repeated, all five when left out.", metavar="|".join(SCHEMES)),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples that each device sees, one at a time.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same devices in the same worlds.")] = 0,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the weights; each scheme's own otherwise.")] = None,
    bias_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the biases; each scheme's own otherwise.")
    ] = None,
    period: Annotated[
        int | None,
        typer.Option(help="Samples between the writes of the low-rank schemes; each scheme's own otherwise."),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="What the memory is made of, for energy and lifetime.", metavar="|".join(TECHNOLOGIES))
    ] = "rram",
    rate: Annotated[float, typer.Option(help="Samples a second, for the lifetime.")] = 1.0,
    model: Annotated[
        str | None,
        typer.Option(
            help="A trained model of your own: a function that returns it, package.module:function or "
            "file.py:function; the method's network, trained here, when left out.",
            metavar="FUNCTION",
        ),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(
            help="Samples of your own, for your model: a function that returns an iterable of (input, label).",
            metavar="FUNCTION",
        ),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Let a C++ operator do the sums of the low-rank schemes: faster.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Devices at once, in a process of one thread each.")] = 1,
    out: Annotated[
        Path, typer.Option(help="Folder for the report and the figure; must not hold an earlier run.", metavar="DIR")
    ] = Path("nvm"),
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Simulate online learning in non-volatile memory: accuracy, writes, energy and lifetime."""
    worlds = world or [each for each in WORLDS if stream is None or each != "shift"]
    config = NvmConfig(
        data=data,
        # The configuration itself refuses other words, with a sentence.
        worlds=cast("tuple[World, ...]", tuple(dict.fromkeys(worlds))),
        schemes=cast("tuple[Scheme, ...]", tuple(dict.fromkeys(scheme or SCHEMES))),
        samples=samples,
        seed=seed,
        lr=lr,
        bias_lr=bias_lr,
        period=period,
        memory=memory,
        samples_per_second=rate,
        model=model,
        stream=stream,
        native=native,
    )
    with users_code(config.own, "fewer samples at once need less"):
        report = stoppable(lambda: simulate(config, out, resume=resume, jobs=jobs, notify=say, progress=True), out)
    if as_json:
        print(report.to_json(), end="")
    else:
        show(report)
        console.show(f"\nthe figure: {out / FIGURE}")
        console.show(f"the report: {out / PAGE}")


def show(report: NvmReport) -> None:
    """Print the outcome: one line for each world and scheme."""
    print(f"\n{report.data}\n{report.technology.title}, {report.samples_per_second:g} samples a second\n")
    show_table(
        ["world", "scheme", "accuracy", "at the end", "worst cell", "writes", "write energy", "lifetime"],
        [
            [
                result.world,
                TITLES[result.scheme],
                percent(result.accuracy),
                percent(result.final_accuracy),
                f"{result.cells.worst_cell:,}",
                f"{result.cells.writes:,}",
                joules(result.cells.write_joules),
                lifetime(result.lifetime_years(report.samples_per_second)),
            ]
            for result in report.results
        ],
    )
