"""Fine-tune an image classifier on a person's own images, in little memory.

One straight line: weights and images in; accuracy before; train; accuracy after; model and report out.
The run is exact: the same settings give the same weights, also when it was killed on the way and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from memfit.convert import convert_, state_dict
from memfit.errors import DataError, MemfitError
from memfit.fit import StepRecord, fit
from memfit.ledger.target import parse_conversion
from memfit.report_page import percent
from memfit.run import results
from memfit.run.counts import check_count
from memfit.run.identity import digest
from memfit.run.interrupts import InterruptedRun
from memfit.run.optimizers import OptimizerName, make_optimizer, make_schedule
from memfit.run.random_state import undisturbed
from memfit.run.report import JSON, versions
from memfit.run.watch import Watch
from memfit.vision import classifier
from memfit.vision.batches import Batches, cross_entropy, predict
from memfit.vision.classifier import LARGEST_SIZE, ClassifierConfig
from memfit.vision.data import ImageData, load_images
from memfit.vision.models import ZOO
from memfit.vision.page import render
from memfit.vision.report import CURVE_IMAGES, ClassAccuracy, FinetuneReport, Mistake
from memfit.vision.training import check_scores, fewest_images, train_only
from memfit.vision.weights import load_weights

# The learning rate of each optimizer when none is given.
LEARNING_RATES: dict[OptimizerName, float] = {"sgd": 3e-2, "momentum": 1e-2, "adam": 1e-3, "adamw": 1e-3}

DEFAULT_EPOCHS = 5
_CHECKPOINT_EVERY = 25
_MOST_MISTAKES = 50


@dataclass(frozen=True)
class FinetuneConfig:
    """What to learn from, and how.

    Attributes:
        data: a folder of images or an ``.npz`` file, as :func:`memfit.vision.data.load_images` reads it.
        model: a net of the zoo, or a function of one's own, as :func:`memfit.vision.classifier.build` takes it.
        weights: a file to start from, as :func:`memfit.vision.weights.load_weights` reads it; None for fresh weights.
        width: multiplies the channels of a net of the zoo.
        size: pixels of the side of the square that each image becomes.
        train: names and globs of the modules that train; all else is frozen. None for the last stage and the head of a
            net of the zoo, or, with fresh weights or a net of one's own, for everything.
        convert: conversions such as ``"LowRankGradient(rank=16)@layer4.*"``, in this order.
        optimizer: ``"sgd"``, ``"momentum"`` (0.9), ``"adam"`` or ``"adamw"``.
        lr: the highest learning rate of the schedule (a linear warm-up, then a cosine to zero), or None for the
            optimizer's own in :data:`LEARNING_RATES`.
        epochs: passes over the training images; None for :data:`DEFAULT_EPOCHS`, or for what ``steps`` says.
        steps: training steps, in place of ``epochs``.
        batch_size: images per step.
        flip: mirror each training image with a probability of one half.
        seed: decides on fresh weights, the order of the images, and the conversions' bases.

    Raises:
        MemfitError: a value that is out of range.
    """

    data: Path
    model: str = "resnet18"
    weights: Path | None = None
    width: float = 1.0
    size: int = 224
    train: tuple[str, ...] | None = None
    convert: tuple[str, ...] = ()
    optimizer: OptimizerName = "momentum"
    lr: float | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise MemfitError(f"the optimizer is one of {', '.join(get_args(OptimizerName))}, not {self.optimizer!r}.")
        for name, value in (
            ("number of epochs", self.epochs),
            ("number of steps", self.steps),
            ("batch size", self.batch_size),
            ("size", self.size),
        ):
            check_count(name, value)
        if self.size > LARGEST_SIZE:
            raise MemfitError(f"the size must be at most {LARGEST_SIZE}, not {self.size}.")
        if self.epochs is not None and self.steps is not None:
            raise MemfitError("epochs and steps are two ways to say how long to train: give one of them.")
        if not 0 < self.width <= 16:
            raise MemfitError(f"the width must be above 0 and at most 16, not {self.width}.")
        if not 0 <= self.seed < 2**63:
            raise MemfitError(f"the seed must be from 0 to 2^63 - 1, not {self.seed}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise MemfitError(f"the learning rate must be a positive number, not {self.lr}.")
        if self.train == ():
            raise MemfitError("no modules were named that train: name some, or leave the choice out.")
        for conversion in self.convert:
            parse_conversion(conversion)

    @property
    def learning_rate(self) -> float:
        """The learning rate that is used: the given one, or the optimizer's own."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def trained(self) -> tuple[str, ...]:
        """The names and globs of what trains: the given ones, or the model's own."""
        if self.train is not None:
            return self.train
        return ZOO[self.model].last_stage if self.model in ZOO and self.weights is not None else ("*",)


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        classifier: what the model's file will say of it.
        knows_classes: whether the head is for the classes of the data already.
    """

    model: nn.Module
    classifier: ClassifierConfig
    data: ImageData
    batches: Batches
    steps: int
    knows_classes: bool
    settings: dict[str, JSON]


def finetune(
    config: FinetuneConfig,
    out: str | Path,
    *,
    resume: bool = False,
    notify: Callable[[str], None] | None = None,
    progress: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> FinetuneReport:
    """Fine-tune a classifier on images and write it, with a report, into a folder.

    Args:
        config: what to learn from, and how.
        out: folder for ``model.safetensors`` (a plain classifier), ``report.json``, ``report.html`` and
            ``checkpoint.safetensors``; made when it is missing.
        resume: go on from the checkpoint in ``out`` when it has one, with the same settings. Of a finished run the
            report is returned as it is.
        notify: is told, in a sentence each, what happens next.
        progress: show the training's progress on stderr.
        on_step: is given the record of each training step.

    Returns:
        what ``report.json`` says.

    Raises:
        DataError: images, arrays or weights cannot be used.
        ConversionError: a conversion does not suit the model.
        CheckpointError: the checkpoint is damaged, foreign, or made with other settings.
        TrainingError: the loss is no longer finite.
        MemfitError: ``out`` holds another run's results, or cannot be written; the model cannot be made, or does not
            suit the images.
        InterruptedRun: Ctrl-C or SIGTERM came while training; ``resume`` goes on from the last checkpoint.
    """
    out = Path(out)
    say = notify or (lambda sentence: None)
    if not resume:
        results.refuse_earlier_results(out)
    # Random weights and what a resume restores are this run's own: the caller's random numbers go on undisturbed.
    with undisturbed():
        start = load(config, say)
        if resume and (finished := results.finished_report(out, start.settings, FinetuneReport)):
            say(f"{out} holds this run's results already")
            return finished
        return _finetune(config, out, start, resume, say, progress, on_step)


def load(config: FinetuneConfig, say: Callable[[str], None]) -> Start:
    """The model, frozen where it does not train and not yet converted, and the images."""
    say(f"reading images from {config.data}")
    data = load_images(config.data, config.size)
    try:
        classifier_config = ClassifierConfig(config.model, data.classes, config.size, config.width)
    except ValueError as error:
        raise DataError(f"{config.data}: no classifier can be made for this data: {error}.") from error
    say(data.description)
    torch.manual_seed(config.seed)
    # Channels-last: the layout in which convolutions on the CPU train faster (docs/finetune.md has the figures).
    model = classifier.build(config.model, len(data.classes), config.width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    check_scores(model, config.model, len(data.classes), config.size)
    knows_classes = False
    if config.weights is not None:
        fresh = load_weights(model, config.weights, data.classes)
        knows_classes = not fresh
        if fresh:
            say(f"the head is new, for {len(data.classes)} other classes than that of {config.weights}")
    train_only(model, config.trained)
    fewest = fewest_images(model, config.size)
    if config.batch_size < fewest:
        raise MemfitError(
            f"images of size {config.size} end as one value per channel, and a batch norm that trains needs more: give "
            f"a batch size of {fewest} or more, or larger images."
        )
    batches = Batches(data.train, config.batch_size, flip=config.flip, fewest=fewest)
    steps = config.steps or (config.epochs or DEFAULT_EPOCHS) * len(batches)
    return Start(model, classifier_config, data, batches, steps, knows_classes, _settings(config, model, data, steps))


def _finetune(
    config: FinetuneConfig,
    out: Path,
    start: Start,
    resume: bool,
    say: Callable[[str], None],
    progress: bool,
    on_step: Callable[[StepRecord], None] | None,
) -> FinetuneReport:
    model, test = start.model, start.data.test
    for conversion in map(parse_conversion, config.convert):
        convert_(model, conversion.technique, conversion.where)
    results.prepare(out)
    before = predict(model, test) if start.knows_classes else None
    if before is not None:
        say(f"accuracy before: {percent(_accuracy(before, test.labels))}")

    # The curve takes a few looks at the held-out images: at no more of them than a short while is enough for.
    looked_at = torch.linspace(0, len(test) - 1, min(len(test), CURVE_IMAGES)).round().long()

    def measure() -> float:
        return _accuracy(predict(model, test, looked_at.tolist()), test.labels[looked_at])

    watch = Watch(out / results.WATCH, start.steps, measure, start.settings, resume)

    def after_step(record: StepRecord) -> None:
        watch.after(record.step)
        if on_step:
            on_step(record)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate)
    torch.manual_seed(config.seed)
    with watch:
        result = fit(
            model,
            cross_entropy,
            start.batches,
            optimizer,
            steps=start.steps,
            scheduler=make_schedule(optimizer, start.steps),
            checkpoint=out / results.CHECKPOINT,
            every=_CHECKPOINT_EVERY,
            resume=resume,
            settings=start.settings,
            progress=progress,
            on_step=after_step,
        )
    if result.signal is not None:
        raise InterruptedRun(result.signal, len(result.records), start.steps, out / results.CHECKPOINT)

    after = predict(model, test)
    accuracy_before = None if before is None else _accuracy(before, test.labels)
    accuracy_after = _accuracy(after, test.labels)
    say(f"accuracy after: {percent(accuracy_after)}")
    ends = [
        [] if found is None else [(step, _accuracy(found[looked_at], test.labels[looked_at]))]
        for step, found in ((0, before), (start.steps, after))
    ]
    assert result.peak is not None, "fit was asked to measure"
    report = FinetuneReport(
        model=config.model,
        config={**_origin(config), **start.settings},
        seed=config.seed,
        steps=start.steps,
        data=start.data.description,
        accuracy_before=accuracy_before,
        accuracy_after=accuracy_after,
        accuracy_curve=(*ends[0], *watch.curve(), *ends[1]),
        losses=tuple(record.loss for record in result.records),
        # The ledger slows down the steps that it watches: of a very short run there may be no others.
        seconds_per_step=result.seconds_per_step or result.records[-1].seconds,
        peak_bytes=result.peak.to_dict(),
        process_peak_bytes=watch.process_bytes,
        per_class=_per_class(start.data, before, after),
        mistakes=_mistakes(start.data, before, after),
        versions=versions(),
    )
    classifier.save(state_dict(model), start.classifier, out / results.MODEL)
    results.write_text(out / results.PAGE, render(report))
    # The last file to come is the sign of a finished run.
    results.write_text(out / results.REPORT, report.to_json())
    (out / results.WATCH).unlink(missing_ok=True)
    return report


def _accuracy(found: Tensor, labels: Tensor) -> float:
    return float((found == labels).double().mean())


def _per_class(data: ImageData, before: Tensor | None, after: Tensor) -> tuple[ClassAccuracy, ...]:
    def right(found: Tensor, label: int) -> int:
        return int(((found == label) & (data.test.labels == label)).sum())

    return tuple(
        ClassAccuracy(
            name,
            int((data.test.labels == label).sum()),
            None if before is None else right(before, label),
            right(after, label),
        )
        for label, name in enumerate(data.classes)
    )


def _mistakes(data: ImageData, before: Tensor | None, after: Tensor) -> tuple[Mistake, ...]:
    wrong: Sequence[int] = (after != data.test.labels).nonzero().flatten().tolist()
    return tuple(
        Mistake(
            data.test.names[index],
            data.classes[int(data.test.labels[index])],
            None if before is None else data.classes[int(before[index])],
            data.classes[int(after[index])],
        )
        for index in wrong[:_MOST_MISTAKES]
    )


def _settings(config: FinetuneConfig, model: nn.Module, data: ImageData, steps: int) -> dict[str, JSON]:
    """All that the trained weights depend on. Paths may move; what they led to is told by its hash."""
    state = sorted(model.state_dict().items())
    return {
        **({"model": config.model, "width": config.width} if config.model in ZOO else {}),
        "size": config.size,
        "train": list(config.trained),
        "convert": list(config.convert),
        "optimizer": config.optimizer,
        "lr": config.learning_rate,
        "steps": steps,
        "batch_size": config.batch_size,
        "flip": config.flip,
        "seed": config.seed,
        "weights_sha256": digest(part for name, tensor in state for part in (name, tensor)),
        "data_sha256": data.sha256,
    }


def _origin(config: FinetuneConfig) -> dict[str, JSON]:
    """Where everything came from; a resumed run may find it elsewhere."""
    return {
        "data": str(config.data),
        "model": config.model,
        "weights": None if config.weights is None else str(config.weights),
    }
