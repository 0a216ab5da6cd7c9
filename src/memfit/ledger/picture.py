"""``memfit profile --png``: one picture of a profile, for a paper, a slide or an issue."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memfit.errors import MemfitError
from memfit.ledger.account import LINES
from memfit.ledger.page import thin_out
from memfit.ledger.profile import Profile
from memfit.ledger.report import COLOURS, describe, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 150


def check_can_draw() -> None:
    """Raises:
    MemfitError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MemfitError('--png needs matplotlib: pip install "memfit[png]".') from error


def draw_png(profiles: Mapping[str, Profile]) -> bytes:
    """A PNG: the last profile's step as a stacked area with its peak, above a bar for each profile's peak.

    Args:
        profiles: what to call each, and what was found; at least one.

    Raises:
        MemfitError: matplotlib is not installed.
    """
    check_can_draw()
    from matplotlib.figure import Figure

    *_, found = profiles.values()
    figure = Figure(figsize=(9, 4.6 + 0.42 * len(profiles)), layout="constrained", dpi=DOTS_PER_INCH)
    step, bars = figure.subplots(2, 1, height_ratios=(4, 0.6 * len(profiles) + 0.3))
    settings = ", ".join([found.config.optimizer, *found.config.conversions])
    figure.suptitle(f"{found.config.target}, {settings}", fontsize=11, fontweight="bold", wrap=True, parse_math=False)
    _draw_step(step, found)
    _draw_bars(bars, profiles)
    for axes in (step, bars):
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_step(axes: Axes, found: Profile) -> None:
    samples, peak = thin_out(found.timeline)
    highest = sum(samples[peak][1:])
    unit, name = _unit(highest)
    milliseconds = [1000 * sample[0] for sample in samples]
    layers = [[sample[number] / unit for sample in samples] for number in range(1, len(LINES) + 1)]
    colours = [COLOURS[line][0] for line in LINES]
    axes.stackplot(milliseconds, layers, labels=LINES, colors=colours, step="post", linewidth=0)
    at = milliseconds[peak]
    axes.axvline(at, color="black", linestyle="--", linewidth=0.8)
    when = describe(found.instant).partition(", after")[0]
    axes.set_title(f"peak {format_bytes(found.peak.total)}, {when}", fontsize=9, wrap=True, parse_math=False)
    axes.set(xlim=(0, max(milliseconds[-1], 1e-6)), ylim=(0, 1.05 * highest / unit))
    axes.set(xlabel="milliseconds of a training step", ylabel=name)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _draw_bars(axes: Axes, profiles: Mapping[str, Profile]) -> None:
    highest = max(found.peak.total for found in profiles.values())
    unit, name = _unit(highest)
    starts = [0.0] * len(profiles)
    for line in LINES:
        lengths = [getattr(found.peak, line) / unit for found in profiles.values()]
        axes.barh(list(profiles), lengths, left=starts, color=COLOURS[line][0], height=0.62)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for row, (found, end) in enumerate(zip(profiles.values(), starts, strict=True)):
        words = f" {format_bytes(found.peak.total)}, the process {format_bytes(found.growth)}"
        axes.text(end, row, words, va="center", fontsize=9)
    axes.set(xlim=(0, 1.5 * highest / unit), xlabel=f"{name} at the peak")
    axes.invert_yaxis()
    axes.tick_params(left=False)


def _unit(nbytes: float) -> tuple[float, str]:
    """The binary unit in which a number of bytes is easy to read."""
    power = min(3, int(math.log(max(nbytes, 1), 1024)))
    return float(1024**power), ("bytes", "KiB", "MiB", "GiB")[power]
