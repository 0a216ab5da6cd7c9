"""The main job: adapt a recognizer to one voice, from a few of its recordings, in little memory.

One straight line: base and recordings in; word error rate before; train; word error rate after; model and report out.
The run is exact: the same settings give the same weights, also when it was killed on the way and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from memfit.convert import convert_, state_dict
from memfit.errors import MemfitError
from memfit.fit import FitResult, StepRecord, fit
from memfit.gradients.low_rank import LowRankGradient
from memfit.report_page import percent
from memfit.run import optimizers, results
from memfit.run.counts import check_count
from memfit.run.identity import digest
from memfit.run.interrupts import InterruptedRun
from memfit.run.random_state import undisturbed
from memfit.run.report import JSON, versions
from memfit.run.watch import Watch
from memfit.speech import model as recognizer_file
from memfit.speech.batches import Batches, ctc_loss
from memfit.speech.data import Recordings, load_recordings
from memfit.speech.metrics import transcribe, word_error_rate
from memfit.speech.model import Recognizer
from memfit.speech.page import render
from memfit.speech.report import Heard, PersonalizeReport

Method = Literal["low-rank", "sgd", "momentum", "adam"]

# The learning rate of each method when none is given.
LEARNING_RATES: dict[Method, float] = {"low-rank": 1e-3, "sgd": 3e-2, "momentum": 1e-2, "adam": 1e-3}

MAX_GRAD_NORM = 5.0
_CHECKPOINT_EVERY = 10
_SHARED_FROM_WIDTH = 512


@dataclass(frozen=True)
class PersonalizeConfig:
    """What to learn from, and how.

    Attributes:
        recordings: a folder of recordings, as :func:`memfit.speech.data.load_recordings` reads it.
        speaker: whose recordings, where the folder has several speakers.
        base: the recognizer to start from, or None for the one that is shipped with memfit.
        method: ``"low-rank"`` trains with low-rank gradients and Adam; ``"sgd"``, ``"momentum"`` (0.9) and ``"adam"``
            train the plain, dense model. Biases train densely in every method.
        rank: of the low-rank gradients; the dense methods have no use for it.
        sides: ``"both"`` or ``"left"``, of the low-rank gradients.
        lr: the highest learning rate of the schedule (a linear warm-up, then a cosine to zero, the same for all
            methods), or None for the method's own in :data:`LEARNING_RATES`.
        steps: training steps.
        batch_size: utterances per step.
        utterances: how many utterances to train on; None for 20 built from spoken digits, and all rows of a table.
        seed: decides which utterances are used, their order, and the low-rank bases.

    Raises:
        MemfitError: a value that is out of range.
    """

    recordings: Path
    speaker: str | None = None
    base: Path | None = None
    method: Method = "low-rank"
    rank: int = 16
    sides: Literal["both", "left"] = "both"
    lr: float | None = None
    steps: int = 60
    batch_size: int = 5
    utterances: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise MemfitError(f"the method is one of {', '.join(get_args(Method))}, not {self.method!r}.")
        if self.sides not in ("both", "left"):
            raise MemfitError(f"the sides are both or left, not {self.sides!r}.")
        for name, value in (
            ("rank", self.rank),
            ("number of steps", self.steps),
            ("batch size", self.batch_size),
            ("number of training utterances", self.utterances),
        ):
            check_count(name, value)
        if not 0 <= self.seed < 2**63:
            raise MemfitError(f"the seed must be from 0 to 2^63 - 1, not {self.seed}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise MemfitError(f"the learning rate must be a positive number, not {self.lr}.")

    @property
    def learning_rate(self) -> float:
        """The learning rate that is used: the given one, or the method's own."""
        return LEARNING_RATES[self.method] if self.lr is None else self.lr


def personalize(
    config: PersonalizeConfig,
    out: str | Path,
    *,
    resume: bool = False,
    notify: Callable[[str], None] | None = None,
    progress: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> PersonalizeReport:
    """Adapt a recognizer to the recordings and write it, with a report, into a folder.

    Args:
        config: what to learn from, and how.
        out: folder for ``model.safetensors`` (a plain recognizer with the base's keys), ``report.json``,
            ``report.html`` and ``checkpoint.safetensors``; made when it is missing.
        resume: go on from the checkpoint in ``out`` when it has one, with the same settings. Of a finished run the
            report is returned as it is.
        notify: is told, in a sentence each, what happens next.
        progress: show the training's progress on stderr.
        on_step: is given the record of each training step.

    Returns:
        what ``report.json`` says.

    Raises:
        DataError: recordings, transcripts or the base cannot be used.
        ConversionError: the rank does not suit the base.
        CheckpointError: the checkpoint is damaged, foreign, or made with other settings.
        TrainingError: the loss is no longer finite.
        MemfitError: ``out`` holds another run's results, or cannot be written.
        InterruptedRun: Ctrl-C or SIGTERM came while training; ``resume`` goes on from the last checkpoint.
    """
    out = Path(out)
    say = notify or (lambda sentence: None)
    if not resume:
        results.refuse_earlier_results(out)

    model, recordings = load(config)
    settings = _settings(config, model, recordings)
    if resume and (finished := results.finished_report(out, settings, PersonalizeReport)):
        say(f"{out} holds this run's results already")
        return finished
    with threads_for(model):
        return _personalize(config, out, model, recordings, settings, resume, say, progress, on_step)


def _personalize(
    config: PersonalizeConfig,
    out: Path,
    model: Recognizer,
    recordings: Recordings,
    settings: dict[str, JSON],
    resume: bool,
    say: Callable[[str], None],
    progress: bool,
    on_step: Callable[[StepRecord], None] | None,
) -> PersonalizeReport:
    say(recordings.description)
    references = [utterance.text for utterance in recordings.test]
    before = transcribe(model, recordings.test)
    wer_before = word_error_rate(references, before)
    batches = Batches(recordings.train, model.config, config.batch_size)
    convert(config, model)
    results.prepare(out)
    say(f"word error rate before: {percent(wer_before)}")

    def measure() -> float:
        return word_error_rate(references, transcribe(model, recordings.test))

    watch = Watch(out / results.WATCH, config.steps, measure, settings, resume)

    def after_step(record: StepRecord) -> None:
        watch.after(record.step)
        if on_step:
            on_step(record)

    # What a resume restores is this run's own: the caller's random numbers go on undisturbed.
    with undisturbed(), watch:
        result = train(
            config,
            model,
            batches,
            checkpoint=out / results.CHECKPOINT,
            every=_CHECKPOINT_EVERY,
            resume=resume,
            settings=settings,
            progress=progress,
            on_step=after_step,
        )
    if result.signal is not None:
        raise InterruptedRun(result.signal, len(result.records), config.steps, out / results.CHECKPOINT)

    after = transcribe(model, recordings.test)
    wer_after = word_error_rate(references, after)
    say(f"word error rate after: {percent(wer_after)}")
    assert result.peak is not None, "fit was asked to measure"
    report = PersonalizeReport(
        method=config.method,
        config={**_origin(config), **settings},
        seed=config.seed,
        steps=config.steps,
        recordings=recordings.description,
        wer_before=wer_before,
        wer_after=wer_after,
        wer_curve=((0, wer_before), *watch.curve(), (config.steps, wer_after)),
        losses=tuple(record.loss for record in result.records),
        # The ledger slows down the steps that it watches: of a very short run there may be no others.
        seconds_per_step=result.seconds_per_step or result.records[-1].seconds,
        peak_bytes=result.peak.to_dict(),
        process_peak_bytes=watch.process_bytes,
        heard=tuple(
            Heard(utterance.name, utterance.text, first, second)
            for utterance, first, second in zip(recordings.test, before, after, strict=True)
        ),
        versions=versions(),
    )
    recognizer_file.save(state_dict(model), model.config, out / results.MODEL)
    results.write_text(out / results.PAGE, render(report))
    # The last file to come is the sign of a finished run.
    results.write_text(out / results.REPORT, report.to_json())
    (out / results.WATCH).unlink(missing_ok=True)
    return report


def load(config: PersonalizeConfig) -> tuple[Recognizer, Recordings]:
    """The base recognizer and the recordings that a run starts from; raises as :func:`personalize` does."""
    model = recognizer_file.load_base() if config.base is None else recognizer_file.load(config.base)
    recordings = load_recordings(
        config.recordings,
        sample_rate=model.config.sample_rate,
        alphabet=model.config.alphabet,
        speaker=config.speaker,
        utterances=config.utterances,
        seed=config.seed,
    )
    return model, recordings


def train(config: PersonalizeConfig, model: Recognizer, batches: Batches, **options: Any) -> FitResult:
    """Train a recognizer that :func:`convert` has prepared.

    Torch's random numbers are seeded with the configuration's. ``options`` go to :func:`memfit.fit`.
    """
    optimizer = make_optimizer(config, [parameter for parameter in model.parameters() if parameter.requires_grad])
    torch.manual_seed(config.seed)
    return fit(
        model,
        ctc_loss,
        batches,
        optimizer,
        steps=config.steps,
        scheduler=optimizers.make_schedule(optimizer, config.steps),
        max_grad_norm=MAX_GRAD_NORM,
        **options,
    )


@contextmanager
def threads_for(model: Recognizer) -> Iterator[None]:
    """One CPU thread where the matrices are too small to share: threads would wait for each other at every step."""
    before = torch.get_num_threads()
    if model.config.hidden < _SHARED_FROM_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convert(config: PersonalizeConfig, model: Recognizer) -> None:
    """Make the model one that the configuration's method trains, in place."""
    if config.method == "low-rank":
        convert_(model, LowRankGradient(rank=config.rank, sides=config.sides, seed=config.seed))


def make_optimizer(config: PersonalizeConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a method, over the parameters that train."""
    name: optimizers.OptimizerName = "adam" if config.method == "low-rank" else config.method
    return optimizers.make_optimizer(name, parameters, config.learning_rate)


def _settings(config: PersonalizeConfig, model: Recognizer, recordings: Recordings) -> dict[str, JSON]:
    """All that the trained weights depend on. Paths may move; what they led to is told by its hash."""
    low_rank: dict[str, JSON] = {"rank": config.rank, "sides": config.sides} if config.method == "low-rank" else {}
    return {
        "method": config.method,
        **low_rank,
        "lr": config.learning_rate,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "utterances": len(recordings.train),
        "seed": config.seed,
        "base_sha256": digest(tensor for _, tensor in sorted(model.state_dict().items())),
        "recordings_sha256": digest(
            part for utterance in (*recordings.train, *recordings.test) for part in (utterance.text, utterance.audio)
        ),
    }


def _origin(config: PersonalizeConfig) -> dict[str, JSON]:
    """Where everything came from; a resumed run may find it elsewhere."""
    return {
        "recordings": str(config.recordings),
        "speaker": config.speaker,
        "base": None if config.base is None else str(config.base),
    }
