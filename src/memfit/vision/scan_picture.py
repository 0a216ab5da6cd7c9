"""``memfit filter-scan --png``: one picture of a scan, for a paper, a slide or an issue."""

from __future__ import annotations

import io

from memfit.charts import dot_colour
from memfit.ledger.picture import DOTS_PER_INCH, check_can_draw
from memfit.vision.scan_figures import FilterScan
from memfit.vision.scan_words import times


def draw_png(scan: FilterScan, target: str) -> bytes:
    """A PNG: for each layer the cosine and the speed-up of each size of patches, as dots.

    Args:
        scan: what was found.
        target: what was scanned, in words.

    Raises:
        MemfitError: matplotlib is not installed.
    """
    check_can_draw()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = [layer.name or "(the model)" for layer in scan.layers]
    places = list(range(len(names)))
    figure = Figure(figsize=(9, 1.7 + 0.27 * len(names)), layout="constrained", dpi=DOTS_PER_INCH)
    cosines, speeds = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"Gradient filters: {target}", fontsize=11, fontweight="bold", wrap=True, parse_math=False)
    for number, filtered in enumerate(scan.layers[0].filtered):
        column = [layer.filtered[number] for layer in scan.layers]
        look = {"color": dot_colour(number), "label": f"patch {filtered.patch}", "s": 34, "alpha": 0.85, "zorder": 3}
        found = [(each.cosine, place) for each, place in zip(column, places, strict=True) if each.cosine is not None]
        cosines.scatter([cosine for cosine, _ in found], [place for _, place in found], **look)
        speeds.scatter([layer.speedup(each) for layer, each in zip(scan.layers, column, strict=True)], places, **look)
    cosines.set_xlim(min(0.0, *cosines.get_xlim()), 1.02)
    cosines.set_xlabel("cosine to the exact gradient (the worse of weight and input)", fontsize=9)
    speeds.set_xscale("log")
    speeds.set_xlabel("times as fast as the exact backward", fontsize=9)
    speeds.xaxis.set_major_formatter(FuncFormatter(lambda value, _: times(value)))
    speeds.xaxis.set_minor_formatter(NullFormatter())
    cosines.set_yticks(places, names, fontsize=8, parse_math=False)
    cosines.invert_yaxis()
    for axes, mark in ((cosines, scan.least_cosine), (speeds, 1.0)):
        axes.axvline(mark, color="black", linestyle="--", linewidth=0.8)
        axes.grid(axis="y", linewidth=0.4)
        axes.tick_params(left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*cosines.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
