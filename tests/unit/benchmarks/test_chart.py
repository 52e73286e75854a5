"""The chart shows what was measured."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.chart import Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


def circles(svg: str, series: int) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    return [
        (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in root.iter(f"{SVG}circle")
        if circle.attrib["class"] == f"d{series}"
    ]


def test_points_lie_where_their_values_are() -> None:
    panel = Panel("Users", "users", {"relay": [(100, 10), (1_000, 20)], "floor": [(1_000, 20)]})
    svg = draw([panel], "Cost", "us")
    (low_x, low_y), (high_x, high_y) = circles(svg, 0)
    assert low_x < high_x
    # The axis begins at 0: twice the value is twice as high above it.
    bottom = 2 * low_y - high_y
    assert bottom == pytest.approx(216, abs=0.2)
    assert circles(svg, 1) == [(high_x, high_y)]


def test_one_point_is_drawn_and_names_are_escaped() -> None:
    svg = draw([Panel("<a> & b", "x", {"one": [(5, 0)]})], "t", "y")
    assert len(circles(svg, 0)) == 1
    assert "<a> & b" in "".join(ElementTree.fromstring(svg).itertext())


def test_both_schemes_have_their_colours() -> None:
    svg = draw([Panel("p", "x", {"one": [(1, 1)]})], "t", "y")
    assert "prefers-color-scheme: dark" in svg
