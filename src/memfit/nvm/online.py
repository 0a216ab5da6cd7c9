"""One device in one world: predict, learn, drift, sample after sample; killed at any instant, it goes on as it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from memfit import checkpoint as checkpoints
from memfit.errors import CheckpointError, DataError
from memfit.nvm.schemes import Learner
from memfit.nvm.streams import Stream
from memfit.nvm.worlds import CHUNK, World, drift_
from memfit.run.interrupts import InterruptedRun, Interrupts
from memfit.run.report import JSON
from memfit.run.state import compare_settings

EVERY = 2_000  # samples between checkpoints
MEMORY = 0.999  # of the moving average of accuracy
RECENT = 1_000


@dataclass(frozen=True)
class OnlineRecord:
    """What came of it.

    Attributes:
        correct: (samples,), bool: whether each prediction was right.
        worst: (chunks,), int64: writes of the most written cell, after each :data:`~memfit.nvm.worlds.CHUNK` samples.
        seconds: wall-clock time of all samples.
    """

    correct: Tensor
    worst: Tensor
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of right predictions over all samples."""
        return float(self.correct.double().mean())

    @property
    def final_accuracy(self) -> float:
        """The moving average after the last sample."""
        return float(moving_average(self.correct)[-1])


def moving_average(correct: Tensor, memory: float = MEMORY) -> Tensor:
    """Exponential moving average of right predictions, as an average of what there is so far.

    Args:
        correct: (samples,), bool.
        memory: weight of the past at each sample.

    Returns:
        (samples,), float64: after each sample, sum memory^(n-i) correct_i / sum memory^(n-i).
    """
    total = weight = 0.0
    found = []
    for right in correct.tolist():
        total, weight = memory * total + right, memory * weight + 1
        found.append(total / weight)
    return torch.tensor(found, dtype=torch.float64)


def learn_online(
    learner: Learner,
    stream: Stream,
    *,
    world: World,
    seed: int,
    samples: int,
    checkpoint: Path | None = None,
    resume: bool = False,
    settings: Mapping[str, JSON] | None = None,
    on_chunk: Callable[[int, float, int], None] | None = None,
) -> OnlineRecord:
    """Let a device see so many samples.

    Args:
        learner: as it leaves the factory; it is changed.
        stream: what it meets.
        world: decides the drift.
        seed: of the drift.
        samples: how many.
        checkpoint: the file to write every 2,000 samples, at the end, and at Ctrl-C or SIGTERM.
        resume: go on from the checkpoint where there is one; of a finished run the record is returned.
        settings: what the run depends on; stored, and compared at a resume.
        on_chunk: called after each chunk with the samples done, the share of right predictions among the last 1,000,
            and the writes of the most written cell.

    Raises:
        CheckpointError: the checkpoint cannot be written or read, or is of another run.
        DataError: the stream ends before.
        TrainingError: a weight would become no number.
        InterruptedRun: a signal came; what is done is in the checkpoint.
    """
    run = _Run(learner, checkpoint, dict(settings or {}))
    if resume and checkpoint is not None and checkpoint.exists():
        run.load(samples)
    with Interrupts(enabled=checkpoint is not None) as interrupts:
        while run.done < samples and interrupts.signal is None:
            run.advance(stream, world, seed, samples)
            if on_chunk is not None:
                on_chunk(run.done, run.recent_accuracy, run.worst[-1])
            if run.done % EVERY == 0 or run.done == samples or interrupts.signal is not None:
                run.save()
    if interrupts.signal is not None:
        raise InterruptedRun(interrupts.signal, run.done, samples, cast(Path, checkpoint))
    return run.record()


class _Run:
    """The state of one call of :func:`learn_online`."""

    def __init__(self, learner: Learner, path: Path | None, settings: dict[str, JSON]) -> None:
        self.learner, self.path, self.settings = learner, path, settings
        self.done = 0
        self.seconds = 0.0
        self.correct: list[bool] = []
        self.worst: list[int] = []

    def advance(self, stream: Stream, world: World, seed: int, samples: int) -> None:
        """One chunk, or what is left of the samples."""
        inputs, labels = stream.chunk(self.done // CHUNK)
        count = min(CHUNK, samples - self.done)
        if len(labels) < count:
            raise DataError(
                f"the stream ends after {self.done + len(labels):,} samples, and {samples:,} were asked for."
            )
        finite = inputs[:count].flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            number = self.done + 1 + int((~finite).nonzero()[0])
            raise DataError(f"sample {number:,} of the stream is not finite (NaN or infinite).")
        started = time.perf_counter()
        for number in range(count):
            self.correct.append(self.learner.learn(inputs[number : number + 1], labels[number : number + 1]))
            self.done += 1
            drift_(self.learner.arrays, world, seed, self.done)
        self.learner.count_reads_(count)
        self.seconds += time.perf_counter() - started
        self.worst.append(max(int(array.writes.max()) for array in self.learner.arrays))

    @property
    def recent_accuracy(self) -> float:
        recent = self.correct[-RECENT:]
        return sum(recent) / len(recent)

    def record(self) -> OnlineRecord:
        return OnlineRecord(
            torch.tensor(self.correct, dtype=torch.bool), torch.tensor(self.worst, dtype=torch.int64), self.seconds
        )

    def save(self) -> None:
        if self.path is not None:
            record = self.record()
            tree: dict[str, Any] = {
                "settings": self.settings,
                "learner": self.learner.state(),
                "correct": record.correct,
                "worst": record.worst,
                "seconds": record.seconds,
            }
            checkpoints.save(self.path, tree)

    def load(self, samples: int) -> None:
        assert self.path is not None
        tree = cast("dict[str, Any]", checkpoints.load(self.path))
        if not (isinstance(tree, dict) and {"settings", "learner", "correct", "worst", "seconds"} <= tree.keys()):
            raise CheckpointError(f"{self.path}: this checkpoint was not written by memfit nvm: give another.")
        compare_settings(tree["settings"], self.settings, self.path)
        done = len(tree["correct"])
        if done > samples or (done < samples and done % CHUNK):
            why = "" if done > samples else f", as a run goes on from a multiple of {CHUNK}"
            raise CheckpointError(
                f"{self.path}: the run has seen {done:,} samples, from which it cannot go on to {samples:,}{why}: "
                f"give {done:,}, or another --out."
            )
        self.learner.load_state(tree["learner"])
        self.correct, self.worst = tree["correct"].tolist(), tree["worst"].tolist()
        self.done, self.seconds = done, tree["seconds"]
