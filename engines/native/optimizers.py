"""Which AdamW trains a decoder's weights: of adapters or of everything, by kernels or in plain torch."""

from __future__ import annotations

from engines.native.full import full_optimizer
from engines.native.lora_plus import are_of_b, rates
from engines.native.optimizer import AdamW, Optimizer
from engines.native.weights import Arena, DecoderWeights, trained_weights
from harness.spec import Lora, Workload


def optimizer_for(weights: DecoderWeights, workload: Workload, *, kernels: bool) -> Optimizer:
    """AdamW as ``workload`` says; its state is made here."""
    arena, trained, schedule = weights.arena, trained_weights(weights), workload.train
    if not isinstance(arena, Arena):
        return full_optimizer(arena, schedule, kernels=kernels)
    ratio = workload.method.b_learning_rate_ratio if isinstance(workload.method, Lora) else 1.0
    if not kernels:
        return AdamW(arena, trained, schedule, rates(weights, trained, ratio))
    from engines.native.kernels.adamw import FlatAdamW  # on a CPU nothing may import Triton

    values, betas = [weight.value for weight in trained], (schedule.beta1, schedule.beta2)
    apart = are_of_b(weights, trained)
    return FlatAdamW(arena.masters, values, betas, schedule.epsilon, schedule.weight_decay, ratio, apart)
