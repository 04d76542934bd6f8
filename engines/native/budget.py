"""What each layer of a run keeps: all, its input, or what a budget of memory allows; the knobs ask, the planner answers."""

from __future__ import annotations

import math
import warnings

import torch

from engines.native.footprint import MemoryModel, largest_load
from engines.native.host import usable_bytes
from engines.native.plan import KEEP_ALL, KEEP_INPUT, USABLE, Plan, PlanningKnobs, described
from engines.native.planner import Choice, choose
from engines.native.ranks import least
from engines.native.replicas import Shares
from engines.native.shape import LlamaShape
from engines.native.weights import DecoderWeights
from harness.engine import Chosen, Job


def plans_for(
    job: Job, knobs: PlanningKnobs, shape: LlamaShape, weights: DecoderWeights, shares: Shares
) -> tuple[tuple[Plan, ...], int, dict[str, Chosen]]:
    """What each layer keeps, rows of logits, and both in words with what is predicted.

    On a CPU without ``memory_gib`` all is kept: the host's memory is not ours alone.
    """
    if knobs.recompute != "fit" or (job.device == "cpu" and knobs.memory_gib is None):
        plans = (KEEP_INPUT if knobs.recompute == "full" else KEEP_ALL,) * shape.num_layers
        return plans, knobs.loss_chunk, {"plan": described(plans)}
    load = largest_load(shares.every(), knobs.loss_chunk, shares.extent.largest if shares.extent else None)
    # Ranks that gather a base together must make the same things again, so all plan with what the one with least memory has.
    budget = knobs.memory_gib * 2**30 if knobs.memory_gib is not None else least(_free_bytes())
    choice = choice_within(
        MemoryModel.of(shape, weights, load, knobs.products),
        budget,
        offload=knobs.offload and job.device == "cuda",
        processes=job.processes,
    )
    return (
        choice.plans,
        choice.loss_chunk,
        {
            "plan": described(choice.plans),
            "loss_chunk": choice.loss_chunk,
            "predicted_peak_bytes": choice.peak_bytes,
            "pinned_bytes": choice.host_bytes,
        },
    )


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
