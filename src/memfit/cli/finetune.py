"""``memfit finetune``: fine-tune an image classifier on one's own images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, cast

import typer

from memfit.cli import console
from memfit.cli.console import say
from memfit.cli.runs import AsJson, Resume, show_cost, stoppable
from memfit.ledger.target import users_code
from memfit.report_page import count, percent
from memfit.run.optimizers import OptimizerName
from memfit.run.results import MODEL, PAGE
from memfit.vision.finetune import DEFAULT_EPOCHS, FinetuneConfig
from memfit.vision.finetune import finetune as run
from memfit.vision.models import ZOO
from memfit.vision.page import before_in_words, change_in_words
from memfit.vision.report import FinetuneReport


def finetune(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with a subfolder of images for each class, or an .npz file with x_train, y_train, x_test, "
            "y_test.",
            metavar="PATH",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(ZOO)}, or a function that is given the number of classes and returns a module: "
            "package.module:function or file.py:function.",
            metavar="NAME",
        ),
    ] = "resnet18",
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights to start from: .safetensors, or torchvision's .pth; fresh ones when left out.", metavar="FILE"
        ),
    ] = None,
    width: Annotated[float, typer.Option(help="Multiplies the channels of the model.")] = 1.0,
    size: Annotated[int, typer.Option(help="Pixels of the square that each image becomes.")] = 224,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="Modules that train, by name or glob; may be repeated. When left out, the last stage and the head, "
            "and all of a model with fresh weights or of one's own.",
            metavar="GLOB",
        ),
    ] = None,
    convert: Annotated[
        list[str] | None,
        typer.Option(help="A technique and its layers: LowRankGradient(rank=16)@layer4.*  May be repeated."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="How to train.", metavar="sgd|momentum|adam|adamw")] = "momentum",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the optimizer's own when left out.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the training images; {DEFAULT_EPOCHS} when left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 16,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the training images.")] = True,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the model and the report; must not hold an earlier run.", metavar="DIR")
    ] = Path("finetuned"),
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune an image classifier on your own images."""
    config = FinetuneConfig(
        data=data,
        model=model,
        weights=weights,
        width=width,
        size=size,
        train=tuple(train) if train else None,
        convert=tuple(convert or ()),
        # The configuration itself refuses other words, with a sentence.
        optimizer=cast(OptimizerName, optimizer),
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        flip=flip,
        seed=seed,
    )
    with users_code(model, "a smaller batch needs less, or a smaller --size"):
        report = stoppable(lambda: run(config, out, resume=resume, notify=say, progress=True), out)
    if as_json:
        print(report.to_json(), end="")
        return
    show(report)
    network = [] if report.model in ZOO else ["--network", report.model]
    command = shlex.join(["memfit", "classify", "--model", str(out / MODEL), *network])
    console.show(f"\nthe report: {out / PAGE}")
    console.show(f"to use it:  {command} IMAGE...")


def show(report: FinetuneReport) -> None:
    """Print the outcome: the accuracies, and the five lines of memory."""
    print(
        f"\naccuracy: {before_in_words(report)} before, {percent(report.accuracy_after)} after {report.steps} steps "
        f"({change_in_words(report)}, {count(report.held_out, 'held-out image')})"
    )
    if report.accuracy_before is not None and report.accuracy_after < report.accuracy_before:
        print("It has become worse: try a smaller --lr, or more images.")
    show_cost(report)
