"""Charts as inline SVG: lines with bands, bars, clouds of points.

They are a few kilobytes each, sharp at any size, and take their colours from the page's style
sheet, so that they follow it into the dark: what stands for what is a class, not a colour. Legends
are the page's, in HTML, where long names wrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 420, 250  # so small that the letters can be read on a phone
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 44  # around the area of the data
TICKS = 5

Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """x, y   of its points; those that are not finite are left out
    kind      a class of the style sheet
    band      (low, high) at each point, or none at all
    dots      whether points are marked
    """

    x: Sequence[float]
    y: Sequence[float]
    kind: str
    band: Pairs = ()
    dots: bool = True


def lines(
    alt: str,
    x_label: str,
    y_label: str,
    drawn: Sequence[Line],
    *,
    x_ticks: Sequence[int] = (),
    from_zero: bool = False,
) -> Markup:
    """A chart of lines; "" where there is nothing to draw.

    x_ticks: the only numbers on the x axis, which is logarithmic then.
    """
    drawn = [line for line in map(_finite, drawn) if len(line.x)]
    if not drawn:
        return Markup("")
    xs = [x for line in drawn for x in line.x] + list(x_ticks)
    ys = [y for line in drawn for y in (*line.y, *(end for pair in line.band for end in pair))]
    x_of = _scale(min(xs), max(xs), LEFT + 6, WIDTH - RIGHT - 6, math.log2 if x_ticks else float)
    y_ticks = ticks(0 if from_zero else min(ys), max(ys))
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_label, y_label, y_ticks, y_of)]
    inner = [t for t in ticks(min(xs), max(xs)) if min(xs) <= t <= max(xs)]
    for x in x_ticks or inner:
        parts.append(_x_tick(x_of(x), f"{x:,.10g}"))
    for line in drawn:
        at = [x_of(x) for x in line.x]
        if line.band:
            low, high = zip(*line.band, strict=True)
            if len(at) == 1:  # an area of no width: a whisker
                path = f"M{_point(at[0], y_of(low[0]))}V{y_of(high[0]):.1f}"
                parts.append(f'<path class="line {line.kind}" d="{path}"/>')
            else:
                there = [_point(x, y_of(y)) for x, y in zip(at, high, strict=True)]
                back = [_point(x, y_of(y)) for x, y in zip(at, low, strict=True)][::-1]
                path = f"M{'L'.join(there + back)}Z"
                parts.append(f'<path class="band {line.kind}" d="{path}"/>')
    for line in drawn:
        points = [_point(x_of(x), y_of(y)) for x, y in zip(line.x, line.y, strict=True)]
        parts.append(f'<path class="line {line.kind}" d="M{"L".join(points)}"/>')
        if line.dots:
            parts.append(_dots(points, line.kind))
    return _svg(alt, parts)


def bars(alt: str, x_label: str, y_label: str, heights: Sequence[tuple[str, int]]) -> Markup:
    """A histogram: (name, height) of each bar."""
    y_ticks = [t for t in ticks(0, max(height for _, height in heights)) if t == round(t)]
    y_of = _scale(0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_label, y_label, y_ticks, y_of)]
    step = (WIDTH - LEFT - RIGHT) / len(heights)
    for i, (name, height) in enumerate(heights):
        left, top = LEFT + i * step, y_of(height)
        parts.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{step - 2:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"/>'
        )
        if step * (i % 2 + 1) > 26 or i % math.ceil(30 / step) == 0:
            parts.append(_x_tick(left + step / 2, name))
    return _svg(alt, parts)


def cloud(alt: str, groups: Sequence[tuple[str, np.ndarray]]) -> Markup:
    """Points: (class of the style sheet, float [n, 2]) of each group; the last is on top."""
    every = np.concatenate([points for _, points in groups])
    low, high = every.min(0), every.max(0)
    side = max(float((high - low).max()), 1e-12)  # one scale for both axes
    height = max(float((high - low)[1]) / side * (WIDTH - 12), 60) + 12
    parts = []
    for kind, points in groups:
        at = (points - low) / side * (WIDTH - 12) + 6
        parts.append(_dots([_point(x, height - y) for x, y in at.tolist()], kind))
    return _svg(alt, parts, height)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about `TICKS` of them, from at most low to at least high."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _finite(line: Line) -> Line:
    kept = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y)).tolist()
    band = [line.band[i] for i in kept] if line.band else ()
    return Line([line.x[i] for i in kept], [line.y[i] for i in kept], line.kind, band, line.dots)


def _scale(
    low: float, high: float, start: float, end: float, of: Callable[[float], float] = float
) -> Callable[[float], float]:
    """From data to the drawing; of a single value to its middle."""
    first, last = of(low), of(high)
    if first == last:
        return lambda value: (start + end) / 2
    return lambda value: start + (of(value) - first) / (last - first) * (end - start)


def _axes(
    x_label: str, y_label: str, y_ticks: Sequence[float], y_of: Callable[[float], float]
) -> str:
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            middle, HEIGHT - 6, x_label
        )
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        Markup('<text transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>')
        .format(middle, y_label)
    )  # fmt: skip
    return "".join(parts)


def _short(number: float) -> str:
    """At most five letters or so."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1000 if unit == 'k' else size):.4g}{unit}"
    return f"{number:.4g}"


def _x_tick(x: float, name: str) -> str:
    place = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}"'
    return f'<text {place} text-anchor="middle">{Markup.escape(name)}</text>'


def _point(x: float, y: float) -> str:
    return f"{x:.1f} {y:.1f}"


def _dots(points: Sequence[str], kind: str) -> str:
    """Lines of no length with round ends, which take a fifth of the bytes of circles."""
    return f'<path class="dots {kind}" d="{"".join(f"M{point}h0" for point in points)}"/>'


def _svg(alt: str, parts: Sequence[str], height: float = HEIGHT) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(
        WIDTH, height, alt
    )
    return head + Markup("".join(parts) + "</svg>")
