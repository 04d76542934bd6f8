"""What each layer of a run keeps: all, its input, or what a budget of memory allows; the knobs ask, the planner answers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch

from engines.native.footprint import MemoryModel, largest_load
from engines.native.host import usable_bytes
from engines.native.plan import KEEP_ALL, KEEP_INPUT, USABLE, Plan, PlanningKnobs, described
from engines.native.planner import Choice, choose
from engines.native.ranks import least
from engines.native.replicas import Shares
from engines.native.shape import LlamaShape
from engines.native.weights import DecoderWeights, Weight
from harness.engine import Chosen, Job


@dataclass(frozen=True, slots=True)
class Planned:
    """What each layer keeps, rows of logits, whether the embedding waits on the host, and all of it in words with what is predicted."""

    plans: tuple[Plan, ...]
    loss_chunk: int
    embedding_away: bool
    chosen: dict[str, Chosen]


def plans_for(job: Job, knobs: PlanningKnobs, shape: LlamaShape, weights: DecoderWeights, shares: Shares) -> Planned:
    """What the knobs ask for, answered by the planner where they leave it open.

    On a CPU without ``memory_gib`` all is kept: the host's memory is not ours alone.
    """
    if knobs.recompute != "fit" or (job.device == "cpu" and knobs.memory_gib is None):
        plans = (KEEP_INPUT if knobs.recompute == "full" else KEEP_ALL,) * shape.num_layers
        return Planned(plans, knobs.loss_chunk, False, {"plan": described(plans)})
    load = largest_load(shares.extent, knobs.loss_chunk)
    # Ranks that gather a base together must make the same things again, so all plan with what the one with least memory has.
    budget = knobs.memory_gib * 2**30 if knobs.memory_gib is not None else least(_free_bytes())
    memory = MemoryModel.of(shape, weights, load, may_move=knobs.operations == "fused")
    choice = choice_within(memory, budget, offload=knobs.offload and job.device == "cuda", processes=job.processes)
    chosen: dict[str, Chosen] = {
        "plan": described(choice.plans) + ("; embedding on the host" if choice.embedding_away else ""),
        "loss_chunk": choice.loss_chunk,
        "predicted_peak_bytes": choice.peak_bytes,
        "pinned_bytes": choice.host_bytes,
    }
    return Planned(choice.plans, choice.loss_chunk, choice.embedding_away, chosen)


def with_embedding_on_host(weights: DecoderWeights) -> DecoderWeights:
    """The embedding in pinned memory, which kernels read over the bus."""
    value = weights.embedding.value
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    pinned.copy_(value)
    return replace(weights, embedding=Weight(pinned))


def choice_within(memory: MemoryModel, budget: float, *, offload: bool, processes: int) -> Choice:
    """The planner's choice; says so where the host has too little memory for it."""
    host = least(usable_bytes() / processes) if offload else 0.0
    choice = choose(memory, budget, math.inf if offload else 0.0)
    if choice.host_bytes <= host:
        return choice
    warnings.warn(
        f"{choice.host_bytes / 2**30:.1f} GiB would be offloaded, but only {host / 2**30:.1f} GiB of host memory may be pinned, "
        "half of what is free: more is made again instead",
        RuntimeWarning,
        stacklevel=2,
    )
    return choose(memory, budget, host)


def _free_bytes() -> float:
    """What this process may have allocated at one time, some of the free memory left for contexts, workspaces and fragments."""
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total
    return min(USABLE * free + torch.cuda.memory_allocated(), USABLE * allowed)
