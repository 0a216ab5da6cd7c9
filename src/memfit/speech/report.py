"""What a personalization did, as a record: ``report.json`` for programs; `page` makes ``report.html`` of it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch

from memfit.errors import DataError
from memfit.ledger import LINES

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"


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
class PersonalizeReport:
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
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses],
            "hypotheses": [asdict(heard) for heard in self.heard],
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """The text of ``report.json``: ASCII, for the name of a folder need not be possible in any encoding."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> PersonalizeReport:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.
            where: what an error's message begins with, usually the file.

        Raises:
            DataError: this is not such a report.
        """
        try:
            values = json.loads(text)
            report = cls(
                heard=tuple(Heard(**heard) for heard in values.pop("hypotheses")),
                wer_curve=tuple((int(step), float(wer)) for step, wer in values.pop("wer_curve")),
                losses=tuple(math.nan if loss is None else float(loss) for loss in values.pop("losses")),
                **values,
            )
            report._check()
            return report
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{where}: not a report of memfit personalize, or a damaged one: remove it.") from error

    def _check(self) -> None:
        """Refuse, by the errors that a use would raise, values of other kinds than are written."""
        for mapping in (self.config, self.peak_bytes, self.versions):
            mapping.items()
        peak = [self.peak_bytes[line] for line in LINES]
        figures = (self.steps, self.wer_before, self.wer_after, self.seconds_per_step, self.process_peak_bytes, *peak)
        if not all(isinstance(figure, int | float) for figure in figures):
            raise TypeError("a figure is not a number")


def versions() -> dict[str, str]:
    """What the figures of a report depend on besides its settings."""
    return {
        "memfit": importlib.metadata.version("memfit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
