"""``report.html``: one page that stands alone, without scripts or network, for any width and for light and dark."""

from __future__ import annotations

from html import escape

from memfit.errors import require
from memfit.ledger.report import format_bytes
from memfit.page_style import STYLE
from memfit.speech.charts import line_chart
from memfit.speech.report import JSON, PersonalizeReport

_LINES = {
    "weights": "the parameters",
    "gradients": "alive from backward to step",
    "optimizer": "what the optimizer remembers",
    "activations": "what forward keeps for backward",
    "workspace": "temporaries inside operators",
}


def percent(rate: float) -> str:
    """A word error rate for people: ``17.9 %``."""
    return f"{100 * rate:.1f} %"


def change(before: float, after: float) -> str:
    """What became of the errors, in words: ``44 % fewer errors``."""
    if before == after:
        return "no change"
    if before == 0:
        return "no errors before, some now"
    share = 100 * (after - before) / before
    return f"{abs(share):.0f} % {'fewer' if share < 0 else 'more'} errors"


def render(report: PersonalizeReport) -> str:
    """The whole page as text.

    Args:
        report: what to show.

    Raises:
        MissingExtraError: ``jiwer``, which aligns the words, is not installed.
    """
    words = sum(len(heard.reference.split()) for heard in report.heard)
    # Every value that comes from outside is escaped where it enters the text.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Personalized recognizer: word error rate {percent(report.wer_before)} to {percent(report.wer_after)}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>Personalized recognizer</h1>
<p class="muted">{escape(report.recordings)}</p>
</header>
<section class="hero">
<h2>Word error rate</h2>
<p class="rates"><span class="before"><b>{percent(report.wer_before)}</b><small>before</small></span>
<span class="arrow" aria-hidden="true">→</span>
<span class="after"><b>{percent(report.wer_after)}</b><small>after {report.steps} steps</small></span></p>
<p><strong class="{"worse" if report.wer_after > report.wer_before else "better"}">\
{change(report.wer_before, report.wer_after)}</strong>
<span class="muted">on {_count(len(report.heard), "held-out utterance")} of {_count(words, "word")}, \
which were never trained on</span></p>
</section>
<div class="pair">
<section><h2>Loss</h2>{_loss_chart(report)}</section>
<section><h2>Word error rate while learning</h2>{_wer_chart(report)}</section>
</div>
<section>
<h2>Memory at the peak of a training step</h2>
{_memory(report)}
</section>
<section>
<h2>Settings</h2>
<dl class="settings">{"".join(_setting(name, value) for name, value in _settings(report).items())}</dl>
</section>
<section>
<h2>What was heard</h2>
<p class="muted legend">Marked words differ from what was said: <mark class="wrong">another word</mark>
<mark class="extra">an invented word</mark> <mark class="missed">a missed word</mark></p>
<table>
<thead><tr><th>Said</th><th>Heard before</th><th>Heard after</th></tr></thead>
<tbody>
{_rows(report)}
</tbody>
</table>
</section>
<footer class="muted">{escape(", ".join(f"{name} {value}" for name, value in report.versions.items()))}</footer>
</main>
</body>
</html>
"""


def _loss_chart(report: PersonalizeReport) -> str:
    points = [(step, loss) for step, loss in enumerate(report.losses, start=1)]
    return line_chart(points, title="Loss by step", x_label="step", format_y="{:.2g}".format)


def _wer_chart(report: PersonalizeReport) -> str:
    return line_chart(
        report.wer_curve,
        title="Word error rate on the held-out utterances by step",
        x_label="step",
        format_y=lambda rate: f"{100 * rate:.3g} %",
        format_dot=lambda rate: f"{100 * rate:.3g}",
    )


def _memory(report: PersonalizeReport) -> str:
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
        f'<p><strong class="big">{format_bytes(report.peak_bytes["total"])}</strong> '
        f'<span class="muted">by the ledger; the process grew by {format_bytes(report.process_peak_bytes)} '
        "while it trained, by the operating system</span></p>"
        f'<div class="stack" aria-hidden="true">{stack}</div><div class="lines">{"".join(rows)}</div>'
    )


def _settings(report: PersonalizeReport) -> dict[str, JSON]:
    # A short hash is enough to tell two bases or two sets of recordings apart.
    shown = {name: str(value)[:12] if name.endswith("_sha256") else value for name, value in report.config.items()}
    return {**shown, "seconds_per_step": round(report.seconds_per_step, 4)}


def _setting(name: str, value: JSON) -> str:
    shown = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(shown)}</dd></div>"


def _rows(report: PersonalizeReport) -> str:
    return "\n".join(
        f'<tr><td data-label="said" title="{escape(heard.name)}"><span>{escape(heard.reference)}</span></td>'
        f'<td data-label="before"><span>{_marked(heard.reference, heard.before)}</span></td>'
        f'<td data-label="after"><span>{_marked(heard.reference, heard.after)}</span></td></tr>'
        for heard in report.heard
    )


def _marked(reference: str, hypothesis: str) -> str:
    """The hypothesis with its errors marked; a missed word stands where it should have been heard."""
    jiwer = require("jiwer", extra="speech")
    said, heard = reference.split(), hypothesis.split()
    if not said:
        return " ".join(f'<mark class="extra">{escape(word)}</mark>' for word in heard)
    parts: list[str] = []
    for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
        ours = [escape(word) for word in heard[chunk.hyp_start_idx : chunk.hyp_end_idx]]
        theirs = [escape(word) for word in said[chunk.ref_start_idx : chunk.ref_end_idx]]
        if chunk.type == "equal":
            parts += ours
        elif chunk.type == "insert":
            parts += [f'<mark class="extra">{word}</mark>' for word in ours]
        elif chunk.type == "delete":
            parts += [f'<mark class="missed">{word}</mark>' for word in theirs]
        else:
            parts += [
                f'<mark class="wrong" title="for {meant}">{word}</mark>'
                for word, meant in zip(ours, theirs, strict=True)
            ]
    return " ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
