"""What a fine-tuning did, as a record: ``report.json`` for programs; `page` makes ``report.html`` of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from memfit.run.report import JSON, TaskReport, finite_or_none, nan_for_none


@dataclass(frozen=True)
class ClassAccuracy:
    """How well one class is told.

    Attributes:
        name: of the class.
        images: held-out images of it.
        before: of these, how many were right before training; None where there was no head for these classes.
        after: how many are right after it.
    """

    name: str
    images: int
    before: int | None
    after: int


@dataclass(frozen=True)
class Mistake:
    """A held-out image that is taken for another class after training.

    Attributes:
        name: its file, or its place in an array.
        label: its class.
        before: what it was taken for before; None where there was no head for these classes.
        after: what it is taken for.
    """

    name: str
    label: str
    before: str | None
    after: str


@dataclass(frozen=True)
class FinetuneReport(TaskReport):
    """The outcome of one fine-tuning.

    Attributes:
        model: the net's name in the zoo, or the function that made it.
        config: all settings of the run, with the learning rate that was used.
        seed: of fresh weights, of the order of the images, and of the conversions' bases.
        steps: training steps done.
        data: a sentence that says what was learned from and what was held out.
        accuracy_before: share of the held-out images that were told right before training; None where there was no
            head for these classes.
        accuracy_after: the same after training.
        accuracy_curve: (steps done, accuracy on some or all held-out images), to the last step, and from step 0 where
            there was a head for these classes.
        losses: the loss of each step, in nats; NaN or infinite for a step that was left out.
        seconds_per_step: median wall-clock time of a training step, without those that the ledger watched.
        peak_bytes: the ledger's five lines at the peak of training, and their ``total``.
        process_peak_bytes: growth of the process's resident memory during training, by the operating system.
        per_class: the same accuracies for each class.
        mistakes: the first held-out images that are taken for another class.
        versions: of memfit, torch and Python, and the platform.
    """

    command: ClassVar[str] = "finetune"

    model: str
    config: Mapping[str, JSON]
    seed: int
    steps: int
    data: str
    accuracy_before: float | None
    accuracy_after: float
    accuracy_curve: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    seconds_per_step: float
    peak_bytes: Mapping[str, int]
    process_peak_bytes: int
    per_class: tuple[ClassAccuracy, ...]
    mistakes: tuple[Mistake, ...]
    versions: Mapping[str, str]

    @property
    def held_out(self) -> int:
        """Number of held-out images."""
        return sum(each.images for each in self.per_class)

    def to_dict(self) -> dict[str, JSON]:
        """Plain values in the order in which one reads them; a loss that is not finite becomes None."""
        return {
            "model": self.model,
            "config": dict(self.config),
            "seed": self.seed,
            "steps": self.steps,
            "data": self.data,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "seconds_per_step": self.seconds_per_step,
            "peak_bytes": dict(self.peak_bytes),
            "process_peak_bytes": self.process_peak_bytes,
            "accuracy_curve": [list(point) for point in self.accuracy_curve],
            "losses": finite_or_none(self.losses),
            "per_class": [asdict(each) for each in self.per_class],
            "mistakes": [asdict(each) for each in self.mistakes],
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneReport:
        return cls(
            accuracy_curve=tuple((int(step), float(share)) for step, share in values.pop("accuracy_curve")),
            losses=nan_for_none(values.pop("losses")),
            per_class=tuple(ClassAccuracy(**each) for each in values.pop("per_class")),
            mistakes=tuple(Mistake(**each) for each in values.pop("mistakes")),
            **values,
        )

    def rates(self) -> list[float]:
        before = [] if self.accuracy_before is None else [self.accuracy_before]
        return [
            *before,
            self.accuracy_after,
            *(figure for each in self.per_class for figure in (each.images, each.after)),
        ]
