"""Charts as text: well-formed whatever a label holds, the same bytes twice, everything inside, gaps where a value has no place."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from harness.report.svg import HEIGHT, WIDTH, Axis, Line, Mark, Row, Shape, chart, fitted, strip, text_width

NAMESPACE = "{http://www.w3.org/2000/svg}"
HOSTILE = "</svg><script>alert(1)</script>\" onload='x' & \x00\x1b[31m \ud800 \u202e 字\n]]>"
BLUE = "#0072B2"
SPEED, MEMORY = Axis("tokens/s", zero=True), Axis("GiB", zero=True)


def parsed(svg: str) -> xml.etree.ElementTree.Element:
    return xml.etree.ElementTree.fromstring(svg)


def elements(svg: str, name: str, kind: str = "") -> list[xml.etree.ElementTree.Element]:
    return [one for one in parsed(svg).iter(f"{NAMESPACE}{name}") if kind in one.get("class", "")]


def words(svg: str) -> list[str]:
    return [one.text or "" for one in elements(svg, "text")]


def numbers(svg: str, kind: str) -> list[tuple[float, float]]:
    """The absolute coordinates of the lines of ``kind``."""
    flat = [float(found) for one in elements(svg, "path", kind) for found in re.findall(r"-?[\d.]+", one.get("d", "").replace("h0", ""))]
    return list(zip(flat[::2], flat[1::2], strict=True))


def scatter(x: Axis = SPEED, y: Axis = MEMORY, title: str = "one") -> str:
    marks = [Mark(100.0 * i, 2.0**i, BLUE, "circle", title) for i in range(1, 5)]
    front = Line([(100.0, 2.0), (400.0, 16.0)], BLUE, "front", dashed=True)
    return chart(x, y, [front, *marks], title)


def test_a_scatter_with_a_front_has_axes_ticks_marks_and_titles() -> None:
    svg = scatter()
    assert words(svg) == ["0", "100", "200", "300", "400", "tokens/s", "0", "5", "10", "15", "GiB"]
    assert [one.text for one in parsed(svg).iter(f"{NAMESPACE}title")] == ["front", *["one"] * 4]
    assert len(elements(svg, "path", "mark")) == 4
    assert len(elements(svg, "path", "line dashed")) == 1
    root = parsed(svg)
    assert (root.get("role"), root.get("aria-label")) == ("img", "one")


def test_logarithmic_axes_put_equal_ratios_at_equal_distances() -> None:
    marks = [Mark(10.0**i, 10.0**i, BLUE, "circle", "") for i in range(4)]
    svg = chart(Axis("x", log=True), Axis("y", log=True), marks, "")
    starts = [re.findall(r"-?[\d.]+", one.get("d", ""))[:2] for one in elements(svg, "path", "mark")]
    across, up = ([float(start[side]) for start in starts] for side in (0, 1))
    for places in (across, up):
        steps = [b - a for a, b in pairwise(places)]
        assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert across[0] < across[1]
    assert up[0] > up[1], "more is higher"
    assert words(svg)[:4] == ["1", "10", "100", "1,000"]


def test_the_same_input_makes_the_same_bytes() -> None:
    assert scatter() == scatter()
    rows = [Row("a", [1.0, 2.0], ["x", "y"], 1.5, BLUE, "square")]
    assert strip(SPEED, rows, "alt") == strip(SPEED, rows, "alt")


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond", "wedge"])
def test_hostile_text_stays_text(shape: Shape) -> None:
    rows = [Row(HOSTILE, [1.0], [HOSTILE], 1.0, HOSTILE, shape)]
    drawn: list[Mark | Line] = [Mark(1.0, 1.0, HOSTILE, shape, HOSTILE), Line([(0.0, 0.0), (1.0, 1.0)], HOSTILE, HOSTILE)]
    for svg in (chart(Axis(HOSTILE), Axis(HOSTILE), drawn, HOSTILE), strip(Axis(HOSTILE), rows, HOSTILE)):
        root = parsed(svg)
        assert {one.tag.removeprefix(NAMESPACE) for one in root.iter()} == {"svg", "path", "text", "title"}
        assert {key for one in root.iter() for key in one.attrib} <= {
            "class", "viewBox", "role", "aria-label", "style", "d", "x", "y", "text-anchor", "stroke-width",
        }  # fmt: skip
        assert "<script>alert(1)</script>" in str(root.get("aria-label"))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800\u202e]", svg)


def test_a_curve_is_broken_where_a_value_has_no_place_and_the_chart_says_so() -> None:
    losses = [3.0, 2.5, math.nan, 2.0, math.inf, 1.5, 1.0]
    svg = chart(Axis("step", whole=True), Axis("loss"), [Line(list(enumerate(losses)), BLUE, "run")], "")
    (line,) = elements(svg, "path", "line")
    assert line.get("d", "").count("M") == 3
    assert "h0" in line.get("d", ""), "a lone value is a dot"
    assert "2 values cannot be drawn" in words(svg)
    assert "nan" not in svg
    nothing = chart(Axis("step"), Axis("loss"), [Line([(1.0, math.nan)], BLUE, "run")], "")
    assert elements(nothing, "path", "line") == []
    assert "1 value cannot be drawn" in words(nothing)
    assert "cannot" not in scatter()
    assert "x (1 value cannot be drawn)" in words(strip(Axis("x"), [Row("a", [1.0, math.inf], ["", ""], 1.0, BLUE, "circle")], ""))


def test_of_a_long_curve_no_peak_is_lost_and_the_rest_is_thinned() -> None:
    values = [math.sin(i / 50) for i in range(100_000)]
    values[54_321] = 9.0
    svg = chart(Axis("step", whole=True), Axis("loss"), [Line(list(enumerate(values)), BLUE, "run")], "")
    points = numbers(svg, "line")
    assert len(points) <= 4 * (WIDTH + 1)
    top = min(y for _, y in points)
    whole = numbers(chart(Axis("step", whole=True), Axis("loss"), [Line([(0, -1), (1, 9)], BLUE, "run")], ""), "line")
    assert top == min(y for _, y in whole)
    assert points == sorted(points, key=lambda point: point[0])


def test_equal_repeats_lie_one_below_the_other() -> None:
    svg = strip(SPEED, [Row("a", [5.0, 5.0, 5.0], ["1", "2", "3"], 5.0, BLUE, "square")], "")
    corners = [re.findall(r"-?[\d.]+", one.get("d", ""))[:2] for one in elements(svg, "path", "mark")]
    assert len({x for x, _ in corners}) == 1
    assert len({y for _, y in corners}) == 3
    assert len(elements(svg, "path", "bar")) == 1


def test_a_long_name_keeps_its_beginning_and_its_end_and_is_whole_in_the_description() -> None:
    name = "engine with a very long list of knobs that nobody can read at once " * 3
    svg = strip(SPEED, [Row(name, [1.0], ["one"], 1.0, BLUE, "circle")], name)
    beginning, end = words(svg)[-1].split("…")
    assert name.startswith(beginning)
    assert name.endswith(end)
    assert text_width(words(svg)[-1]) <= WIDTH
    assert parsed(svg).get("aria-label") == name
    assert fitted("short", 100) == "short"
    assert fitted("字" * 9, 60) == "字字字…字"
    assert fitted("字" * 9, 5) == "…"
    twins = [fitted(f"hf/default compute_dtype=bfloat16 micro_batch={size}", 200) for size in (2, 4)]
    assert twins[0] != twins[1]


VALUES = some.floats(allow_nan=True, allow_infinity=True)


@given(some.lists(some.tuples(VALUES, VALUES), max_size=6), some.booleans(), some.booleans())
@example([(1.9e214, 1.09e39)], False, True)
def test_whatever_is_measured_what_is_written_stays_inside_and_apart(points: Sequence[tuple[float, float]], log: bool, zero: bool) -> None:
    drawn = [Line(points, BLUE, "run"), *(Mark(x, y, BLUE, "diamond", "mark") for x, y in points)]
    svg = chart(Axis("x", log=log, zero=zero), Axis("y", log=log), drawn, "")
    for x, y in numbers(svg, "line"):
        assert -0.1 <= x <= WIDTH
        assert -0.1 <= y <= HEIGHT
    below = [one for one in elements(svg, "text") if one.get("text-anchor") == "middle"][:-1]
    spans = [(float(one.get("x", "")) - text_width(one.text or "") / 2, text_width(one.text or "")) for one in below]
    assert all(start >= -0.1 and start + width <= WIDTH + 0.1 for start, width in spans)
    assert all(a + width < b for (a, width), (b, _) in pairwise(spans))
