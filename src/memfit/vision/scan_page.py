"""``memfit filter-scan --html``: one page that stands alone, without scripts or network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from memfit.charts import dot_rows
from memfit.ledger.report import format_bytes
from memfit.report_page import page
from memfit.run.report import versions
from memfit.vision.scan_figures import FilterScan, ScannedLayer
from memfit.vision.scan_words import FACTS, agreement_in_words, keepers_in_words, spared_in_words, times, together_rows

_STYLE = """\
<style>
svg .mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 4 3; }
.figures { table-layout: auto; font-size: 0.85rem; }
.figures td:not(:first-child), .figures th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.figures td, .figures th { padding: 4px 12px 4px 0; }
@media (max-width: 720px) { .figures td { text-align: left !important; grid-template-columns: 9rem 1fr; } }
</style>
"""


def render(scan: FilterScan, target: str) -> str:
    """The whole page as text.

    Args:
        scan: what was found.
        target: what was scanned, in words.
    """
    names = [layer.name or "(the model)" for layer in scan.layers]
    patches = [str(filtered.patch) for filtered in scan.layers[0].filtered]
    cosines = dot_rows(
        [(name, [each.cosine for each in layer.filtered]) for name, layer in zip(names, scan.layers, strict=True)],
        series=[f"patch {patch}" for patch in patches],
        title="Cosine to the exact gradient",
        format_x="{:.2g}".format,
        mark=scan.least_cosine,
    )
    speeds = dot_rows(
        [
            (name, [layer.speedup(each) for each in layer.filtered])
            for name, layer in zip(names, scan.layers, strict=True)
        ],
        series=[f"patch {patch}" for patch in patches],
        title="Times as fast as the exact backward",
        format_x=times,
        mark=1.0,
        logarithmic=True,
    )
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in scan.advice)
    body = f"""{_STYLE}<section>
<h2>Advice</h2>
<ul>{advice}</ul>
</section>
<section class="pair">
<div>{cosines}</div>
<div>{speeds}</div>
<p class="muted"><small>Of the weight's and the input's gradient the worse cosine. Dashed: the least cosine that was
asked for, and the speed of the exact backward.</small></p>
</section>
<section>
<h2>Whole steps, forward and backward</h2>
{_table(*together_rows(scan))}
</section>
<section>
<h2>Layer by layer</h2>
{_table(_COLUMNS, [row for layer in scan.layers for row in _rows(layer)])}
</section>"""
    return page(
        title=f"Where to filter gradients: {target}",
        heading="Where to filter gradients",
        about=f"{target}; {scan.threads} thread{'s' if scan.threads > 1 else ''}; {FACTS}",
        body=body,
        versions=versions(),
    )


_COLUMNS = ("layer", "patch", "backward", "faster", "keeps", "spared alone", "weight", "input", "input kept by")


def _rows(layer: ScannedLayer) -> list[list[str]]:
    first = [f"{layer.name} ({layer.shape})", "exact", f"{layer.ms:.2f} ms", "", format_bytes(layer.nbytes), "", "", ""]
    rows = [[*first, keepers_in_words(layer)]]
    for each in layer.filtered:
        spared = spared_in_words(each.spared)
        agreements = [agreement_in_words(each.weight), agreement_in_words(each.input)]
        speed = times(layer.speedup(each))
        rows.append(
            ["", str(each.patch), f"{each.ms:.2f} ms", speed, format_bytes(each.nbytes), spared, *agreements, ""]
        )
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(column)}">{escape(cell)}</td>' for column, cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
