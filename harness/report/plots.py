"""The three plots of a group as SVG: throughput with every repeat, memory against speed, and loss curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from harness.rank import Group, Variant
from harness.report.numbers import GIB, plain_rate
from harness.report.text import memory_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette without yellow (too pale on white), told apart with any common colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))  # matplotlib's, and as text
MOST_DRAWN = 40  # more nobody can tell apart; the table has them all
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7e9ed",
    "grid.linewidth": 0.8,
    "text.parse_math": False,  # a record may hold dollar signs
    "svg.hashsalt": "engine-room",  # the same records make the same file
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a variant is drawn, in every plot of the report."""

    colour: str
    marker: str
    glyph: str


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG and what it shows, in words."""

    title: str
    svg: str
    alt: str

    @property
    def data_uri(self) -> str:
        """The SVG as the source of an image."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


def looks(groups: Iterable[Group]) -> dict[str, Look]:
    """One look a label, the same in every group: colours first, then other markers as well."""
    names = sorted({variant.label for group in groups for variant in group.variants if variant.runs})
    count = len(COLOURS)
    return {name: Look(COLOURS[i % count], *MARKERS[(i + i // count) % len(MARKERS)]) for i, name in enumerate(names)}


def plots(group: Group, look: Mapping[str, Look]) -> list[Plot]:
    """What can be drawn of ``group``: nothing when nothing ran, and of very many variants the first in the ranking."""
    ran = [variant for variant in group.variants if variant.runs]
    if not ran:
        return []
    shown = ran[:MOST_DRAWN]
    drawn = [_throughput(shown, look), _losses(shown, look)]
    placed = [variant for variant in shown if memory_bytes(variant, group) is not None]
    if placed:
        drawn.insert(1, _memory(placed, group, look))
    if len(shown) == len(ran):
        return drawn
    return [replace(plot, title=f"{plot.title} (the first {len(shown)} of {len(ran)} variants)") for plot in drawn]


def _throughput(ran: Sequence[Variant], look: Mapping[str, Look]) -> Plot:
    with mpl.rc_context(STYLE):
        figure, axes = _figure(max(2.7, 0.7 + 0.46 * len(ran)))
        values = [value for variant in ran for value in variant.rates]
        zoomed = min(values) > 0.7 * max(values)
        for row, variant in enumerate(ran):
            mine = look[variant.label]
            axes.plot(
                variant.rates, _spread(row, len(variant.rates)), mine.marker, color=mine.colour, alpha=0.75, markersize=5, markeredgewidth=0
            )
            axes.vlines(variant.tokens_per_second or 0, row - 0.22, row + 0.22, color=mine.colour, linewidth=2)
            axes.text(0, row - 0.27, _safe(variant.label), transform=axes.get_yaxis_transform(), va="bottom", color="#30343b")
        axes.set_ylim(len(ran) - 0.6, -0.75)
        axes.set_yticks([])
        if not zoomed:
            axes.set_xlim(left=0)
        axes.margins(x=0.06)
        _rate_axis(axes)
        axes.set_xlabel(f"tokens/s{' (axis does not start at 0)' if zoomed else ''}")
        axes.spines["left"].set_visible(False)
        svg = _svg(figure)
    shown = "; ".join(f"{variant.label} {', '.join(map(plain_rate, variant.rates))}" for variant in ran)
    return Plot("Throughput: every repeat a mark, the median a bar", svg, f"Tokens per second of every repeat: {shown}")


def _memory(placed: Sequence[Variant], group: Group, look: Mapping[str, Look]) -> Plot:
    name = "peak allocated memory" if group.machine.device == "cuda" else "peak resident memory (RSS)"
    points = [(variant, variant.tokens_per_second or 0.0, (memory_bytes(variant, group) or 0) / GIB) for variant in placed]
    with mpl.rc_context(STYLE):
        figure, axes = _figure(2.7)
        for variant, speed, size in points:
            mine = look[variant.label]
            axes.plot(speed, size, mine.marker, color=mine.colour, markersize=9, markeredgecolor="white")
        axes.set_xlim(0, 1.12 * max(speed for _, speed, _ in points))
        axes.set_ylim(0, 1.18 * max(size for _, _, size in points) or 1)
        _rate_axis(axes)
        axes.set_xlabel("tokens/s (right is better)")
        axes.set_ylabel(f"{name}, GiB")
        svg = _svg(figure)
    shown = "; ".join(f"{variant.label} {size:.2f} GiB at {plain_rate(speed)} tokens/s" for variant, speed, size in points)
    return Plot("Memory against speed: lower right is better", svg, f"Memory against speed: {shown}")


def _losses(ran: Sequence[Variant], look: Mapping[str, Look]) -> Plot:
    with mpl.rc_context(STYLE):
        figure, axes = _figure(2.7)
        for place, variant in enumerate(ran):
            mine = look[variant.label]
            width = 1.3 + 3.2 * (len(ran) - 1 - place) / max(len(ran) - 1, 1)  # equal curves stay visible below one another
            for run in variant.runs:
                losses = run.record.measurement.steps.losses if run.record.measurement else ()
                axes.plot(range(1, len(losses) + 1), losses, color=mine.colour, linewidth=width, alpha=0.9, solid_capstyle="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss, nats per token")
        svg = _svg(figure)
    shown = "; ".join(f"{variant.label} {_ends(variant)}" for variant in ran)
    return Plot("Training loss of every run: curves that lie on one another trained the same", svg, f"Training loss: {shown}")


def _spread(row: int, count: int) -> list[float]:
    """Repeats one below the other, so that equal ones can be counted."""
    return [row + 0.26 * (place / (count - 1) - 0.5) if count > 1 else float(row) for place in range(count)]


def _ends(variant: Variant) -> str:
    measurement = variant.runs[0].record.measurement
    losses = measurement.steps.losses if measurement else ()
    return f"from {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no losses"


def _rate_axis(axes: Axes) -> None:
    """Few ticks with separators: five-digit rates would run into each other."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.9, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]  # savefig draws twice
    return buffer.getvalue()


def _safe(text: str) -> str:
    """What every font has; the tables hold the text as it is."""
    plain = "".join(char if 32 <= ord(char) < 127 else "?" for char in text)
    return plain if len(plain) <= 60 else f"{plain[:57]}..."
