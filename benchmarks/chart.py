"""Draws curves as an SVG of small panels, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 400, 260, 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 44, 44
_HEAD = 54

_STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --faint: #d0d7de; --soft: #59636e;
      --first: #0969da; --second: #bc4c00; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #f0f6fc; --faint: #30363d; --soft: #9198a1;
        --first: #4493f8; --second: #f0883e; }
}
.paper { fill: var(--paper); } text { fill: var(--ink); } .soft { fill: var(--soft); }
.grid { stroke: var(--faint); stroke-width: 1; }
.line { fill: none; stroke-width: 2; } .title { font-weight: 600; }
.s0 { stroke: var(--first); } .d0 { fill: var(--first); }
.s1 { stroke: var(--second); stroke-dasharray: 5 4; } .d1 { fill: var(--second); }
"""


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        series: Points (x, y) by the name of their line; the names are the same in all panels.
    """

    title: str
    x_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel], title: str, y_label: str) -> str:
    """Give the SVG. The x axes are logarithmic, the y axes begin at 0."""
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = PANEL_WIDTH * COLUMNS, _HEAD + PANEL_HEIGHT * rows
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>'
        f'<text class="title" x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>'
        f'<text class="soft" x="{_LEFT}" y="42">{escape(y_label)}</text>'
    )
    parts = [head]
    for index, name in enumerate(names):
        x = width - 150 * (len(names) - index)
        parts.append(
            f'<path class="line s{index}" d="M{x} 30h28"/>'
            f'<text x="{x + 36}" y="34">{escape(name)}</text>'
        )
    for index, panel in enumerate(panels):
        x, y = index % COLUMNS * PANEL_WIDTH, _HEAD + index // COLUMNS * PANEL_HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_draw_panel(panel, names)}</g>')
    parts.append("</svg>\n")
    return "".join(parts)


def _draw_panel(panel: Panel, names: Sequence[str]) -> str:
    points = [point for line in panel.series.values() for point in line]
    right, bottom = PANEL_WIDTH - _RIGHT, PANEL_HEIGHT - _BOTTOM
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    step = _step(max(y for _, y in points))
    top = step * max(1, math.ceil(max(y for _, y in points) / step))

    def at_x(x: float) -> float:
        share = 0.5 if high == low else math.log(x / low) / math.log(high / low)
        return _LEFT + 12 + share * (right - _LEFT - 24)

    def at_y(y: float) -> float:
        return bottom - y / top * (bottom - _TOP)

    parts = [f'<text class="title" x="{_LEFT}" y="26">{escape(panel.title)}</text>']
    for number in range(round(top / step) + 1):
        y = at_y(number * step)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
            f'<text class="soft" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{number * step:g}</text>"
        )
    parts += [
        f'<text class="soft" x="{at_x(x):.1f}" y="{bottom + 18}" text-anchor="middle">'
        f"{_short(x)}</text>"
        for x in sorted({x for x, _ in points})
    ]
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="soft" x="{middle}" y="{bottom + 36}" text-anchor="middle">'
        f"{escape(panel.x_label)}</text>"
    )
    for name, line in panel.series.items():
        index = names.index(name)
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line)
        parts.append(f'<path class="line s{index}" d="M{path}"/>')
        parts += [
            f'<circle class="d{index}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5">'
            f"<title>{escape(name)}, {x:g}: {y:.3g}</title></circle>"
            for x, y in line
        ]
    return "".join(parts)


def _step(largest: float) -> float:
    """Give a round distance between grid lines, of which there are at most five or so."""
    if largest <= 0:
        return 1.0
    rough = largest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _short(x: float) -> str:
    return f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"
