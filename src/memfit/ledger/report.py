"""The ledger's figures for people and for programs: text, table, picture, plain values.

`format_bytes` is the one way in which memfit writes bytes for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from memfit.ledger.account import LINES, START, Instant, Peak

if TYPE_CHECKING:
    from rich.table import Table

    from memfit.ledger.book import Ledger

_UNITS = ("KiB", "MiB", "GiB")

# Five hues that keep apart in light and dark and for colour-blind eyes (after Okabe and Ito), each with a text colour
# that reads on it. A page may set its own through the variables --memfit-weights and so on.
COLOURS = {
    "weights": ("#0072b2", "#ffffff"),
    "gradients": ("#e69f00", "#1a1a1a"),
    "optimizer": ("#009e73", "#1a1a1a"),
    "activations": ("#cc79a7", "#1a1a1a"),
    "workspace": ("#8a8f98", "#1a1a1a"),
}


def format_bytes(n: int) -> str:
    """Bytes for people: ``"0 B"``, ``"12.3 MiB"``; GiB is the largest unit.

    Args:
        n: number of bytes, which may be negative for a difference.
    """
    if abs(n) < 1024:
        return f"{n} B"
    value = float(n)
    for unit in _UNITS:
        value /= 1024
        # 1023.95 KiB would be written as 1024.0 KiB.
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{value:.1f} {unit}"


def describe(instant: Instant) -> str:
    """Where the peak was, in words: ``"in backward, in encoder.layers.0 (aten.mm), after 0.12 s"``."""
    if instant.phase == START:
        return "at the start of the region"
    module = f", in {instant.module}" if instant.module else ""
    operator = f" ({instant.operator})" if instant.operator else ""
    return f"in {instant.phase}{module}{operator}, after {instant.seconds:.2f} s"


def _rows(peak: Peak) -> list[tuple[str, str, str]]:
    """Line, bytes and share of the total, as text; the total comes last."""
    total = peak.total
    rows = [(name, value, value / total if total else 0.0) for name, value in peak.to_dict().items() if name in LINES]
    return [(name, format_bytes(value), f"{share:.1%}") for name, value, share in [*rows, ("total", total, 1.0)]]


def text(peak: Peak, instant: Instant | None = None) -> str:
    """A plain-text table of the five lines, their shares, and where the peak was."""
    rows = _rows(peak)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{name:<{widths[0]}}  {size:>{widths[1]}}  {share:>{widths[2]}}" for name, size, share in rows]
    lines.insert(-1, "-" * len(lines[0]))
    if instant is not None:
        lines.append(f"peak {describe(instant)}")
    return "\n".join(lines)


def table(measured: Ledger | Peak, *, title: str | None = None, modules: int = 0) -> Table:
    """A table of the five lines for the terminal.

    Args:
        measured: a ledger, or its peak.
        title: shown above the table.
        modules: with a ledger, how many of the largest modules to list below the total.

    Returns:
        A ``rich`` renderable.
    """
    from rich import box
    from rich.table import Table

    peak = measured if isinstance(measured, Peak) else measured.peak
    caption = None if isinstance(measured, Peak) else f"peak {describe(measured.instant)}"
    shown = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    shown.add_column("line")
    shown.add_column("memory", justify="right")
    shown.add_column("share", justify="right")
    rows = _rows(peak)
    for row in rows[:-1]:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*rows[-1], style="bold")
    if not isinstance(measured, Peak) and modules:
        shown.add_section()
        for name, lines in list(measured.modules.items())[:modules]:
            share = f"{lines.total / peak.total:.1%}" if peak.total else "0.0%"
            shown.add_row(name or "(outside of modules)", format_bytes(lines.total), share)
    return shown


def to_dict(measured: Ledger | Peak) -> dict[str, object]:
    """Plain values for JSON: of a peak its lines and total, of a ledger also the peak's instant and modules."""
    return {**measured.to_dict()}


def svg(peaks: Mapping[str, Peak], *, title: str = "Memory at the peak, by line", width: int = 720) -> str:
    """A picture of the five lines: one horizontal stacked bar per peak, on one scale, with a legend.

    Args:
        peaks: what to call each bar, in the order from top to bottom.
        title: the picture's name for those who cannot see it.
        width: in CSS pixels, at least 320; it is drawn smaller where its column is.

    Returns:
        One ``<svg>`` element to put into a page: no scripts and no external parts. It takes the text colour of the
        page (``currentColor``) and scales with its column; the colours are the variables ``--memfit-weights``,
        ``--memfit-gradients``, ``--memfit-optimizer``, ``--memfit-activations`` and ``--memfit-workspace`` where the
        page sets them.
    """
    left, bar, pitch = 8, 30, 66
    legend, top = _legend(left, width)
    widest = max((peak.total for peak in peaks.values()), default=0)
    # The total stands to the right of its bar.
    room = width - left - 100
    height = top + pitch * len(peaks) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="100%" role="img" '
        f'aria-label="{escape(title)}" style="max-width:{width}px;height:auto;font:13px system-ui,sans-serif">',
        f"<title>{escape(title)}</title>",
    ]
    parts += legend
    for number, (name, peak) in enumerate(peaks.items()):
        y = top + number * pitch
        parts.append(f'<text x="{left}" y="{y + 14}" fill="currentColor" font-weight="600">{escape(name)}</text>')
        x = float(left)
        for line in LINES:
            value = getattr(peak, line)
            length = room * value / widest if widest else 0.0
            if not value:
                continue
            words = f"{line}: {format_bytes(value)}"
            parts.append(
                f'<g><title>{escape(name)}, {words}</title><rect x="{x:.1f}" y="{y + 21}" width="{max(length, 1):.1f}" '
                f'height="{bar}" style="fill:{_fill(line)}"/>'
            )
            label = format_bytes(value)
            if length > 7.5 * len(label) + 8:
                parts.append(
                    f'<text x="{x + length / 2:.1f}" y="{y + 41}" text-anchor="middle" '
                    f'style="fill:var(--memfit-on-{line},{COLOURS[line][1]})">{label}</text>'
                )
            parts.append("</g>")
            x += length
        total = format_bytes(peak.total)
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 41}" fill="currentColor" font-weight="600">{total}</text>')
    parts.append("</svg>")
    return "".join(parts)


def _legend(left: int, width: int) -> tuple[list[str], int]:
    """The parts of the legend, in as many rows as it takes, and its height."""
    parts: list[str] = []
    at, row = left, 0
    for line in LINES:
        length = 40 + 8 * len(line)
        if at + length > width and at > left:
            at, row = left, row + 1
        y = 6 + 20 * row
        parts.append(f'<rect x="{at}" y="{y}" width="12" height="12" rx="2" style="fill:{_fill(line)}"/>')
        parts.append(f'<text x="{at + 18}" y="{y + 11}" fill="currentColor">{line}</text>')
        at += length
    return parts, 34 + 20 * row


def _fill(line: str) -> str:
    return f"var(--memfit-{line},{COLOURS[line][0]})"
