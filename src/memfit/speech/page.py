"""``report.html`` of a personalization: the outcome, the memory, and what was heard with the errors marked."""

from __future__ import annotations

from html import escape

from memfit.errors import require
from memfit.report_page import (
    change_of_errors,
    count,
    loss_chart,
    memory_section,
    outcome,
    page,
    percent,
    rate_chart,
    settings_section,
)
from memfit.speech.report import PersonalizeReport


def render(report: PersonalizeReport) -> str:
    """The whole page as text.

    Args:
        report: what to show.

    Raises:
        MissingExtraError: ``jiwer``, which aligns the words, is not installed.
    """
    words = sum(len(heard.reference.split()) for heard in report.heard)
    before, after = percent(report.wer_before), percent(report.wer_after)
    hero = outcome(
        "Word error rate",
        before,
        after,
        report.steps,
        better=report.wer_after <= report.wer_before,
        change=change_of_errors(report.wer_before, report.wer_after),
        basis=f"on {count(len(report.heard), 'held-out utterance')} of {count(words, 'word')}, "
        "which were never trained on",
    )
    body = f"""{hero}
<div class="pair">
<section><h2>Loss</h2>{loss_chart(report.losses)}</section>
<section><h2>Word error rate while learning</h2>\
{rate_chart(report.wer_curve, "Word error rate on the held-out utterances by step")}</section>
</div>
{memory_section(report)}
{settings_section(report)}
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
</section>"""
    return page(
        title=f"Personalized recognizer: word error rate {before} to {after}",
        heading="Personalized recognizer",
        about=report.recordings,
        body=body,
        versions=report.versions,
    )


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
