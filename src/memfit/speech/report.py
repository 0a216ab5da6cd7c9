"""What a personalization did, as a record: ``report.json`` for programs; `page` makes ``report.html`` of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from memfit.run.report import JSON, TaskReport, finite_or_none, nan_for_none


@dataclass(frozen=True)
class Heard:
    """One held-out utterance, as it was said and as it was recognized.

    Attributes:
        name: the file, or the files that were joined.
        reference: what was said.
        before: what the base recognizer heard.
        after: what the personalized recognizer hears.
    """

    name: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class PersonalizeReport(TaskReport):
    """The outcome of one personalization.

    Attributes:
        method: ``low-rank``, ``sgd``, ``momentum`` or ``adam``.
        config: all settings of the run, with the learning rate that was used.
        seed: of the order of the batches, of the built utterances and of the low-rank bases.
        steps: training steps done.
        recordings: a sentence that says what was learned from and what was held out.
        wer_before: word error rate of the base on the held-out utterances; 1 is as many errors as words.
        wer_after: the same after training.
        wer_curve: (steps done, word error rate on the held-out utterances), from step 0 to the last.
        losses: the loss of each step, in nats per character; NaN or infinite for a step that was left out.
        seconds_per_step: median wall-clock time of a training step, without those that the ledger watched.
        peak_bytes: the ledger's five lines at the peak of training, and their ``total``.
        process_peak_bytes: growth of the process's resident memory during training, by the operating system.
        heard: the held-out utterances.
        versions: of memfit, torch and Python, and the platform.
    """

    command: ClassVar[str] = "personalize"

    method: str
    config: Mapping[str, JSON]
    seed: int
    steps: int
    recordings: str
    wer_before: float
    wer_after: float
    wer_curve: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    seconds_per_step: float
    peak_bytes: Mapping[str, int]
    process_peak_bytes: int
    heard: tuple[Heard, ...]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, JSON]:
        """Plain values in the order in which one reads them; a loss that is not finite becomes None."""
        return {
            "method": self.method,
            "config": dict(self.config),
            "seed": self.seed,
            "steps": self.steps,
            "recordings": self.recordings,
            "wer_before": self.wer_before,
            "wer_after": self.wer_after,
            "seconds_per_step": self.seconds_per_step,
            "peak_bytes": dict(self.peak_bytes),
            "process_peak_bytes": self.process_peak_bytes,
            "wer_curve": [list(point) for point in self.wer_curve],
            "losses": finite_or_none(self.losses),
            "hypotheses": [asdict(heard) for heard in self.heard],
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PersonalizeReport:
        return cls(
            heard=tuple(Heard(**heard) for heard in values.pop("hypotheses")),
            wer_curve=tuple((int(step), float(wer)) for step, wer in values.pop("wer_curve")),
            losses=nan_for_none(values.pop("losses")),
            **values,
        )

    def rates(self) -> tuple[float, float]:
        return self.wer_before, self.wer_after
