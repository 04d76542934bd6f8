"""What a layer's backward pass finds where: a plan says of every tensor whether it is kept, waits in host memory, or is made again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, get_args

# What a layer makes in its forward pass and reads in its backward pass. Norm outputs and h are not among them: what needs them makes them
# again in one cheap pass, or does without. ``input`` is the sum of the residual stream, which nothing in the layer can make again.
Name = Literal["input", "inverse", "low_qkv", "qkv", "heads", "attended", "middle", "mlp_inverse", "low_gate_up", "gate_up", "low_down"]
Names = frozenset[Name]
# Of pinned host memory: its allocator rounds up to powers of two, so memory is taken in slabs of one.
SLAB_BYTES = 256 * 2**20
MOVABLE: Names = frozenset(("input", "qkv", "heads", "attended", "middle", "gate_up"))

USABLE = 0.95  # of the free memory: contexts, workspaces and fragments want some


class PlanningKnobs(Protocol):
    """The knobs of an engine that plans with this shelf."""

    @property
    def recompute(self) -> str:
        """fit: by the planner; none; full."""

    @property
    def memory_gib(self) -> float | None:
        """The planner's budget; None: all there is."""

    @property
    def offload(self) -> bool:
        """Whether tensors may wait in host memory."""

    @property
    def operations(self) -> str:
        """fused: on a GPU."""

    @property
    def loss_chunk(self) -> int:
        """Rows of logits at one time."""

    @property
    def base(self) -> str:
        """sharded: of several ranks, each keeps its part of the base."""

    @property
    def replay(self) -> bool:
        """Whether uneven documents are filled up to sizes that steps share."""

    @property
    def products(self) -> str:
        """torch; fastest: with a workspace of their own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``kept`` stays on the device, ``offloaded`` waits in host memory, all else is made again by backward.

    ``pieces``: a gate and up that are not held are made, and their gradients too, so many parts of the rows at a time.
    """

    kept: Names
    offloaded: Names = frozenset()
    pieces: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a plan that says two things of one tensor, or that has no input."""
        if self.kept & self.offloaded or "input" not in self.held or self.offloaded - MOVABLE or self.pieces < 1:
            raise ValueError(
                f"{self} is no plan: a name is kept or offloaded, not both, the input one of them; "
                f"only {', '.join(sorted(MOVABLE))} can be offloaded; there is at least 1 piece"
            )

    @property
    def held(self) -> Names:
        """What need not be made again."""
        return self.kept | self.offloaded

    @property
    def early(self) -> Names:
        """What the first half of backward, the MLP's, needs of the host; the rest is needed in the second half only."""
        needed: set[Name] = {"gate_up", "middle"}
        if "middle" not in self.held:  # made again from the input and from the nearest held tensor before it
            needed |= {"input", "attended"}
            if "attended" not in self.held:
                needed |= {"heads", "qkv"}
        return self.offloaded & needed


def described(plans: Sequence[Plan]) -> str:
    """How many layers make which tensors again, send which to the host, and do what in parts."""
    said = []
    for word, names in (("again", [KEEP_ALL.kept - plan.held for plan in plans]), ("offloaded", [plan.offloaded for plan in plans])):
        counts = Counter(chain(*names))
        if counts:
            said.append(f"{word} " + ", ".join(f"{name} x{counts[name]}" for name in sorted(counts)))
    said += [f"{count} layers in {pieces} pieces" for pieces, count in sorted(Counter(plan.pieces for plan in plans).items()) if pieces > 1]
    return "; ".join(said) or "all kept"


def fingerprint(plans: Sequence[Plan], loss_chunk: int) -> bytes:
    """The same for the same plans, in every process."""
    layers = [f"{sorted(plan.kept)} {sorted(plan.offloaded)} {plan.pieces}" for plan in plans]
    return hashlib.sha256(f"{layers} {loss_chunk}".encode()).digest()


KEEP_INPUT = Plan(frozenset(("input",)))
KEEP_ALL = Plan(frozenset(get_args(Name)))
