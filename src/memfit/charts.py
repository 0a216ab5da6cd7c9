"""Charts as inline SVG, for a page that stands alone: no script, no network; colours come from its style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

# One unit is one CSS pixel on a phone; on a laptop the chart is drawn about a third larger.
_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34
_NAMES, _PITCH, _LONGEST = 138, 20, 22

DOT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#8a8f98")
"""Of the series of :func:`dot_rows`; told apart by those who see few colours, on light and on dark."""


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


def dot_rows(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    series: Sequence[str],
    title: str,
    format_x: Callable[[float], str],
    mark: float,
    logarithmic: bool = False,
) -> str:
    """Draw a row of dots for each of many things, one dot for each series, over one axis.

    Args:
        rows: what each is called, and its values in the order of ``series``; None where there is no value.
        series: what the dots of each colour are; after :data:`DOT_COLOURS` the colours begin anew.
        title: what the axis is; it stands above.
        format_x: writes a value.
        mark: a value at which a line is drawn from top to bottom.
        logarithmic: the axis is; its values are above 0. Otherwise it is from 0 to 1, and what lies beyond is drawn at
            its ends.

    Returns:
        An ``<svg>`` element as of :func:`line_chart`; in the pointer's hand each dot says its value.
    """
    top = 52 + 16 * ((len(series) - 1) // 3)
    height = top + _PITCH * len(rows) + 26
    values = [value for _, row in rows for value in row if value is not None]
    ticks = _decades([*values, mark]) if logarithmic else [0, 0.25, 0.5, 0.75, 1.0]

    def across(value: float) -> float:
        low, high, at = (math.log(each) if logarithmic else each for each in (ticks[0], ticks[-1], value))
        return _NAMES + (_WIDTH - _NAMES - 18) * min(1.0, max(0.0, (at - low) / (high - low)))

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img"><title>{escape(title)}</title>']
    parts.append(f'<text class="value" x="0" y="12">{escape(title)}</text>')
    for number, name in enumerate(series):
        x, y = (number % 3) * 120 + 6, 28 + 16 * (number // 3)
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{dot_colour(number)}"/>')
        parts.append(f'<text x="{x + 9}" y="{y + 4}">{escape(name)}</text>')
    floor = height - 22
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {top - 8}V{floor}"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{floor + 15}" text-anchor="middle">{format_x(tick)}</text>')
    parts.append(f'<path class="mark" d="M{across(mark):.1f} {top - 8}V{floor}"/>')
    for number, (name, row) in enumerate(rows):
        y = top + _PITCH * number + 6
        shown = name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]
        parts.append(f'<text x="{_NAMES - 10}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        for place, (of, value) in enumerate(zip(series, row, strict=True)):
            if value is not None:
                parts.append(
                    f'<circle cx="{across(value):.1f}" cy="{y}" r="4.5" fill="{dot_colour(place)}" fill-opacity="0.85">'
                    f"<title>{escape(name)}, {escape(of)}: {format_x(value)}</title></circle>"
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


def dot_colour(place: int) -> str:
    """The colour of a series by its place."""
    return DOT_COLOURS[place % len(DOT_COLOURS)]


def _decades(values: Sequence[float]) -> list[float]:
    """Round numbers, 1, 2 and 5 times powers of ten, from at most the smallest to at least the largest."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= min(values))
    last = min((index for index, step in enumerate(steps) if step >= max(values)), default=len(steps) - 1)
    chosen = steps[first : max(last, first + 1) + 1]
    if len(chosen) > 8:
        chosen = [step for step in steps if step == 10.0 ** round(math.log10(step))]
    return chosen
