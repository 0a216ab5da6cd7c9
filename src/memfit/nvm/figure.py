"""The method's figure: for each world accuracy over samples above, and the worst cell's writes below, on a log axis."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from memfit.errors import require
from memfit.nvm.run_report import SchemeResult
from memfit.nvm.schemes import SCHEMES, TITLES, Scheme
from memfit.nvm.worlds import WORLDS, World

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by people who see fewer.
_COLOURS: Mapping[Scheme, str] = {
    "inference": "#8a8f98",
    "bias": "#56b4e9",
    "sgd": "#d55e00",
    "low-rank": "#e69f00",
    "low-rank-max-norm": "#009e73",
}
_WORLD_TITLES: Mapping[World, str] = {
    "control": "control",
    "shift": "distribution shift",
    "analog": "analog drift",
    "digital": "digital drift",
}


def check_can_draw() -> None:
    """Raises:
    MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib.figure", extra="nvm")


def draw(results: Sequence[SchemeResult]) -> str:
    """The figure as SVG.

    Args:
        results: at least one. Several of one world and scheme (other seeds) become one line, their mean, over a band
            from the lowest to the highest.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="nvm")
    figures = require("matplotlib.figure", extra="nvm")
    worlds = [world for world in WORLDS if any(result.world == world for result in results)]
    schemes = [scheme for scheme in SCHEMES if any(result.scheme == scheme for result in results)]
    # The same results make the same file: ids are not drawn at random, and no date is noted.
    with matplotlib.rc_context({"svg.hashsalt": "memfit", "svg.fonttype": "none", "font.size": 9}):
        width = 2.9 * len(worlds) + 0.8
        figure = figures.Figure(figsize=(width, 4.8), layout="constrained")
        panels = figure.subplots(2, len(worlds), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
        for column, world in enumerate(worlds):
            _draw_world(panels[0][column], panels[1][column], [each for each in results if each.world == world])
            panels[0][column].set_title(_WORLD_TITLES[world], fontsize=10)
            panels[1][column].set_xlabel("samples")
        panels[1][0].set_ylim(0, 2 * max(10, *(result.cells.worst_cell for result in results)))
        panels[0][0].set_ylabel("accuracy, moving average")
        panels[1][0].set_ylabel("writes of the worst cell")
        handles = [panels[0][0].plot([], [], color=_COLOURS[scheme], label=TITLES[scheme])[0] for scheme in schemes]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(schemes), frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    # Of a path's points two decimals are more than a screen shows, and a quarter of the file.
    return re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), file.getvalue())


def _draw_world(accuracy: Axes, writes: Axes, results: Sequence[SchemeResult]) -> None:
    for scheme in SCHEMES:
        curves = [result.curve for result in results if result.scheme == scheme]
        if not curves:
            continue
        samples = [point[0] for point in curves[0]]
        for axes, value in ((accuracy, 1), (writes, 2)):
            columns = [[point[value] for point in points] for points in zip(*curves, strict=True)]
            means = [fmean(column) for column in columns]
            if axes is writes and not any(means):
                continue
            axes.plot(samples, means, color=_COLOURS[scheme], linewidth=1.4)
            if len(curves) > 1:
                lows, highs = [min(column) for column in columns], [max(column) for column in columns]
                axes.fill_between(samples, lows, highs, color=_COLOURS[scheme], alpha=0.18, linewidth=0)
    writes.set_yscale("symlog", linthresh=1)
    for axes in (accuracy, writes):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
