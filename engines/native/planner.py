"""Which tensors each layer keeps, sends to the host or makes again, so that a step fits into a byte budget and takes least time.

Each tensor's choice is its own: gate and up, the rotated heads, attention's output, the sum in the middle, and the input, which can be
kept or sent away but not made again. Gate and up are never sent: a bus that has room for them has it for the others, whose bytes take as
long to make again. Layers give up theirs from the lowest: those are read last, when what the layers above kept is already free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product

from engines.native.durations import INWARD, Durations, LayerSeconds
from engines.native.footprint import LayerBytes, MemoryModel
from engines.native.plan import KEEP_ALL, SLAB_BYTES, Names, Plan
from harness.errors import UnsupportedError

_GIB = 2**30
SLACK = 1.02  # the model has been up to 0.3 % below what was measured (docs/engine.md, docs/log.md)
_PIECES = (1, 2, 4, 8)
_SMALLEST_CHUNK = 256  # rows of logits; fewer leave the products short of work
_SWEEPS = 3
# The projection before the heads' norms is worth nothing without the heads, nor they without it: both or none.
_INPUT: Names = frozenset(("input",))
_GATE_UP: Names = frozenset(("gate_up",))
_UNITS: tuple[Names, ...] = (frozenset(("heads", "qkv")), frozenset(("attended",)), frozenset(("middle",)))


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan for every layer, the rows of logits at one time, and whether the embedding waits on the host, with what is predicted of them;
    ``seconds`` only rank choices.
    """

    plans: tuple[Plan, ...]
    loss_chunk: int
    peak_bytes: int
    host_bytes: int
    seconds: float
    embedding_away: bool = False


@dataclass(frozen=True, slots=True)
class _Judge:
    """Judges choices; what is known of a plan is worked out once."""

    memory: MemoryModel
    durations: Durations
    known: dict[Plan, tuple[LayerBytes, LayerSeconds]] = field(default_factory=dict)

    def choice(self, plans: Sequence[Plan], loss_chunk: int) -> Choice:
        for plan in set(plans) - self.known.keys():
            self.known[plan] = self.memory.layer(plan), self.durations.layer(plan)
        layers = [self.known[plan] for plan in plans]
        sizes = [size for size, _ in layers]
        away = sum(size.away for size in sizes)
        return Choice(
            tuple(plans),
            loss_chunk,
            self.memory.peak_of(sizes, loss_chunk),
            -(-away // SLAB_BYTES) * SLAB_BYTES,
            self.durations.step([seconds for _, seconds in layers], loss_chunk),
        )


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to need less, step by step: first ``away`` goes to the host, layer by layer; then the units of ``again`` are given up."""

    judge: _Judge
    away: Names
    num_away: int
    again: tuple[Names, ...]
    pieces: int
    loss_chunk: int

    @property
    def last(self) -> int:
        """The last step."""
        return self.num_away + len(self.again) * self.judge.memory.shape.num_layers

    def choice(self, step: int) -> Choice:
        """After so many steps."""
        count = self.judge.memory.shape.num_layers
        given_up, of_next = divmod(max(0, step - self.num_away), count)
        num_sent = min(step, self.num_away)
        edges = sorted({0, num_sent, of_next, count})
        plans: list[Plan] = []
        for start, end in pairwise(edges):  # layers that are treated alike
            sent = self.away if start < num_sent else frozenset()
            dropped = frozenset().union(*self.again[: given_up + (start < of_next)])
            plans += [Plan(KEEP_ALL.kept - dropped - sent, sent, self.pieces)] * (end - start)
        return self.judge.choice(plans, self.loss_chunk)

    def first(self, fits: Callable[[Choice], bool]) -> Choice | None:
        """The first step that ``fits``, by halving; None when the last one does not."""
        found, low, high = self.choice(self.last), 0, self.last
        if not fits(found):
            return None
        while low < high:
            middle = (low + high) // 2
            choice = self.choice(middle)
            if fits(choice):
                found, high = choice, middle
            else:
                low = middle + 1
        return found


def choose(memory: MemoryModel, budget_bytes: float, host_bytes: float) -> Choice:
    """The fastest choice that stays within ``budget_bytes`` on the device and ``host_bytes`` of pinned memory (0: nothing is sent away).

    Raises UnsupportedError with what would be needed when nothing fits.
    """
    taken = _pinned(memory.movable)
    places = [(memory, host_bytes)]
    if memory.movable and taken <= host_bytes and SLACK * memory.loaded <= budget_bytes:
        places.append((memory.moved(), host_bytes - taken))
    found: list[Choice] = []
    for there, host in places:
        choice = _fastest(there, budget_bytes, host)
        if choice is None:
            continue
        found.append(choice if there is memory else _without_embedding(memory, choice))
        if set(choice.plans) == {KEEP_ALL}:
            break
    if not found:
        raise UnsupportedError(_nothing_fits(least(memory, host_bytes), budget_bytes))
    return min(found, key=lambda choice: choice.seconds)


def _fastest(memory: MemoryModel, budget_bytes: float, host_bytes: float) -> Choice | None:
    """As ``choose``, the embedding where it is; None when nothing fits."""
    judge = _Judge(memory, Durations(memory))

    def fits(choice: Choice) -> bool:
        return SLACK * choice.peak_bytes <= budget_bytes and choice.host_bytes <= host_bytes

    found = [choice for way in _ways(judge, host_bytes) if (choice := way.first(fits)) is not None]
    return _polished(judge, min(found, key=lambda choice: choice.seconds), fits) if found else None


def least(memory: MemoryModel, host_bytes: float) -> Choice:
    """What needs least memory on the device."""
    taken = _pinned(memory.movable)
    if memory.movable and taken <= host_bytes:
        return _without_embedding(memory, least(memory.moved(), host_bytes - taken))
    ways = _ways(_Judge(memory, Durations(memory)), host_bytes)
    return min((way.choice(way.last) for way in ways), key=lambda choice: choice.peak_bytes)


def _without_embedding(memory: MemoryModel, found: Choice) -> Choice:
    """What was ``found`` for the rest of ``memory``: rows of the embedding come over the bus once a pass, before anything else."""
    read = memory.load.num_tokens * memory.shape.hidden_size * memory.element_bytes / INWARD
    return Choice(
        found.plans, found.loss_chunk, max(found.peak_bytes, memory.loaded), found.host_bytes + _pinned(memory.movable),
        found.seconds + read, embedding_away=True,
    )  # fmt: skip


def _pinned(num_bytes: int) -> int:
    """What the allocator of pinned memory takes for them: the next power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def _nothing_fits(least: Choice, budget_bytes: float) -> str:
    host = f"{least.host_bytes / _GIB:.1f} GiB more on the host" if least.host_bytes else "nothing on the host"
    return (
        f"this step needs at least {SLACK * least.peak_bytes / _GIB:.1f} GiB (predicted) with everything made again that can be "
        f"and {host}, and {budget_bytes / _GIB:.1f} GiB are there; use a smaller engine.knobs.micro_batch or shorter samples"
    )


def _ways(judge: _Judge, host_bytes: float) -> Iterator[_Way]:
    """All combinations of what is sent away, how many pieces and how many rows of logits; the plainest first."""
    memory, durations = judge.memory, judge.durations
    again = tuple(sorted((_GATE_UP, *_UNITS), key=lambda unit: sum(durations.of(name) for name in unit) / memory.total(unit)))
    movable = (_INPUT, *_UNITS)
    for count in range(len(movable) + 1):
        for sent in combinations(movable, count):
            away: Names = frozenset().union(*sent)
            size = memory.total(away)
            num_away = int(min(memory.shape.num_layers, host_bytes / size)) if size else 0
            if sent and not num_away:
                continue
            for pieces, chunk in product(_PIECES, _chunks(memory.load.loss_chunk)):
                yield _Way(judge, away, num_away, again, pieces, chunk)


def _chunks(largest: int) -> list[int]:
    chunks = [largest]
    while chunks[-1] // 2 >= _SMALLEST_CHUNK:
        chunks.append(chunks[-1] // 2)
    return chunks


def _polished(judge: _Judge, best: Choice, fits: Callable[[Choice], bool]) -> Choice:
    """Changes of single layers that save time and still fit, from the top: what the layers there hold is nobody's peak for long."""
    for _ in range(_SWEEPS):
        before = best
        for index in reversed(range(len(best.plans))):
            for plan in _neighbours(best.plans[index]):
                changed = judge.choice([*best.plans[:index], plan, *best.plans[index + 1 :]], best.loss_chunk)
                if changed.seconds < best.seconds and fits(changed):
                    best = changed
        if best is before:
            break
    return best


def _neighbours(plan: Plan) -> Iterator[Plan]:
    """Plans that treat one unit otherwise, or all rows at once."""
    for unit in (_INPUT, _GATE_UP, *_UNITS):
        yield replace(plan, kept=plan.kept | unit, offloaded=plan.offloaded - unit)
        if unit is not _GATE_UP:
            yield replace(plan, kept=plan.kept - unit, offloaded=plan.offloaded | unit)
        if unit is not _INPUT:
            yield replace(plan, kept=plan.kept - unit, offloaded=plan.offloaded - unit)
    yield replace(plan, pieces=1)
