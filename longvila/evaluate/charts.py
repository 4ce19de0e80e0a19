"""Charts as inline SVG: they take the page's own type and colours, and need no files beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

HEAT = ((240, 73, 110), (235, 184, 57), (12, 215, 159))
"""Pink, gold, green: 0, 1/2 and 1 in the heat maps of LongVA and LongVILA."""


def heat_colour(share: float) -> str:
    """CSS colour of a share between 0 and 1."""
    position = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    index = min(int(position), len(HEAT) - 2)
    mix = position - index
    red, green, blue = (round(a + (b - a) * mix) for a, b in zip(HEAT[index], HEAT[index + 1], strict=True))
    return f"rgb({red},{green},{blue})"


def loss_curve(points: Sequence[tuple[int, float]], title: str) -> Markup:
    """A line of loss over steps, axes labelled at round numbers."""
    width, height, left, bottom, top = 320, 190, 38, 26, 10
    steps, losses = [point[0] for point in points], [point[1] for point in points]
    low, high, ticks = _scale(min(losses), max(losses))
    span = max(steps[-1] - steps[0], 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (step - steps[0]) / span * (width - left - 8)
        return x, top + (high - loss) / (high - low) * (height - top - bottom)

    parts = []
    for tick in ticks:
        y = at(steps[0], tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step, anchor in ((steps[0], "start"), (steps[-1], "end")):
        x = at(step, low)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">step {step}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    parts.append(f'<polyline class="line" points="{line}"/>')
    return _svg(width, height, f"Loss of {title}, from {losses[0]:.3f} to {losses[-1]:.3f}", parts)


def grouped_bars(groups: Mapping[str, Mapping[str, float]], series: Sequence[str], chance: float) -> Markup:
    """Vertical bars of shares (0 to 1): a group for each key, a bar for each of `series`, and a line at `chance`."""
    width, height, left, bottom, top = 640, 250, 40, 30, 20
    room = (width - left - 8) / max(len(groups), 1)
    bar = min(44.0, room * 0.8 / len(series))

    def level(share: float) -> float:
        return top + (1 - share) * (height - top - bottom)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = level(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    for number, (name, values) in enumerate(groups.items()):
        middle = left + room * (number + 0.5)
        label = f'<text class="label" x="{middle:.1f}" y="{height - 9}" text-anchor="middle">{escape(name)}</text>'
        parts.append(label)
        for place, key in enumerate(series):
            if key not in values:
                continue
            x, y = middle + (place - len(series) / 2) * bar, level(values[key])
            shape = f'x="{x + 1.5:.1f}" y="{y:.1f}" width="{bar - 3:.1f}" height="{level(0) - y:.1f}"'
            parts.append(f'<rect class="series{place}" {shape}/>')
            middle_of_bar = x + bar / 2
            parts.append(
                f'<text class="value" x="{middle_of_bar:.1f}" y="{y - 4:.1f}" text-anchor="middle">'
                f"{100 * values[key]:.0f}</text>"
            )
    y = level(chance)
    parts.append(f'<line class="chance" x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return _svg(width, height, "Accuracy in per cent, by length of film", parts)


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round bounds around a range, and the ticks between them."""
    span = max(high - low, 1e-3)
    step = 10 ** math.floor(math.log10(span / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return first * step, last * step, [round(k * step, 10) for k in range(first, last + 1)]


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')
