"""What the fused engine's settings are called, where they decide what it is compared with: ``sharded``, ``within-17.7``, ``int8``."""

from __future__ import annotations

from typing import Protocol


class NamedKnobs(Protocol):
    """The knobs that have a part in the name."""

    @property
    def base(self) -> str:
        """Replicated, or sharded."""

    @property
    def memory_gib(self) -> float | None:
        """A budget, or all there is."""

    @property
    def optimizer_state(self) -> str:
        """Of method=full."""


def variant(knobs: NamedKnobs) -> str | None:
    """A base that ranks share, the budget in GiB, 8-bit moments; None for the engine as it comes."""
    names = [
        "" if knobs.base == "replicated" else knobs.base,
        "" if knobs.memory_gib is None else f"within-{knobs.memory_gib:g}",
        "" if knobs.optimizer_state == "fp32" else knobs.optimizer_state,
    ]
    return "+".join(filter(None, names)) or None
