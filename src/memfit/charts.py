"""Line charts as inline SVG, for a page that stands alone: no script, no network; colours come from its style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

# One unit is one CSS pixel on a phone; on a laptop the chart is drawn about a third larger.
_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    x_label: str,
    format_y: Callable[[float], str] = "{:g}".format,
    format_dot: Callable[[float], str] | None = None,
) -> str:
    """Draw one line over axes that begin at zero.

    Args:
        points: (x, y) in the order of x, none negative; points whose y is not finite are left out.
        title: what the line is; read out by screen readers and shown when the pointer rests on the chart.
        x_label: the unit of x, below the axis.
        format_y: writes a value of the y axis.
        format_dot: marks each point and writes its value beside it, for the few points of a measured curve; None for
            a plain line.

    Returns:
        An ``<svg>`` element whose classes (``grid``, ``line``, ``dot``, ``value``, ``tick``) the page gives colours.
    """
    shown = [(x, y) for x, y in points if math.isfinite(y)]
    x_ticks = _ticks(max((x for x, _ in shown), default=1.0), whole=True)
    y_ticks = _ticks(max((y for _, y in shown), default=1.0) * (1.12 if format_dot else 1.0))

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / x_ticks[-1]

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y / y_ticks[-1]

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {down(y):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{escape(format_y(y))}</text>'
        )
    for x in x_ticks:
        parts.append(f'<text class="tick" x="{across(x):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{x:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    if shown:
        path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in shown)
        parts.append(f'<path class="line" d="M{path}"/>')
    if format_dot is None:
        return "".join([*parts, "</svg>"])
    for x, y in shown:
        # A value at the edge would be cut off or lie on the axis: write it on the inner side.
        anchor = "start" if x == shown[0][0] else "end" if x == shown[-1][0] and len(shown) > 1 else "middle"
        parts.append(f'<circle class="dot" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.5"/>')
        parts.append(
            f'<text class="value" x="{across(x) + (5 if anchor == "start" else 0):.1f}" y="{down(y) - 8:.1f}" '
            f'text-anchor="{anchor}">{escape(format_dot(y))}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _ticks(largest: float, whole: bool = False) -> list[float]:
    """Three to six round numbers from 0 to at least the largest value."""
    largest = largest if largest > 0 else 1.0
    size = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(factor * size for factor in (1, 2, 5, 10) if largest / (factor * size) <= 5)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    return [i * step for i in range(max(1, math.ceil(largest / step - 1e-9)) + 1)]
