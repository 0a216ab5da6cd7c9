"""What the pages of all tasks' reports have in common: ``report.html`` stands alone, without scripts or network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from memfit.charts import line_chart
from memfit.ledger.report import format_bytes
from memfit.page_style import STYLE
from memfit.run.report import JSON, TaskReport

_LINES = {
    "weights": "the parameters",
    "gradients": "alive from backward to step",
    "optimizer": "what the optimizer remembers",
    "activations": "what forward keeps for backward",
    "workspace": "temporaries inside operators",
}


def page(*, title: str, heading: str, about: str, body: str, versions: Mapping[str, str]) -> str:
    """The whole page as text, for any width and for light and dark.

    Args:
        title: of the browser's window.
        heading: at the top.
        about: a sentence below it.
        body: HTML, in which everything from outside is escaped already; all other arguments are escaped here.
        versions: for the foot.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(heading)}</h1>
<p class="muted">{escape(about)}</p>
</header>
{body}
<footer class="muted">{escape(", ".join(f"{name} {value}" for name, value in versions.items()))}</footer>
</main>
</body>
</html>
"""


def outcome(heading: str, before: str, after: str, steps: int, *, better: bool, change: str, basis: str) -> str:
    """The section that one looks at first: a rate before and after.

    Args:
        heading: what the rate is.
        before: the rate before training, as text; also a word where there is none.
        after: the rate after training.
        steps: of the training.
        better: whether it has become no worse.
        change: what became of it, in words.
        basis: what it was measured on.
    """
    return f"""<section class="hero">
<h2>{escape(heading)}</h2>
<p class="rates"><span class="before"><b>{escape(before)}</b><small>before</small></span>
<span class="arrow" aria-hidden="true">→</span>
<span class="after"><b>{escape(after)}</b><small>after {steps} steps</small></span></p>
<p><strong class="{"better" if better else "worse"}">{escape(change)}</strong>
<span class="muted">{escape(basis)}</span></p>
</section>"""


def loss_chart(losses: Sequence[float]) -> str:
    """The losses of all steps as a line."""
    return line_chart(list(enumerate(losses, start=1)), title="Loss by step", x_label="step", format_y="{:.2g}".format)


def rate_chart(curve: Sequence[tuple[float, float]], title: str) -> str:
    """The few measurements of a rate, (steps done, share), as a line with a dot for each."""
    return line_chart(
        curve,
        title=title,
        x_label="step",
        format_y=lambda rate: f"{100 * rate:.3g} %",
        format_dot=lambda rate: f"{100 * rate:.3g}",
    )


def memory_section(report: TaskReport) -> str:
    """The five lines as bars against their sum, and the two totals that a saving is quoted from."""
    total = max(report.peak_bytes["total"], 1)
    rows = []
    for line, meaning in _LINES.items():
        size = report.peak_bytes[line]
        rows.append(
            f'<div class="line"><span class="name"><i class="{line}"></i>{line}<small>{meaning}</small></span>'
            f'<span class="track"><span class="{line}" style="width:{100 * size / total:.2f}%"></span></span>'
            f'<span class="size">{format_bytes(size)}</span></div>'
        )
    stack = "".join(
        f'<span class="{line}" style="width:{100 * report.peak_bytes[line] / total:.2f}%"></span>' for line in _LINES
    )
    return (
        "<section>\n<h2>Memory at the peak of a training step</h2>\n"
        f'<p><strong class="big">{format_bytes(report.peak_bytes["total"])}</strong> '
        f'<span class="muted">by the ledger; the process grew by {format_bytes(report.process_peak_bytes)} '
        "while it trained, by the operating system</span></p>"
        f'<div class="stack" aria-hidden="true">{stack}</div><div class="lines">{"".join(rows)}</div>\n</section>'
    )


def settings_section(report: TaskReport) -> str:
    """All settings of the run."""
    # A short hash is enough to tell two models or two sets of data apart.
    shown = {name: str(value)[:12] if name.endswith("_sha256") else value for name, value in report.config.items()}
    values: dict[str, JSON] = {**shown, "seconds_per_step": round(report.seconds_per_step, 4)}
    rows = "".join(_setting(name, value) for name, value in values.items())
    return f'<section>\n<h2>Settings</h2>\n<dl class="settings">{rows}</dl>\n</section>'


def percent(rate: float) -> str:
    """A rate for people: ``17.9 %``."""
    return f"{100 * rate:.1f} %"


def change_of_errors(before: float, after: float) -> str:
    """What became of a rate of errors, in words: ``44 % fewer errors``."""
    if before == after:
        return "no change"
    if before == 0:
        return "no errors before, some now"
    share = 100 * (after - before) / before
    return f"{abs(share):.0f} % {'fewer' if share < 0 else 'more'} errors"


def count(number: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _setting(name: str, value: JSON) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    shown = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(shown)}</dd></div>"
