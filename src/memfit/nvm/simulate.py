"""The whole simulation: a network learns offline, goes into memory cells, and learns online, by world and scheme."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import ConversionError, MemfitError
from memfit.files import check_writable
from memfit.ledger.target import load_function, load_model
from memfit.nvm.data import Images, load_images
from memfit.nvm.figure import check_can_draw, draw
from memfit.nvm.model import LIMIT
from memfit.nvm.online import learn_online
from memfit.nvm.page import render
from memfit.nvm.pretrain import STEPS, pretrain
from memfit.nvm.run_report import NvmReport, SchemeResult, result_of
from memfit.nvm.schemes import PERIOD, RATES, SCHEMES, Learner, Rates, Scheme
from memfit.nvm.streams import Stream, UserStream
from memfit.nvm.worlds import SHIFT_EVERY, WORLDS, ImageStream, World
from memfit.run import results
from memfit.run.counts import check_count
from memfit.run.identity import digest
from memfit.run.interrupts import InterruptedRun
from memfit.run.progress import Meter
from memfit.run.random_state import undisturbed
from memfit.run.report import JSON, versions
from memfit.weights.technology import technology

ONLINE = "online"
FIGURE = "figure.svg"


@dataclass(frozen=True)
class NvmConfig:
    """What to simulate.

    Attributes:
        data: MNIST, as :func:`memfit.nvm.data.load_images` reads it; None for scikit-learn's small digits.
        worlds: some of :data:`~memfit.nvm.worlds.WORLDS`.
        schemes: some of :data:`~memfit.nvm.schemes.SCHEMES`.
        samples: that each device sees.
        seed: of the offline training, the stream, the drift and the schemes' own random numbers.
        lr: learning rate of the weights; None for each scheme's own in :data:`~memfit.nvm.schemes.RATES`.
        bias_lr: the same of all other parameters.
        period: samples between the writes of the low-rank schemes.
        memory: a preset of :data:`~memfit.weights.technology.TECHNOLOGIES`.
        samples_per_second: that lifetimes are projected for.
        model: ``package.module:function`` or ``file.py:function`` that returns a trained ``nn.Module``, which takes one
            sample with a batch axis to logits; None for the method's network, trained offline here.
        stream: the same for a function that returns an iterable of (input, label), the same at every call.
        shift_every: samples between two shifts of the distribution, in the world that has them.
        pretraining_steps: of the offline training.

    Raises:
        MemfitError: a value that is out of range, or choices that do not go together.
    """

    data: Path | None = None
    worlds: tuple[World, ...] = WORLDS
    schemes: tuple[Scheme, ...] = SCHEMES
    samples: int = 10_000
    seed: int = 0
    lr: float | None = None
    bias_lr: float | None = None
    period: int = PERIOD
    memory: str = "rram"
    samples_per_second: float = 1.0
    model: str | None = None
    stream: str | None = None
    shift_every: int = SHIFT_EVERY
    pretraining_steps: int = STEPS

    def __post_init__(self) -> None:
        for what, given, known in (("world", self.worlds, WORLDS), ("scheme", self.schemes, SCHEMES)):
            unknown = [each for each in given if each not in known]
            if unknown or not given:
                raise MemfitError(f"a {what} is one of {', '.join(known)}, not {', '.join(unknown) or 'none'}.")
        for what, value in (
            ("number of samples", self.samples),
            ("period", self.period),
            ("number of steps", self.pretraining_steps),
        ):
            check_count(what, value)
        if self.shift_every < 100 or self.shift_every % 100:
            raise MemfitError(f"shifts come every 100, 200, 300 ... samples, not every {self.shift_every}.")
        if not 0 <= self.seed < 2**63:
            raise MemfitError(f"the seed must be from 0 to 2^63 - 1, not {self.seed}.")
        if not 0 < self.samples_per_second < math.inf:
            raise MemfitError(f"the rate must be a positive number of samples a second, not {self.samples_per_second}.")
        if self.stream is not None and self.data is not None:
            raise MemfitError("data and a stream of one's own are two sources of samples: give one of them.")
        if self.stream is not None and self.model is None:
            raise MemfitError("a stream of one's own needs a model of one's own that is trained for it: give --model.")
        if self.stream is not None and "shift" in self.worlds:
            raise MemfitError(
                "the world 'shift' is made of images; a stream of one's own brings its own: leave it out."
            )
        technology(self.memory)
        for scheme in self.schemes:
            self.rates(scheme)

    def rates(self, scheme: Scheme) -> Rates:
        """The learning rates that a scheme is given."""
        own = RATES[scheme]
        return Rates(own.weights if self.lr is None else self.lr, own.biases if self.bias_lr is None else self.bias_lr)


def simulate(
    config: NvmConfig,
    out: str | Path,
    *,
    resume: bool = False,
    notify: Callable[[str], None] | None = None,
    progress: bool = False,
) -> NvmReport:
    """Run every scheme in every world, one after the other, and write a report into a folder.

    Args:
        config: what to simulate.
        out: folder for ``report.json``, ``report.html``, ``figure.svg``, ``checkpoint.safetensors`` (the offline
            training) and ``online/WORLD-SCHEME.safetensors`` (each device, as it is after the last sample).
        resume: go on from what is in ``out``; what is finished is not run again. The same command with more samples
            goes on from the earlier end.
        notify: is told, in a sentence each, what happens next.
        progress: show on stderr how far each run is.

    Returns:
        what ``report.json`` says.

    Raises:
        DataError: the data or the stream cannot be used.
        CheckpointError: a checkpoint is damaged, or made with other settings.
        TrainingError: a weight would become no number.
        MissingExtraError: matplotlib is not installed, or without data scikit-learn.
        MemfitError: ``out`` holds another run's results or cannot be written; a model of the user's does not fit.
        InterruptedRun: Ctrl-C or SIGTERM came; ``resume`` goes on.
    """
    out = Path(out)
    say = notify or (lambda sentence: None)
    check_can_draw()
    if not resume:
        results.refuse_earlier_results(out)
        if os.path.isdir(out / ONLINE) and os.listdir(out / ONLINE):
            raise MemfitError(
                f"{out} holds an earlier run's {ONLINE}: give another --out, or --resume to go on with that run."
            )
    images = load_images(config.data) if config.stream is None else None
    with _one_thread(), undisturbed():
        own = None if config.model is None else load_model(config.model)
        streams, settings = _streams(config, images), _settings(config, images)
        if own is not None:
            settings["first_samples_sha256"] = _check_model(config, own, streams[config.worlds[0]])
        for folder in (out, out / ONLINE):
            results.prepare(folder)
        check_writable(out / FIGURE, "result", MemfitError)
        model = _trained_offline(config, out, images, resume, say, progress) if own is None else own
        settings["model_sha256"] = digest(tensor for _, tensor in sorted(model.state_dict().items()))
        found = []
        for world in config.worlds:
            for scheme in config.schemes:
                found.append(_run(config, out, model, streams[world], world, scheme, settings, resume, progress))
                say(_in_words(found[-1]))
    report = NvmReport(
        config={**_origin(config), **settings},
        data=_describe(config, images),
        samples_per_second=config.samples_per_second,
        technology=technology(config.memory),
        results=tuple(found),
        versions=versions(),
    )
    picture = draw(report.results)
    results.write_text(out / FIGURE, picture)
    results.write_text(out / results.PAGE, render(report, picture))
    results.write_text(out / results.REPORT, report.to_json())
    return report


def _settings(config: NvmConfig, images: Images | None) -> dict[str, JSON]:
    """What identifies the runs of all devices, without the model."""
    settings: dict[str, JSON] = {
        "seed": config.seed,
        "period": config.period,
        "shift_every": config.shift_every,
    }
    if images is not None:
        settings["data_sha256"] = digest([images.online, images.online_labels])
    return settings


def _trained_offline(
    config: NvmConfig, out: Path, images: Images | None, resume: bool, say: Callable[[str], None], progress: bool
) -> nn.Module:
    """The method's network as it leaves the factory."""
    assert images is not None, "a stream of one's own needs a model of one's own"
    say(f"offline: {images.description}")
    checkpoint = out / results.CHECKPOINT
    model, result = pretrain(
        images,
        seed=config.seed,
        steps=config.pretraining_steps,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    if result.signal is not None:
        raise InterruptedRun(result.signal, len(result.records), config.pretraining_steps, checkpoint)
    say("online: each image is predicted first, then learned from")
    return model


def _run(
    config: NvmConfig,
    out: Path,
    model: nn.Module,
    stream: Stream,
    world: World,
    scheme: Scheme,
    settings: dict[str, JSON],
    resume: bool,
    progress: bool,
) -> SchemeResult:
    rates, learner = config.rates(scheme), _learner(config, model, scheme)
    title = f"{world}, {scheme}"
    with Meter(title, config.samples, progress) as meter:
        record = learn_online(
            learner,
            stream,
            world=world,
            seed=config.seed,
            samples=config.samples,
            checkpoint=out / ONLINE / f"{world}-{scheme}.safetensors",
            resume=resume,
            settings={**settings, "world": world, "scheme": scheme, "lr": rates.weights, "bias_lr": rates.biases},
            on_chunk=lambda done, accuracy, worst: meter.show(
                done, f"{accuracy:.1%} of the last 1,000 right, worst cell {worst:,} writes"
            ),
        )
    return result_of(learner, record, world=world, seed=config.seed, rates=rates, technology=technology(config.memory))


def _learner(config: NvmConfig, model: nn.Module, scheme: Scheme) -> Learner:
    """A device that leaves the factory."""
    # A model of the user's has weights of any size; the method's network has them in [-1, 1).
    limit = LIMIT if config.model is None else None
    return Learner(
        copy.deepcopy(model), scheme, config.rates(scheme), limit=limit, seed=config.seed, period=config.period
    )


def _check_model(config: NvmConfig, model: nn.Module, stream: Stream) -> str:
    """Find out before the run whether every scheme takes the model, and the model the stream's samples.

    Returns:
        a digest of the first samples.
    """
    target = config.model
    try:
        copied = copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as problem:
        first = str(problem).partition("\n")[0]
        raise MemfitError(
            f"every device gets a copy of the model of {target}, which can't be copied: {first}"
        ) from problem
    inputs, labels = stream.chunk(0)
    if len(labels):  # that a stream is too short is said where it ends
        _check_sample(target, copied, stream, inputs, labels)
    for scheme in config.schemes:
        try:
            _learner(config, model, scheme)
        except ConversionError as problem:
            raise MemfitError(f"the scheme {scheme!r} can't take the model of {target}: {problem}") from problem
    return digest([inputs, labels])


@torch.no_grad()
def _check_sample(target: str | None, model: nn.Module, stream: Stream, inputs: Tensor, labels: Tensor) -> None:
    shape = tuple(inputs[:1].shape)
    try:
        logits = model(inputs[:1])
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise MemfitError(f"the model of {target} can't take a sample of shape {shape}: {first}") from problem
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        raise MemfitError(
            f"the model of {target} must take a sample of shape {shape} to logits (1, classes), not to "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
        )
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        raise MemfitError(
            f"the model of {target} has {classes} classes, and the samples' labels are from {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    if isinstance(stream, UserStream):
        stream.expect(shape[1:], classes)


def _streams(config: NvmConfig, images: Images | None) -> dict[World, Stream]:
    """What the device meets in each world."""
    if config.stream is not None:
        return dict.fromkeys(config.worlds, UserStream(load_function(config.stream), config.stream))
    assert images is not None
    return {world: ImageStream(images, world, config.seed, config.shift_every) for world in config.worlds}


def _describe(config: NvmConfig, images: Images | None) -> str:
    return f"Samples of {config.stream}." if images is None else images.description


def _origin(config: NvmConfig) -> dict[str, JSON]:
    return {
        "data": None if config.data is None else str(config.data),
        "model": config.model,
        "stream": config.stream,
        "samples": config.samples,
        "pretraining_steps": config.pretraining_steps if config.model is None else None,
        "memory": config.memory,
    }


def _in_words(result: SchemeResult) -> str:
    return (
        f"{result.world}, {result.scheme}: {result.accuracy:.1%} right, {result.final_accuracy:.1%} at the end; "
        f"worst cell {result.cells.worst_cell:,} writes"
    )


@contextmanager
def _one_thread() -> Iterator[Any]:
    """One sample is too little to share, and the same number of threads gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
