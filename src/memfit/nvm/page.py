"""``report.html``: the figure, and a table of accuracy, writes, energy and lifetime; it stands alone."""

from __future__ import annotations

import base64
import math
from html import escape

from memfit.nvm.run_report import NvmReport, SchemeResult
from memfit.nvm.schemes import TITLES
from memfit.report_page import page, percent

_PREFIXES = ("", "m", "µ", "n", "p")


def render(report: NvmReport, figure: str) -> str:
    """The whole page as text.

    Args:
        report: what to show.
        figure: as SVG.
    """
    picture = base64.b64encode(figure.encode()).decode()
    rows = "\n".join(_row(result, report.samples_per_second) for result in report.results)
    technology = report.technology
    settings = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd></div>"
        for name, value in report.config.items()
    )
    body = f"""<section>
<h2>Accuracy while learning, and the most written cell</h2>
<img alt="Accuracy over samples, and writes of the worst cell, by world and scheme" \
style="width:100%;background:#fff;border-radius:6px" src="data:image/svg+xml;base64,{picture}">
</section>
<section>
<h2>All runs</h2>
<table>
<thead><tr><th>World</th><th>Scheme</th><th>Accuracy</th><th>At the end</th><th>Worst cell</th><th>Writes</th>\
<th>Write energy</th><th>Lifetime</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="muted">Accuracy over all samples, and its moving average (0.999) at the end. Energy is of {technology.title};
lifetime is until the worst cell has had {technology.endurance:g} writes, at {report.samples_per_second:g} samples a
second. {escape(technology.source)}.</p>
</section>
<section><h2>Settings</h2><dl class="settings">{settings}</dl></section>"""
    return page(
        title="Online learning in non-volatile memory",
        heading="Online learning in non-volatile memory",
        about=report.data,
        body=body,
        versions=report.versions,
    )


def joules(value: float | None) -> str:
    """Energy for people: ``1.23 mJ``."""
    if value is None:
        return "not known"
    if value == 0:
        return "0 J"
    power = min(len(_PREFIXES) - 1, max(0, math.ceil(-math.log10(value) / 3)))
    return f"{_three_digits(value * 1000**power)} {_PREFIXES[power]}J"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def lifetime(years: float) -> str:
    """A lifetime for people: ``3.2 years``, ``14 hours``."""
    if math.isinf(years):
        return "no writes"
    for unit, per_year in (("years", 1.0), ("days", 365.25), ("hours", 8766.0), ("minutes", 525_960.0)):
        if years * per_year >= 1:
            count = _three_digits(years * per_year)
            return f"{count} {unit.rstrip('s') if count == '1' else unit}" if years < 1e4 else f"{years:.1e} years"
    return "below a minute"


def _row(result: SchemeResult, samples_per_second: float) -> str:
    cells = {
        "world": result.world,
        "scheme": TITLES[result.scheme],
        "accuracy": percent(result.accuracy),
        "at the end": percent(result.final_accuracy),
        "worst cell": f"{result.cells.worst_cell:,}",
        "writes": f"{result.cells.writes:,}",
        "energy": joules(result.cells.write_joules),
        "lifetime": lifetime(result.lifetime_years(samples_per_second)),
    }
    return "<tr>" + "".join(f'<td data-label="{name}">{escape(text)}</td>' for name, text in cells.items()) + "</tr>"


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)[:64]
