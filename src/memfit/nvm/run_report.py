"""What a simulation found, as a record: ``report.json`` for programs; ``page`` makes ``report.html`` of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memfit.nvm.online import OnlineRecord, moving_average
from memfit.nvm.schemes import Learner, Rates, Scheme
from memfit.nvm.worlds import CHUNK, World
from memfit.run.report import JSON
from memfit.weights.cell_report import SECONDS_PER_YEAR, CellReport
from memfit.weights.cell_report import report as report_cells
from memfit.weights.technology import Technology

_POINTS = 200  # of a curve: what a figure can show


@dataclass(frozen=True)
class SchemeResult:
    """One scheme in one world.

    Attributes:
        world, scheme, seed, rates: what was run.
        samples: seen.
        accuracy: share of right predictions over all samples.
        final_accuracy: the moving average (0.999) of right predictions after the last sample.
        curve: (samples, moving average of accuracy, writes of the most written cell), in the order of the samples.
        cells: wear and energy of all weights.
        worst_cell_by_pixel: of SGD, writes of the most written cell without a buffer for a convolution's gradient,
            where every pixel's term is written by itself; None for other schemes.
        seconds: wall-clock time of the samples.
    """

    world: World
    scheme: Scheme
    seed: int
    rates: Rates
    samples: int
    accuracy: float
    final_accuracy: float
    curve: tuple[tuple[int, float, int], ...]
    cells: CellReport
    worst_cell_by_pixel: int | None
    seconds: float

    def lifetime_years(self, samples_per_second: float) -> float:
        """How long the worst cell lasts at this rate, in years; infinite when none was written."""
        return self.cells.lifetime_seconds(self.samples, samples_per_second) / SECONDS_PER_YEAR

    def to_dict(self, samples_per_second: float) -> dict[str, JSON]:
        """Plain values; a lifetime without end becomes None."""
        years = self.lifetime_years(samples_per_second)
        return {
            "world": self.world,
            "scheme": self.scheme,
            "seed": self.seed,
            "lr": self.rates.weights,
            "bias_lr": self.rates.biases,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "final_accuracy": self.final_accuracy,
            "cells": self.cells.cells,
            "worst_cell_writes": self.cells.worst_cell,
            "worst_cell_writes_by_pixel": self.worst_cell_by_pixel,
            "writes": self.cells.writes,
            "writes_per_cell_histogram": [list(each) for each in self.cells.histogram],
            "write_joules": self.cells.write_joules,
            "read_joules": self.cells.read_joules,
            "lifetime_years": years if math.isfinite(years) else None,
            "seconds": round(self.seconds, 3),
            "curve": [list(each) for each in self.curve],
        }


def result_of(
    learner: Learner, record: OnlineRecord, *, world: World, seed: int, rates: Rates, technology: Technology
) -> SchemeResult:
    """Put together what a run left behind."""
    samples = len(record.correct)
    averages = moving_average(record.correct)
    chunks = len(record.worst)
    shown = sorted({max(1, round(chunks * part / _POINTS)) for part in range(1, _POINTS + 1)})
    curve = []
    for chunk in shown:
        done = min(chunk * CHUNK, samples)
        curve.append((done, round(float(averages[done - 1]), 5), int(record.worst[chunk - 1])))
    return SchemeResult(
        world=world,
        scheme=learner.scheme,
        seed=seed,
        rates=rates,
        samples=samples,
        accuracy=record.accuracy,
        final_accuracy=float(averages[-1]),
        curve=tuple(curve),
        cells=report_cells(learner.arrays, technology),
        worst_cell_by_pixel=learner.worst_cell_by_pixel(),
        seconds=record.seconds,
    )


@dataclass(frozen=True)
class NvmReport:
    """The outcome of a simulation.

    Attributes:
        config: all settings.
        data: a sentence that says what was learned from.
        samples_per_second: that lifetimes are projected for.
        technology: what the memory is made of.
        results: one for each world and scheme.
        versions: of memfit, torch and Python, and the platform.
    """

    config: Mapping[str, JSON]
    data: str
    samples_per_second: float
    technology: Technology
    results: tuple[SchemeResult, ...]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the order in which one reads them."""
        return {
            "config": dict(self.config),
            "data": self.data,
            "technology": {
                "title": self.technology.title,
                "read_picojoules_per_bit": self.technology.read_picojoules,
                "write_picojoules_per_bit": self.technology.write_picojoules,
                "endurance": self.technology.endurance,
                "source": self.technology.source,
            },
            "samples_per_second": self.samples_per_second,
            "results": [result.to_dict(self.samples_per_second) for result in self.results],
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """The text of ``report.json``, in ASCII."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True, allow_nan=False) + "\n"
