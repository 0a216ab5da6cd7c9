"""``memfit profile --html``: one page that stands alone, without network, for any width and for light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from memfit.ledger.account import LINES, LiveTensor, Peak
from memfit.ledger.profile import Profile
from memfit.ledger.report import describe, format_bytes, svg
from memfit.page_style import STYLE

_COLUMNS = 600
"""Instants of the timeline that are drawn: more than a screen has use for, few enough for a small file."""

_STYLE = """\
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; font-size: 0.85rem; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.legend b { font-variant-numeric: tabular-nums; font-weight: 600; margin-left: 4px; }
.chart { position: relative; height: 280px; margin: 0 0 4px 4.6rem; touch-action: pan-y; }
.chart svg { position: absolute; inset: 0; height: 100%; border-bottom: 1px solid var(--rule); }
.chart span { position: absolute; font-size: 0.75rem; color: var(--muted); white-space: nowrap; }
.chart .tick { right: 100%; transform: translate(-8px, -50%); font-variant-numeric: tabular-nums; }
.chart .rule { position: absolute; top: 0; bottom: 0; border-left: 1px dashed var(--ink); pointer-events: none; }
.chart .rule span { top: 0; padding: 0 5px; color: var(--ink); background: var(--card); border-radius: 4px; }
.chart .rule.late span { right: 0; }
.chart #hover { border-left-style: solid; display: none; }
.ends { display: flex; justify-content: space-between; margin: 0 0 0 4.6rem; }
path.weights { fill: var(--weights); } path.gradients { fill: var(--gradients); }
path.optimizer { fill: var(--optimizer); } path.activations { fill: var(--activations); }
path.workspace { fill: var(--workspace); }
path { background: none; }
.tree details { margin-left: 1.1rem; } .tree > details { margin-left: 0; }
.tree summary { cursor: pointer; } .tree .leaf { margin-left: 2.1rem; } .tree > .leaf { margin-left: 1rem; }
.tree .row { display: inline-grid; grid-template-columns: 1fr minmax(40px, 30%) 5.5rem; gap: 12px; }
.tree .row { width: calc(100% - 1.4rem); align-items: center; vertical-align: middle; padding: 2px 0; }
.tree .leaf .row { width: 100%; }
.tree .bar { background: var(--accent); }
.tree .name { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .scroll table { min-width: 680px; table-layout: auto; font-size: 0.85rem; }
.scroll td, .scroll th { padding: 4px 14px 4px 0; text-align: left; white-space: nowrap; }
.scroll td:nth-child(2), .scroll th:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; }
.bars .narrow { display: none; }
code { font: 0.85em ui-monospace, monospace; overflow-wrap: anywhere; }
li { margin: 0 0 6px; }
@media (max-width: 720px) {
  .scroll table { min-width: 0; }
  .bars .wide { display: none; } .bars .narrow { display: block; }
  .scroll td, .scroll td:nth-child(2) { white-space: normal; text-align: left; }
  .tree .row { grid-template-columns: 1fr 64px 5.2rem; }
  .tree .track { grid-column: auto; grid-row: auto; }
}
"""

_SCRIPT = """\
const data = JSON.parse(document.getElementById('samples').textContent);
const units = ['B', 'KiB', 'MiB', 'GiB'];
function words(n) {
  let unit = 0;
  while (n >= 1023.95 && unit < 3) { n /= 1024; unit += 1; }
  return (unit ? n.toFixed(1) : n) + ' ' + units[unit];
}
const chart = document.getElementById('chart'), hover = document.getElementById('hover');
function say(sample) {
  data.lines.forEach((line, k) => { document.getElementById('at-' + line).textContent = words(sample[k + 1]); });
  document.getElementById('at-total').textContent = words(sample.slice(1).reduce((a, b) => a + b, 0));
}
function point(event) {
  const box = chart.getBoundingClientRect();
  let share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  const peak = data.samples[data.peak][0] / data.seconds;
  if (Math.abs(share - peak) * box.width < 5) share = peak;
  const at = share * data.seconds;
  let k = 0;
  while (k + 1 < data.samples.length && data.samples[k + 1][0] <= at) k += 1;
  hover.style.display = 'block';
  hover.style.left = 100 * share + '%';
  hover.classList.toggle('late', share > 0.5);
  hover.firstElementChild.textContent = (1000 * data.samples[k][0]).toFixed(1) + ' ms';
  say(data.samples[k]);
}
chart.addEventListener('pointermove', point);
chart.addEventListener('pointerdown', point);
chart.addEventListener('pointerleave', () => { hover.style.display = 'none'; say(data.samples[data.peak]); });
"""

Sample = tuple[float, ...]
"""Seconds, and the five lines in the order of ``LINES``."""


def render(profiles: Mapping[str, Profile]) -> str:
    """The whole page as text: the last profile in full and, where there are several, all of them side by side."""
    *_, (name, found) = profiles.items()
    samples, peak = thin_out(found.timeline)
    config = found.config
    settings = ", ".join([config.optimizer, *config.conversions])
    more = f"""\
<section>
<h2>Side by side</h2>
{_bars({each: profile.peak for each, profile in profiles.items()})}
<p class="muted">The process's peak grew by \
{"; ".join(f"{format_bytes(profile.growth)} {escape(each)}" for each, profile in profiles.items())}.</p>
</section>"""
    # Every value that comes from outside is escaped where it enters the text.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training memory of {escape(config.target)}: {format_bytes(found.peak.total)}</title>
<style>
{STYLE}{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>Where the memory of a training step goes</h1>
<p class="muted">{escape(config.target)}, {escape(settings)}</p>
</header>
<section class="hero">
<h2>At the peak</h2>
<p class="rates"><span class="after"><b>{format_bytes(found.peak.total)}</b><small>of tensors{_of(name)}</small></span>
<span class="before"><b>{format_bytes(found.growth)}</b><small>by which the process grew</small></span></p>
<p>{escape(_sentence(describe(found.instant)))}</p>
{"".join(f"<p>{escape(note)}</p>" for note in found.notes)}
</section>
{more if len(profiles) > 1 else ""}
<section>
<h2>One training step</h2>
{_timeline(samples, peak)}
</section>
<section>
<h2>Modules at the peak</h2>
{_tree(found.modules)}
</section>
<section>
<h2>Largest tensors at the peak</h2>
{_tensors(found.tensors)}
</section>
{_advice(found)}
</main>
<script type="application/json" id="samples">{_data(samples, peak)}</script>
<script>
{_SCRIPT}</script>
</body>
</html>
"""


def thin_out(timeline: Sequence[Sample], columns: int = _COLUMNS) -> tuple[list[Sample], int]:
    """The step in columns of equal time, each as high as it gets in there, at most two samples for each.

    Returns:
        The samples, the time of each its column's beginning and of the last the end, and the number of the peak.
    """
    end = timeline[-1][0] or 1.0
    width = end / columns
    highest: dict[int, Sample] = {}
    last: dict[int, Sample] = {}
    for sample in timeline:
        column = min(columns - 1, int(sample[0] / width))
        if column not in highest or sum(sample[1:]) > sum(highest[column][1:]):
            highest[column] = sample
        last[column] = sample
    samples: list[Sample] = []
    for column, sample in highest.items():
        samples.append((column * width, *sample[1:]))
        if column + 1 < columns and column + 1 not in highest:  # what was there at its end stays for a while
            samples.append(((column + 1) * width, *last[column][1:]))
    samples.append((end, *timeline[-1][1:]))
    # `max` gives the first of equals, as the ledger's peak is.
    return samples, max(range(len(samples)), key=lambda number: sum(samples[number][1:]))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _of(name: str) -> str:
    return "" if name == "as it is" else f", {escape(name)}"


def _bars(peaks: Mapping[str, Peak]) -> str:
    """The five lines of each peak, drawn for a laptop's and for a phone's width, of which the page shows one."""
    return (
        f'<div class="bars"><div class="wide">{svg(peaks)}</div><div class="narrow">{svg(peaks, width=340)}</div></div>'
    )


def _timeline(samples: Sequence[Sample], peak: int) -> str:
    """A stacked area over the five lines, the peak marked; the legend says the bytes at the peak, or under the hand."""
    seconds = samples[-1][0] or 1.0
    highest = sum(samples[peak][1:]) or 1
    top = 1.08 * highest
    floors = [0.0] * len(samples)
    areas = []
    for number, line in enumerate(LINES, start=1):
        ceilings = [floor + sample[number] for floor, sample in zip(floors, samples, strict=True)]
        areas.append(f'<path class="{line}" d="{_area(samples, floors, ceilings, seconds, top)}"/>')
        floors = ceilings
    ticks = "".join(
        f'<span class="tick" style="top:{100 - 100 * nbytes / top:.1f}%">{format_bytes(round(nbytes))}</span>'
        for nbytes in (0, highest / 2, highest)
    )
    at = 100 * samples[peak][0] / seconds
    legend = "".join(
        f'<span><i class="{line}"></i>{line}<b id="at-{line}">{format_bytes(int(samples[peak][number]))}</b></span>'
        for number, line in enumerate(LINES, start=1)
    )
    return f"""<div class="legend">{legend}<span>total<b id="at-total">{format_bytes(int(highest))}</b></span></div>
<div class="chart" id="chart">{ticks}
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="Memory over the step, by line">\
{"".join(areas)}</svg>
<div class="rule{" late" if at > 50 else ""}" style="left:{at:.2f}%"><span>peak</span></div>
<div class="rule" id="hover"><span></span></div>
</div>
<p class="ends muted"><small>0 ms</small><small>{1000 * seconds:.0f} ms</small></p>"""


def _area(
    samples: Sequence[Sample], floors: Sequence[float], ceilings: Sequence[float], seconds: float, top: float
) -> str:
    """The outline between two curves that are constant from each sample to the next, in a box of 1000 x 1000."""
    starts = [1000 * sample[0] / seconds for sample in samples]
    edges = [(start, end) for start, end in zip(starts, [*starts[1:], 1000.0], strict=True)]

    def curve(heights: Sequence[float]) -> list[str]:
        return [
            f"{x:.1f} {1000 - 1000 * height / top:.1f}"
            for edge, height in zip(edges, heights, strict=True)
            for x in edge
        ]

    return "M" + "L".join([*curve(ceilings), *curve(floors)[::-1]]) + "Z"


def _data(samples: Sequence[Sample], peak: int) -> str:
    content = {"lines": LINES, "seconds": samples[-1][0] or 1.0, "peak": peak, "samples": samples}
    return json.dumps(content, separators=(",", ":")).replace("</", "<\\/")


def _tree(modules: Mapping[str, Peak]) -> str:
    """The modules as a tree that opens and closes; each with what it and its children hold."""
    own = {name: lines.total for name, lines in modules.items()}
    totals: dict[str, int] = {}
    children: dict[str, list[str]] = {}
    for name, nbytes in own.items():
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            totals[path] = totals.get(path, 0) + nbytes
            if depth and path not in children.setdefault(".".join(parts[: depth - 1]), []):
                children[".".join(parts[: depth - 1])].append(path)
    whole = totals.get("", 0) or 1

    def row(name: str, nbytes: int) -> str:
        return (
            f'<span class="row"><span class="name">{escape(name)}</span><span class="track">'
            f'<span class="bar" style="width:{100 * nbytes / whole:.1f}%"></span></span>'
            f'<span class="size">{format_bytes(nbytes)}</span></span>'
        )

    def branch(path: str, depth: int) -> str:
        label = path.rpartition(".")[2]
        if path not in children:
            return f'<div class="leaf">{row(label, totals[path])}</div>'
        inside = sorted(children[path], key=lambda child: -totals[child])
        parts = [branch(child, depth + 1) for child in inside]
        if own.get(path):
            parts.append(f'<div class="leaf">{row("(itself)", own[path])}</div>')
        opened = " open" if depth < 2 and len(inside) <= 12 else ""
        return f"<details{opened}><summary>{row(label, totals[path])}</summary>{''.join(parts)}</details>"

    top = sorted(children.get("", []), key=lambda child: -totals[child])
    parts = [branch(child, 0) for child in top]
    if own.get(""):
        parts.append(f'<div class="leaf">{row("(outside of modules)", own[""])}</div>')
    return f'<div class="tree">{"".join(parts)}</div>'


def _tensors(tensors: Sequence[LiveTensor]) -> str:
    rows = "".join(
        f'<tr><td data-label="tensor">{escape(tensor.title)}</td>'
        f'<td data-label="memory">{format_bytes(tensor.nbytes)}</td><td data-label="line">{tensor.line}</td>'
        f'<td data-label="module">{escape(tensor.module) or "-"}</td>'
        f'<td data-label="made at"><code>{escape(tensor.source) or "-"}</code></td></tr>'
        for tensor in tensors
    )
    head = "<tr><th>tensor</th><th>memory</th><th>line</th><th>module</th><th>made at</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _advice(found: Profile) -> str:
    if found.no_advice:
        return f"<section><h2>What would take less</h2><p>{escape(found.no_advice)}</p></section>"
    if not found.advice:
        return ""
    items = "".join(
        f"<li><code>{escape(advice.change)}</code>: {format_bytes(advice.after.total)} in place of "
        f"{format_bytes(advice.before.total)}</li>"
        for advice in found.advice
    )
    peaks = {"as it is": found.advice[0].before, **{advice.change: advice.after for advice in found.advice}}
    bars = _bars(peaks)
    return f"<section><h2>What would take less, by an estimate</h2><ul>{items}</ul>{bars}</section>"
