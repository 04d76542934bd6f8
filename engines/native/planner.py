"""How much memory a step needs, and which tensors to make again so that it needs no more than there is.

Everything that backward reads of a layer may be kept or made again, each on its own: gate and up, the rotated heads, attention's
output, the sum in the middle. They are given up in the order of bytes freed for time spent, first in the lowest layers: those are
read last, when what the layers above kept is already free.

Legend: T tokens, H hidden, I intermediate, N columns of query, key and value, C query heads, P padded ranks, L supervised rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engines.native.buckets import shared_sizes
from engines.native.layer import KEEP_ALL, Name, Plan
from engines.native.shape import LlamaShape
from engines.native.weights import DecoderWeights
from harness.data.tokens import IGNORE, Batch
from harness.errors import UnsupportedError

_GIB = 2**30
# Only their ratio counts: what products and passes over memory cost on an H100 (docs/engine.md).
_FLOPS, _BYTES = 650e12, 2.8e12
_SLACK = 1.02  # predictions have been up to 1.6 % low (docs/log.md, 2026-11-24)


@dataclass(frozen=True, slots=True)
class Load:
    """What one forward and backward pass works on: tokens, tokens of the longest document, supervised rows, rows of logits at once."""

    num_tokens: int
    longest: int
    num_rows: int
    loss_chunk: int


def largest_load(batches: Iterable[Batch], loss_chunk: int, *, shared: bool) -> Load:
    """The most of each over ``batches`` (packed rows); ``shared``: as replayed steps fill uneven documents up."""
    tokens = longest = rows = 0
    for batch in batches:
        lengths = batch.lengths[0]
        sizes = shared_sizes(batch) if shared and len(set(lengths)) > 1 else None
        labelled = int((batch.labels[0] != IGNORE).sum())
        tokens = max(tokens, sizes.num_tokens if sizes else sum(lengths))
        longest = max(longest, *lengths)
        rows = max(rows, sizes.num_rows if sizes else labelled)
    return Load(tokens, longest, rows, loss_chunk)


def stored_bytes(weights: DecoderWeights) -> int:
    """Bytes of all weights, masters and gradients, what shares memory counted once."""
    tensors = [weights.embedding.value, weights.norm.value, weights.head.value, weights.arena.masters, weights.arena.gradients]
    for layer in weights.layers:
        tensors += [norm.value for _, norm in layer.norms]
        for group in layer.groups:
            tensors += [group.wide, *([group.bias.value] if group.bias else [])]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@dataclass(frozen=True, slots=True)
class Ranks:
    """Padded ranks of the four linear groups of a layer."""

    qkv: int
    output: int
    gate_up: int
    down: int


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of a step by what they are for. ``static``: what is there all the time; ``element_bytes``: of an activation."""

    shape: LlamaShape
    ranks: Ranks
    load: Load
    static: int
    element_bytes: int

    @classmethod
    def of(cls, shape: LlamaShape, weights: DecoderWeights, load: Load) -> MemoryModel:
        """For weights that are loaded: their own bytes, two moments of the trained values, angles and the packed row."""
        ranks = Ranks(*(group.padded_rank for group in weights.layers[0].groups))
        moments = 2 * weights.arena.masters.nbytes
        angles = 4 * shape.head_dim * (load.longest + load.num_tokens)
        static = stored_bytes(weights) + moments + angles + 24 * load.num_tokens
        return cls(shape, ranks, load, static, weights.norm.value.element_size())

    def bytes_of(self, name: Name) -> int:
        """One kept tensor of one layer."""
        shape, ranks = self.shape, self.ranks
        columns = {
            "heads": shape.query_size + 2 * shape.key_size,
            "qkv": shape.query_size + 2 * shape.key_size if shape.qk_norm else 0,
            "attended": shape.query_size + ranks.output,
            "middle": shape.hidden_size,
            "gate_up": 2 * shape.intermediate_size + ranks.gate_up,
            "low_qkv": ranks.qkv,
            "low_gate_up": ranks.gate_up,
            "low_down": ranks.down,
        }
        statistics = {"inverse": 4, "mlp_inverse": 4, "attended": 4 * shape.num_heads}
        return self.load.num_tokens * (columns.get(name, 0) * self.element_bytes + statistics.get(name, 0))

    def seconds_of(self, name: Name) -> float:
        """Making one tensor of one layer again."""
        shape, tokens = self.shape, self.load.num_tokens
        hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.query_size + 2 * shape.key_size
        flops = {
            "heads": 2 * hidden * heads,
            "attended": 2 * self.load.longest * shape.query_size,
            "middle": 2 * hidden * shape.query_size,
            "gate_up": 4 * hidden * inner,
        }
        passes = {"heads": 3 * hidden + 3 * heads, "attended": 3 * shape.query_size, "middle": hidden, "gate_up": 3 * hidden + 2 * inner}
        return tokens * (flops.get(name, 0) / _FLOPS + passes.get(name, 0) * self.element_bytes / _BYTES)

    def kept(self, plan: Plan) -> int:
        """One layer between its forward and its backward pass."""
        return self.load.num_tokens * self.shape.hidden_size * self.element_bytes + sum(self.bytes_of(name) for name in plan)

    def peak(self, plans: Sequence[Plan]) -> int:
        """The most that is allocated at one time during a step."""
        below = [0]
        for plan in plans:
            below.append(below[-1] + self.kept(plan))
        passes = [below[index] + self._backward(plan) for index, plan in enumerate(plans)]
        return self.static + max(below[-1] + self._loss(), *passes)

    def _loss(self) -> int:
        """At the end of forward: the stream's last addend, three tensors of supervised rows, a chunk of logits."""
        load, hidden = self.load, self.shape.hidden_size
        chunk = min(load.loss_chunk, load.num_rows) * self.shape.vocab_size
        return self.element_bytes * (load.num_tokens * hidden + 3 * load.num_rows * hidden + chunk)

    def _backward(self, plan: Plan) -> int:
        """One layer's backward pass: all that it reads, kept or made again, and the larger of its two halves."""
        shape, ranks, tokens = self.shape, self.ranks, self.load.num_tokens
        hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.query_size
        heads = queries + 2 * shape.key_size
        streams = 2 * hidden + ranks.down + ranks.output
        mlp = streams + inner + (hidden + ranks.gate_up if "gate_up" not in plan else 0)
        # The attention's backward sums dq in float32 before it is rounded.
        attention = streams + 2 * queries + 2 * heads + ranks.qkv + queries * 4 // self.element_bytes
        return self.kept(KEEP_ALL) + tokens * self.element_bytes * max(mlp, attention)


# Small beside the others, and dear to make again: always kept.
_ALWAYS: Plan = frozenset(("inverse", "mlp_inverse", "low_qkv", "low_gate_up", "low_down"))


def plans_within(model: MemoryModel, budget_bytes: float) -> tuple[Plan, ...]:
    """What each layer keeps so that a step stays within ``budget_bytes``, at the least recomputation.

    Raises UnsupportedError with what would be needed when even keeping next to nothing is too much.
    """
    plans = [KEEP_ALL] * model.shape.num_layers
    # The projection before the heads' norms is worth nothing without the heads, nor they without it: both or none.
    units: list[tuple[Name, ...]] = [("gate_up",), ("heads", "qkv"), ("attended",), ("middle",)]
    units.sort(key=lambda unit: sum(map(model.seconds_of, unit)) / sum(map(model.bytes_of, unit)))
    for unit in units:
        for index in range(len(plans)):
            if _SLACK * model.peak(plans) <= budget_bytes:
                return tuple(plans)
            plans[index] = plans[index] - frozenset(unit)
    if _SLACK * model.peak(plans) <= budget_bytes:
        return tuple(plans)
    raise UnsupportedError(
        f"this step needs at least {_SLACK * model.peak(plans) / _GIB:.1f} GiB (predicted) with everything made again that can be, "
        f"and {budget_bytes / _GIB:.1f} GiB are there; use a smaller engine.knobs.micro_batch or loss_chunk, or shorter samples"
    )
