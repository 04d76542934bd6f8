"""The three plots of a group as SVG: throughput with every repeat, memory against speed, and loss curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from harness.rank import Entry, Group, Variant
from harness.report.columns import memory_bytes
from harness.report.front import stairs
from harness.report.numbers import GIB, plain_rate
from harness.report.scale import has_place
from harness.report.svg import Axis, Line, Mark, Row, Shape, chart, strip

# Okabe and Ito's palette without yellow (too pale on white), told apart with any common colour blindness; its black is the text's colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "currentColor")
SHAPES: tuple[tuple[Shape, str], ...] = (("circle", "●"), ("square", "■"), ("triangle", "▲"), ("diamond", "◆"), ("wedge", "▼"))
MOST_DRAWN = 40  # more nobody can tell apart; the table has them all


@dataclass(frozen=True, slots=True)
class Look:
    """How a variant is drawn, in every plot of the report."""

    colour: str
    shape: Shape
    glyph: str


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG, whose label says in words what it shows, and its caption."""

    title: str
    svg: Markup


def looks(groups: Iterable[Group]) -> dict[str, Look]:
    """One look a label, the same in every group; those that most groups have choose first, each what its neighbours there have least:
    another colour above all, then another marker.
    """
    together: dict[str, Counter[str]] = {}
    for group in groups:
        names = {variant.label for variant in group.variants if variant.runs}
        for name in names:
            together.setdefault(name, Counter()).update(names)
    found: dict[str, Look] = {}
    used: Counter[Look] = Counter()
    for name in sorted(together, key=lambda name: (-together[name][name], name)):
        colours: Counter[str] = Counter()
        shapes: Counter[str] = Counter()
        for other in together[name].keys() & found.keys():
            colours[found[other].colour] += together[name][other]
            shapes[found[other].shape] += together[name][other]
        found[name] = min(_LOOKS, key=lambda one: (used[one], colours[one.colour], shapes[one.shape]))
        used[found[name]] += 1
    return found


_LOOKS = tuple(Look(COLOURS[i % len(COLOURS)], *SHAPES[(i + i // len(COLOURS)) % len(SHAPES)]) for i in range(len(COLOURS) * len(SHAPES)))


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
    values = [value for variant in ran for value in variant.rates]
    zoomed = min(values) > 0.7 * max(values)
    shown = "; ".join(f"{variant.label} {', '.join(map(plain_rate, variant.rates))}" for variant in ran)
    svg = strip(
        Axis(f"tokens/s{' (axis does not start at 0)' if zoomed else ''}", zero=not zoomed),
        [_row(variant, look[variant.label]) for variant in ran],
        f"Tokens per second of every repeat: {shown}",
    )
    return Plot("Throughput: every repeat a mark, the median a bar", Markup(svg))


def _row(variant: Variant, look: Look) -> Row:
    titles = [f"{_name(variant, run)}: {plain_rate(run.tokens_per_second)} tokens/s" for run in variant.runs]
    return Row(variant.label, variant.rates, titles, variant.tokens_per_second or 0.0, look.colour, look.shape)


def _memory(placed: Sequence[Variant], group: Group, look: Mapping[str, Look]) -> Plot:
    name = "peak allocated memory" if group.machine.device == "cuda" else "peak resident memory (RSS)"
    marks, said = [], []
    for variant in placed:
        speed, size, mine = variant.tokens_per_second or 0.0, (memory_bytes(variant, group) or 0) / GIB, look[variant.label]
        said.append(f"{variant.label} {size:.2f} GiB at {plain_rate(speed)} tokens/s")
        marks.append(Mark(speed, size, mine.colour, mine.shape, said[-1]))
    line, title = stairs(group), "Memory against speed: lower right is better"
    drawn: list[Mark | Line] = [*marks]
    if len(line) > 1:
        drawn.insert(0, Line(line, "currentColor", "the best speed of every budget", 1.2, dashed=True))
        title += "; the line is the best speed of every budget"
    svg = chart(Axis("tokens/s", zero=True), Axis(f"{name}, GiB", zero=True), drawn, f"Memory against speed: {'; '.join(said)}")
    return Plot(title, Markup(svg))


def _losses(ran: Sequence[Variant], look: Mapping[str, Look]) -> Plot:
    lines, marks = [], []
    for place, variant in enumerate(ran):
        mine = look[variant.label]
        width = 1.3 + 3.2 * (len(ran) - 1 - place) / max(len(ran) - 1, 1)  # equal curves stay visible below one another
        curves = [(f"{_name(variant, run)}: {_ends(run)}", _curve(run)) for run in variant.runs]
        lines += [Line(curve, mine.colour, title, width) for title, curve in curves if curve]
        title, curve = curves[0]
        if seen := [point for point in curve if has_place(point[1], log=False)]:
            at = seen[int((place + 0.5) / len(ran) * len(seen))]  # one on each variant, none above another: colours repeat
            marks.append(Mark(*at, mine.colour, mine.shape, title, 3.6))
    shown = "; ".join(f"{variant.label} {_ends(variant.runs[0])}" for variant in ran)
    svg = chart(Axis("optimizer step", whole=True), Axis("training loss, nats per token"), [*lines, *marks], f"Training loss: {shown}")
    return Plot("Training loss of every run: curves that lie on one another trained the same", Markup(svg))


def _curve(run: Entry) -> list[tuple[float, float]]:
    losses = run.record.measurement.steps.losses if run.record.measurement else ()
    return [(float(step), loss) for step, loss in enumerate(losses, start=1)]


def _ends(run: Entry) -> str:
    losses = [loss for _, loss in _curve(run)]
    return f"from {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no losses"


def _name(variant: Variant, run: Entry) -> str:
    return f"{variant.label}, repeat {run.record.cell.repeat}"
