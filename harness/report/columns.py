"""What columns of a ranking hold, in every form of the report: the place, and which memory counts."""

from __future__ import annotations

from harness.rank import Group, Variant


def place(variant: Variant, group: Group) -> str:
    """``1``, ``2=`` when others share the rank, nothing for what did not run."""
    if variant.rank is None:
        return ""
    shared = sum(other.rank == variant.rank for other in group.variants) > 1
    return f"{variant.rank}=" if shared else str(variant.rank)


def memory_name(group: Group) -> str:
    """What the memory column holds: the allocator's peak on a GPU, resident memory of the process on a CPU."""
    return "peak allocated GiB" if group.machine.device == "cuda" else "peak RSS GiB"


def memory_bytes(variant: Variant, group: Group) -> int | None:
    """The figure for :func:`memory_name`."""
    return variant.peak_allocated_bytes if group.machine.device == "cuda" else variant.peak_rss_bytes
