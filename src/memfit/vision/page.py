"""``report.html`` of a fine-tuning: the outcome, the memory, and which classes and images are told wrong."""

from __future__ import annotations

from html import escape

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
from memfit.vision.report import ClassAccuracy, FinetuneReport


def before_in_words(report: FinetuneReport) -> str:
    """The accuracy before training: ``91.2 %``, or why there was none."""
    return "new classes" if report.accuracy_before is None else percent(report.accuracy_before)


def change_in_words(report: FinetuneReport) -> str:
    """What became of the errors: ``44 % fewer errors``."""
    if report.accuracy_before is None:
        return f"{len(report.per_class)} classes that the weights did not know"
    return change_of_errors(1 - report.accuracy_before, 1 - report.accuracy_after)


def render(report: FinetuneReport) -> str:
    """The whole page as text."""
    before, after = before_in_words(report), percent(report.accuracy_after)
    hero = outcome(
        "Accuracy",
        before,
        after,
        report.steps,
        better=report.accuracy_before is None or report.accuracy_after >= report.accuracy_before,
        change=change_in_words(report),
        basis=f"on {count(report.held_out, 'held-out image')}, which were never trained on",
    )
    body = f"""{hero}
<div class="pair">
<section><h2>Loss</h2>{loss_chart(report.losses)}</section>
<section><h2>Accuracy while learning</h2>\
{rate_chart(report.accuracy_curve, "Accuracy on held-out images by step")}</section>
</div>
{memory_section(report)}
{settings_section(report)}
<section>
<h2>Class by class</h2>
<table>
<thead><tr><th>Class</th><th>Held-out images</th><th>Right before</th><th>Right after</th></tr></thead>
<tbody>
{_class_rows(report)}
</tbody>
</table>
</section>
{_mistakes(report)}"""
    return page(
        title=f"Fine-tuned classifier: accuracy {before} to {after}",
        heading="Fine-tuned classifier",
        about=f"{report.model}, {report.data}",
        body=body,
        versions=report.versions,
    )


def _class_rows(report: FinetuneReport) -> str:
    return "\n".join(
        f'<tr><td data-label="class"><span>{escape(each.name)}</span></td>'
        f'<td data-label="images"><span>{each.images}</span></td>'
        f'<td data-label="before"><span>{_share(each, each.before)}</span></td>'
        f'<td data-label="after"><span>{_share(each, each.after)}</span></td></tr>'
        for each in report.per_class
    )


def _share(of: ClassAccuracy, right: int | None) -> str:
    return "" if right is None or of.images == 0 else percent(right / of.images)


def _mistakes(report: FinetuneReport) -> str:
    wrong = report.held_out - sum(each.after for each in report.per_class)
    if not report.mistakes:
        return ""
    shown = "all" if wrong == len(report.mistakes) else f"the first {len(report.mistakes)}"
    rows = "\n".join(
        f'<tr><td data-label="image"><span>{escape(each.name)}</span></td>'
        f'<td data-label="is"><span>{escape(each.label)}</span></td>'
        f'<td data-label="before"><span>{escape(each.before or "")}</span></td>'
        f'<td data-label="after"><span>{escape(each.after)}</span></td></tr>'
        for each in report.mistakes
    )
    return f"""<section>
<h2>Taken for another class</h2>
<p class="muted">{count(wrong, "held-out image")}, {shown} here.</p>
<table>
<thead><tr><th>Image</th><th>Is</th><th>Taken for, before</th><th>Taken for, after</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</section>"""
