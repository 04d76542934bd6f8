"""Charts as SVG for the page: marks and lines over two axes, or values in named rows; the same input makes the same bytes.

Text is text, in the font of the page; colours of axes come from its style sheet; whoever points at a mark reads its title.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.report.scale import Scale, scale, texts, ticks

WIDTH, HEIGHT = 320, 220  # of a chart, in units that are pixels in a column of the page; it is scaled as a whole
FONT = 11  # as in the style sheet
_LEAST_ROW, _MOST_ROW, _SPREAD = 38, 60, 12  # of a strip: from row to row, and from the first to the last repeat in it
_RIGHT, _TOP, _BOTTOM, _LINE = 12, 24, 38, 14
_MOST_TICKS, _GAP = 6, 10

Shape = Literal["circle", "square", "triangle", "diamond", "wedge"]
_CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "wedge": ((0, 1.1), (1.1, -0.9), (-1.1, -0.9)),
}


@dataclass(frozen=True, slots=True)
class Axis:
    """``zero``: it shows 0 too. ``whole``: only whole numbers stand beside it."""

    label: str
    log: bool = False
    zero: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """One value. ``colour``: of CSS. ``title``: what a reader sees who points at it."""

    x: float
    y: float
    colour: str
    shape: Shape
    title: str
    radius: float = 4.5


@dataclass(frozen=True, slots=True)
class Line:
    """Points in order, joined where both ends have a place."""

    points: Sequence[tuple[float, float]]
    colour: str
    title: str
    width: float = 1.5
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a strip: a mark for each value and its title, a bar at ``middle``."""

    name: str
    values: Sequence[float]
    titles: Sequence[str]
    middle: float
    colour: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the plotted area lies, and what its sides mean."""

    left: float
    top: float
    bottom: float
    x: Scale
    y: Scale

    @property
    def width(self) -> float:
        return WIDTH - _RIGHT - self.left

    def at(self, x: float, y: float) -> tuple[float, float] | None:
        across, up = self.x.place(x), self.y.place(y)
        if across is None or up is None:
            return None
        return self.left + across * self.width, self.bottom - up * (self.bottom - self.top)


def chart(x: Axis, y: Axis, drawn: Sequence[Mark | Line], alt: str) -> str:
    """``drawn`` over two axes, the last one on top. ``alt``: all of it in words. Values that have no place are counted in a note."""
    points = [point for one in drawn for point in (one.points if isinstance(one, Line) else [(one.x, one.y)])]
    across = scale((point[0] for point in points), log=x.log, zero=x.zero)
    up = scale((point[1] for point in points), log=y.log, zero=y.zero)
    lost = sum(across.place(a) is None or up.place(b) is None for a, b in points)
    top, bottom = _TOP + (_LINE if lost else 0), HEIGHT - _BOTTOM
    beside = ticks(up, _MOST_TICKS, whole=y.whole)
    names = texts(beside, log=y.log)
    frame = _Frame(max(map(text_width, names), default=0) + 8, top, bottom, across, up)
    parts = [*_x_axis(frame, x), *_y_axis(frame, y, beside, names)]
    if lost:
        parts.append(_text(WIDTH - _RIGHT, _LINE + FONT, _lost(lost), "end"))
    for one in drawn:
        parts += _line(frame, one) if isinstance(one, Line) else _mark(frame, one)
    return _svg(HEIGHT, alt, parts)


def strip(x: Axis, rows: Sequence[Row], alt: str) -> str:
    """``rows`` one below the other over one axis, each under its name. Values that have no place are counted beside the axis."""
    pitch = min(max((HEIGHT - _BOTTOM) / max(len(rows), 1), _LEAST_ROW), _MOST_ROW)
    bottom = len(rows) * pitch
    values = [value for row in rows for value in (*row.values, row.middle)]
    across = scale(values, log=x.log, zero=x.zero)
    lost = sum(across.place(value) is None for row in rows for value in row.values)
    frame = _Frame(8, 0, bottom, across, Scale(bottom, 0))  # up and down are the drawing's own units
    parts = _x_axis(frame, replace(x, label=f"{x.label} ({_lost(lost)})") if lost else x)
    for place, row in enumerate(rows):
        parts += _row(frame, row, place * pitch)
    return _svg(bottom + _BOTTOM, alt, parts)


def text_width(text: str) -> float:
    """About how wide ``text`` is: on the safe side in the fonts of the page."""
    return FONT * sum(1.0 if char in "mwMW@%…" or unicodedata.east_asian_width(char) in "WF" else 0.64 for char in text)


def fitted(text: str, width: float) -> str:
    """``text``, or its beginning, an ellipsis and its end where it is wider than ``width``: long names differ at their ends."""
    if text_width(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = f"{text[: kept - kept // 3]}…{text[-(kept // 3) :] if kept // 3 else ''}"
        if text_width(shorter) <= width:
            return shorter
    return "…"


def _lost(count: int) -> str:
    return f"{count:,} {'value' if count == 1 else 'values'} cannot be drawn"


def _row(frame: _Frame, row: Row, top: float) -> Iterator[str]:
    yield _text(frame.left, top + FONT, fitted(row.name, frame.width), "start", "name")
    middle = top + FONT + 14
    here = frame.at(row.middle, middle)
    if here is not None:
        yield f'<path class="bar" style="color:{_plain(row.colour)}" d="M{_n(here[0])} {_n(middle - 11)}v22"/>'
    count = len(row.values)
    for place, (value, title) in enumerate(zip(row.values, row.titles, strict=True)):
        down = _SPREAD * (place / (count - 1) - 0.5) if count > 1 else 0.0  # one below the other: equal ones can be counted
        yield from _mark(frame, Mark(value, middle + down, row.colour, row.shape, title, 3.2))


def _x_axis(frame: _Frame, axis: Axis) -> list[str]:
    places, centres, names = _that_fit(frame, axis)
    grid = "".join(f"M{_n(at)} {_n(frame.top)}V{_n(frame.bottom)}" for at in places)
    parts = [f'<path class="grid" d="{grid}"/>'] if grid else []
    parts.append(f'<path class="axis" d="M{_n(frame.left)} {_n(frame.bottom)}H{WIDTH - _RIGHT}"/>')
    parts += [_text(centre, frame.bottom + 15, name, "middle") for centre, name in zip(centres, names, strict=True)]
    parts.append(_text(frame.left + frame.width / 2, frame.bottom + 32, fitted(axis.label, frame.width), "middle"))
    return parts


def _that_fit(frame: _Frame, axis: Axis) -> tuple[list[float], list[float], tuple[str, ...]]:
    """As many ticks as do not run into one another: where they are, where the middle of what they say is, and what they say."""
    for most in range(_MOST_TICKS, 0, -1):
        values = ticks(frame.x, most, whole=axis.whole)
        names = texts(values, log=axis.log)
        places = [frame.left + (frame.x.place(value) or 0.0) * frame.width for value in values]
        halves = [text_width(name) / 2 for name in names]
        centres = [min(max(at, half), WIDTH - half) for at, half in zip(places, halves, strict=True)]
        spans = zip(centres, centres[1:], halves, halves[1:], strict=False)
        if all(after - before >= left + right + _GAP for before, after, left, right in spans):
            return places, centres, names
    return places[:1], centres[:1], names[:1]


def _y_axis(frame: _Frame, axis: Axis, beside: Sequence[float], names: Sequence[str]) -> list[str]:
    places = [frame.bottom - (frame.y.place(value) or 0.0) * (frame.bottom - frame.top) for value in beside]
    grid = "".join(f"M{_n(frame.left)} {_n(at)}H{WIDTH - _RIGHT}" for at in places)
    parts = [f'<path class="grid" d="{grid}"/>'] if grid else []
    parts.append(f'<path class="axis" d="M{_n(frame.left)} {_n(frame.top)}V{_n(frame.bottom)}"/>')
    parts += [_text(frame.left - 6, at + 0.35 * FONT, name, "end") for at, name in zip(places, names, strict=True)]
    parts.append(_text(0, FONT, fitted(axis.label, WIDTH), "start"))
    return parts


def _mark(frame: _Frame, mark: Mark) -> Iterator[str]:
    here = frame.at(mark.x, mark.y)
    if here is not None:
        outline = _outline(*here, mark.shape, mark.radius)
        yield f'<path class="mark" style="color:{_plain(mark.colour)}" d="{outline}">{_title(mark.title)}</path>'


def _outline(x: float, y: float, shape: Shape, radius: float) -> str:
    if shape == "circle":
        r, across = _n(radius), _n(2 * radius)
        return f"M{_n(x - radius)} {_n(y)}a{r} {r} 0 1 0 {across} 0a{r} {r} 0 1 0 -{across} 0z"
    return f"M{' '.join(f'{_n(x + a * radius)} {_n(y + b * radius)}' for a, b in _CORNERS[shape])}z"


def _line(frame: _Frame, line: Line) -> Iterator[str]:
    drawn = "".join(_joined(piece) for piece in _pieces(frame, line.points))
    if drawn:
        kind = "line dashed" if line.dashed else "line"
        look = f'class="{kind}" style="color:{_plain(line.colour)}" stroke-width="{_n(line.width)}"'
        yield f'<path {look} d="{drawn}">{_title(line.title)}</path>'


def _pieces(frame: _Frame, points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """What can be drawn in one go: a point without a place ends a piece."""
    piece: list[tuple[float, float]] = []
    for point in points:
        here = frame.at(*point)
        if here is not None:
            piece.append(here)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _joined(piece: Sequence[tuple[float, float]]) -> str:
    if len(piece) == 1:
        return f"M{_n(piece[0][0])} {_n(piece[0][1])}h0"  # its round cap is a dot
    return f"M{' '.join(f'{_n(x)} {_n(y)}' for x, y in _thinned(piece))}"


def _thinned(piece: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Of thousands of points, what can be seen: in each column of the chart the first, the lowest, the highest and the last."""
    if len(piece) <= 4 * WIDTH:
        return piece
    columns: dict[int, list[int]] = {}
    for number, (x, _) in enumerate(piece):
        columns.setdefault(int(x), []).append(number)
    kept: set[int] = set()
    for numbers in columns.values():
        kept |= {numbers[0], numbers[-1], min(numbers, key=lambda n: piece[n][1]), max(numbers, key=lambda n: piece[n][1])}
    return [piece[number] for number in sorted(kept)]


def _svg(height: float, alt: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {_n(height)}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} role="img" aria-label="{_plain(alt)}">'
    return "\n".join([start, *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: Literal["start", "middle", "end"], kind: str = "") -> str:
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    look = f' class="{kind}"' if kind else ""
    return f'<text{look} x="{_n(x)}" y="{_n(y)}"{side}>{_plain(text)}</text>'


def _title(text: str) -> str:
    return f"<title>{_plain(text)}</title>" if text else ""


def _plain(text: str) -> str:
    """Any text as text: nothing of it is markup, and nothing that a parser of XML refuses is left."""
    return html.escape("".join(char if char.isprintable() else " " for char in text))


def _n(number: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    text = f"{number:.1f}"
    return "0" if text == "-0.0" else text.removesuffix(".0")
