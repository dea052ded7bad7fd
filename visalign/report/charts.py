"""Line charts as inline SVG. Colours are CSS variables of the page, so that one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26


@dataclass(frozen=True)
class Line:
    """One curve; ``low`` and ``high`` draw a band, ``points`` marks each value (evaluations are few, iterations are many)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points: bool = False


def line_chart(lines: Sequence[Line], x_label: str = "iteration") -> str:
    """SVG of up to six lines over a common axis; non-finite values leave gaps. Empty when there is nothing to draw."""
    lines = [line for line in lines if any(math.isfinite(y) for y in line.y)]
    if not lines:
        return ""
    values = [value for line in lines for series in (line.y, line.low or (), line.high or ()) for value in series if math.isfinite(value)]
    y_ticks = ticks(min(values), max(values))
    xs = [x for line in lines for x in line.x]
    x_ticks = [tick for tick in ticks(min(xs), max(xs), whole=True) if min(xs) <= tick <= max(xs)]
    x_low, x_high, y_low, y_high = min(xs), max(max(xs), min(xs) + 1), min([*y_ticks, *values]), max([*y_ticks, *values])

    def px(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(line.name for line in lines))}">']
    step = y_ticks[1] - y_ticks[0]
    for tick in y_ticks:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick)}" y2="{py(tick)}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{py(tick) + 3.5}" text-anchor="end">{label(tick, step)}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="tick" x="{px(tick)}" y="{HEIGHT - 9}" text-anchor="middle">{label(tick)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 9}" text-anchor="end">{escape(x_label)}</text>'
                 if not x_ticks or px(x_ticks[-1]) < WIDTH - 80 else "")
    for number, line in enumerate(lines):
        parts.append(_line(line, number, px, py))
    return "".join(parts) + "</svg>" + _legend(lines)


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers that cover [low, high]: a step of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):  # equal up to rounding
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [i * step for i in range(first, last + 1)]


def label(value: float, step: float | None = None) -> str:
    """A number as short as it can be read; a tick with as many decimals as tell it from the next, ``step`` away."""
    if value == 0:
        return "0"
    if step is not None and step < 1e-3 * abs(value) and abs(value) < 1e5:
        return f"{value:.{max(0, -math.floor(math.log10(step)))}f}"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _line(line: Line, number: int, px: object, py: object) -> str:
    assert callable(px)
    assert callable(py)
    colour = f"var(--line-{number % 6})"
    drawn = ""
    if line.low is not None and line.high is not None:
        known = [(x, low, high) for x, low, high in zip(line.x, line.low, line.high, strict=True) if math.isfinite(low + high)]
        outline = [f"{px(x)},{py(high)}" for x, _, high in known] + [f"{px(x)},{py(low)}" for x, low, _ in reversed(known)]
        drawn += f'<polygon points="{" ".join(outline)}" fill="{colour}" opacity="0.18"/>'
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            segments[-1].append((px(x), py(y)))
        elif segments[-1]:
            segments.append([])
    for segment in segments:
        if len(segment) > 1:
            drawn += (f'<polyline points="{" ".join(f"{x},{y}" for x, y in segment)}" fill="none" stroke="{colour}" stroke-width="1.8" '
                      'stroke-linejoin="round"/>')
        if line.points or len(segment) == 1:
            drawn += "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in segment)
    return drawn


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    items = (f'<span><i style="background:var(--line-{i % 6})"></i>{escape(line.name)}</span>' for i, line in enumerate(lines))
    return f'<div class="legend">{"".join(items)}</div>'
