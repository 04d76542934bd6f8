"""Sizes that many micro-batches share, so that one captured pass fits them all: what is missing is filled up with tokens that nothing
depends on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.data.tokens import IGNORE, Batch

_SMALLEST = 64
FILLER = 128  # tokens of a document of filling at most; short, so that its attention costs nothing
SHORT = 1024  # see are_short
MOST_SIZES = 48  # that a run captures. Their graphs take memory that no plan counts: 90 MiB for some 35 at 1B (H100, 2026-11-28)
_MOST_ALIKE = 4  # kinds of rows whose documents are all alike, which need no filling

Kind = tuple[int, int, int]  # documents that are all alike, tokens of each, supervised rows


@dataclass(frozen=True, slots=True)
class Policy:
    """Sizes between two powers of two (itself one; 16: at most a sixteenth too large, or 64 tokens), and how much filling, in positions, is
    worth a capture.

    Counted by ``bench_filling`` on GSM8K's tokens (64 samples a step; 88 and 440 steps; micro-batches of 4, 16 and 64; five seeds;
    2026-11-28), a capture as 2,500 positions, about what it costs at 1B on an H100: captures and filling with 1,000 cost at most 0.42 % of
    all positions more than the best of 16 and 32 steps an octave and 250 to 2,000 positions, with 2,000 up to 0.8 % more (docs/engine.md).
    More steps an octave pay in long runs alone.
    """

    steps_an_octave: int = 16
    worth_a_capture: int = 1000


POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a captured pass is made for: tokens, documents, tokens of the longest document at most, supervised rows. ``longest``: None for
    uneven documents that are short on the whole, where attention does not ask for it.
    """

    num_tokens: int
    num_documents: int
    longest: int | None
    num_rows: int


@dataclass(frozen=True, slots=True)
class Row:
    """A packed row, and the sizes that it is filled up to; None: as it is."""

    batch: Batch
    sizes: Sizes | None = None

    @property
    def num_positions(self) -> int:
        """What the kernels work on."""
        return sum(self.batch.lengths[0]) if self.sizes is None else self.sizes.num_tokens


@dataclass(frozen=True, slots=True)
class Extent:
    """What the rows of a run need: the most tokens, the most of one document, the most supervised rows, filling aside.

    ``alike``: the commonest kinds of rows of documents that are all alike, which are captured as they are; ``largest``: sizes that every
    other row fits into, None where there is no other, or where none is filled up.
    """

    num_tokens: int
    longest: int
    num_rows: int
    alike: frozenset[Kind]
    largest: Sizes | None


def extent(batches: Iterable[Batch], *, shared: bool, policy: Policy = POLICY) -> Extent:
    """Of all ``batches`` (packed rows) of a run; ``shared``: uneven documents are filled up."""
    kinds: Counter[Kind] = Counter()
    needed: set[tuple[Kind | None, Sizes, int, int]] = set()
    tokens = longest = rows = 0
    for batch in batches:
        lengths = batch.lengths[0]
        tokens, longest, rows = max(tokens, sum(lengths)), max(longest, *lengths), max(rows, batch.num_labels)
        if shared:
            kind = kind_of(batch)
            kinds.update([kind] if kind else [])
            needed.add((kind, shared_sizes(batch, policy), len(lengths), max(lengths)))
    alike = frozenset(kind for kind, _ in kinds.most_common(_MOST_ALIKE))
    others = [(sizes, documents, most) for kind, sizes, documents, most in needed if kind not in alike]
    return Extent(tokens, longest, rows, alike, _largest(others))


def _largest(others: list[tuple[Sizes, int, int]]) -> Sizes | None:
    """Sizes that rows of so many documents, of so many tokens at most, fit into, however far each is filled up."""
    if not others:
        return None
    tokens = max(sizes.num_tokens for sizes, _, _ in others)
    documents = max(documents for _, documents, _ in others) - (-tokens // FILLER)
    are_all_short = all(sizes.longest is None for sizes, _, _ in others)
    longest = None if are_all_short else _next_power(max(longest for _, _, longest in others))
    return Sizes(tokens, documents, longest, max(sizes.num_rows for sizes, _, _ in others))


class SharedSizes:
    """Which sizes each row of a run is filled up to: captured ones, the cheapest that it fits into, until rows of its own sizes
    (``shared_sizes``) have cost so much filling that a capture of these would have been paid for. So nothing has to be launched by hand,
    and what is rare is not captured.
    """

    def __init__(self, found: Extent, policy: Policy = POLICY) -> None:
        """Of the run with this extent under the same policy, whose largest sizes are captured before its first row."""
        self._found, self._policy = found, policy
        self._captured = {found.largest} if found.largest else set()
        self._filling: Counter[Sizes] = Counter()

    def row(self, batch: Batch) -> Row:
        """The next ``batch`` (one packed row) with its sizes."""
        alone = self._found.largest is None or kind_of(batch) in self._found.alike
        return Row(batch, None if alone else self._of(batch))

    def _of(self, batch: Batch) -> Sizes:
        own, lengths = shared_sizes(batch, self._policy), batch.lengths[0]
        cheapest = min((sizes for sizes in self._captured if _fits(own, lengths, sizes)), key=_cost)
        self._filling[own] += _cost(cheapest) - _cost(own)
        if self._filling[own] < self._policy.worth_a_capture or len(self._captured) == MOST_SIZES:
            return cheapest
        self._captured.add(own)
        return own


def are_short(lengths: Sequence[int]) -> bool:
    """Whether documents of these ``lengths`` are short on the whole: a token stands in one of at most ``SHORT`` tokens, on average.

    Then attention by kernels of our own takes less time than FlashAttention 2, foretold from four timings of both at 230 and at 2,816
    such tokens: as long at 1,045 with heads of 128, later with heads of 64 (H100, docs/log.md, 2026-11-28).
    """
    return sum(length * length for length in lengths) <= SHORT * sum(lengths)


def longest_asked_for(lengths: Sequence[int]) -> int | None:
    """Tokens of the longest of documents of these ``lengths``; None where attention does not ask."""
    return None if len(set(lengths)) > 1 and are_short(lengths) else max(lengths)


def own_sizes(batch: Batch) -> Sizes:
    """Of ``batch`` (one packed row) as it is."""
    lengths = batch.lengths[0]
    return Sizes(sum(lengths), len(lengths), longest_asked_for(lengths), max(1, batch.num_labels))  # no kernel is launched over nothing


def shared_sizes(batch: Batch, policy: Policy = POLICY) -> Sizes:
    """Sizes for ``batch`` (one packed row): each rounded up, with at least one token of filling for the rows that fill up, and documents
    for smaller rows to fill a quarter of it.
    """
    lengths = batch.lengths[0]
    tokens = rounded_up(sum(lengths) + 1, policy)
    fillers = -(-tokens // (4 * FILLER)) + 1
    longest = None if are_short(lengths) else _next_power(max(lengths))
    return Sizes(tokens, len(lengths) + fillers, longest, rounded_up(batch.num_labels, policy))


def filled(batch: Batch, sizes: Sizes) -> Batch:
    """``batch`` with documents of filling up to ``sizes.num_tokens``; none of their tokens is supervised."""
    missing = sizes.num_tokens - sum(batch.lengths[0])
    ids = np.pad(batch.input_ids, ((0, 0), (0, missing)))
    labels = np.pad(batch.labels, ((0, 0), (0, missing)), constant_values=IGNORE)
    return Batch(ids, labels, ((*batch.lengths[0], *_fillers(missing)),))


def filling(sizes: Sizes) -> Batch:
    """Nothing but filling, of these sizes."""
    one = np.zeros((1, 1), np.int64)
    return filled(Batch(one, np.full_like(one, IGNORE), ((1,),)), sizes)  # documents of two lengths, so that attention takes any


def rounded_up(count: int, policy: Policy = POLICY) -> int:
    """The next of the sizes that rows share, a multiple of ``_SMALLEST``."""
    step = max(_SMALLEST, _next_power(count) // 2 // policy.steps_an_octave)
    return -(-count // step) * step


def _next_power(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


def kind_of(batch: Batch) -> Kind | None:
    """Of a row (one packed row) of documents that are all alike; None for others."""
    lengths = batch.lengths[0]
    return (len(lengths), lengths[0], batch.num_labels) if len(set(lengths)) == 1 else None


def _cost(sizes: Sizes) -> int:
    """In positions: a row of logits costs about a quarter of what the layers make of a position (0.27 at 1B, 0.08 at 8B)."""
    return sizes.num_tokens + sizes.num_rows // 4


def _fits(own: Sizes, lengths: Sequence[int], sizes: Sizes) -> bool:
    """Whether documents of these ``lengths``, which make a row of sizes ``own``, can be filled up to ``sizes``."""
    for_short = sizes.longest is None
    if own.num_tokens > sizes.num_tokens or own.num_rows > sizes.num_rows or (for_short and own.longest is not None):
        return False
    if sizes.longest is not None and max(lengths) > sizes.longest:
        return False
    return len(lengths) + len(_fillers(sizes.num_tokens - sum(lengths))) <= sizes.num_documents


def _fillers(missing: int) -> list[int]:
    return [min(FILLER, missing - start) for start in range(0, missing, FILLER)]
