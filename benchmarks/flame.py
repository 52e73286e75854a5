"""Draws a flame graph of sampled stacks, and sums up where the time goes."""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, ROW = 1200.0, 17
MIN_SHARE = 0.001
_CHAR_WIDTH = 6.6


@dataclass
class Node:
    """A frame below another, with the samples that were found in it."""

    samples: int = 0
    children: dict[str, Node] = field(default_factory=dict)


def read_stacks(path: Path) -> Counter[tuple[str, ...]]:
    """Read what the sampler has written."""
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        stacks[tuple(stack.split(";"))] += int(count)
    return stacks


def own_shares(
    stacks: Counter[tuple[str, ...]], *, by_file: bool = False
) -> list[tuple[str, float]]:
    """Give each function's (or file's) share of the time, with the C functions that it calls."""
    own: Counter[str] = Counter()
    for stack, count in stacks.items():
        name = stack[-1]
        own[name.rpartition("(")[2].partition(":")[0] if by_file else name] += count
    total = own.total() or 1
    return [(name, count / total) for name, count in own.most_common()]


def draw(stacks: Counter[tuple[str, ...]], title: str) -> str:
    """Give an SVG: the width of a frame is its share of all samples."""
    root = Node()
    for stack, count in stacks.items():
        root.samples += count
        node = root
        for name in stack:
            node = node.children.setdefault(name, Node())
            node.samples += count
    rows: list[str] = []
    depth = _draw_children(root, root.samples, 0.0, 0, rows)
    height = (depth + 2) * ROW
    heading = f'<text x="4" y="13">{escape(title)}: {root.samples} samples</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height}" '
        f'font-family="monospace" font-size="11">'
        f'<rect width="{WIDTH:.0f}" height="{height}" fill="#ffffff"/>{heading}'
        + "".join(rows)
        + "</svg>\n"
    )


def _draw_children(node: Node, total: int, x: float, depth: int, rows: list[str]) -> int:
    deepest = depth
    for name, child in sorted(node.children.items()):
        width = WIDTH * child.samples / total
        if child.samples / total >= MIN_SHARE:
            rows.append(_draw_frame(name, child.samples / total, x, depth + 1, width))
            deepest = max(deepest, _draw_children(child, total, x, depth + 1, rows))
        x += width
    return deepest


def _draw_frame(name: str, share: float, x: float, depth: int, width: float) -> str:
    shade = zlib.crc32(name.encode())
    colour = f"hsl({20 + shade % 35},{70 + shade % 20}%,{62 + shade % 12}%)"
    shown = name[: max(0, int(width / _CHAR_WIDTH))]
    label = f'<text x="{x + 2:.1f}" y="{depth * ROW + 12}">{escape(shown)}</text>'
    return (
        f"<g><title>{escape(name)}: {share:.1%}</title>"
        f'<rect x="{x:.1f}" y="{depth * ROW}" width="{max(width - 0.5, 0.2):.1f}" '
        f'height="{ROW - 1}" fill="{colour}"/>{label if len(shown) > 2 else ""}</g>'
    )


if __name__ == "__main__":
    print(draw(read_stacks(Path(sys.argv[1])), sys.argv[1]), end="")
