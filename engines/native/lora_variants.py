"""Variants of LoRA that a workload may ask for, and why an engine cannot train one; light to import."""

from __future__ import annotations

from harness.spec import Lora, Workload


def variant_reasons(workload: Workload, *, rank_stabilised: bool, ratio: bool) -> list[str]:
    """What of ``workload``'s method an engine does not do: it knows alpha / sqrt(rank) or not, a learning rate of B's own or not."""
    method = workload.method
    if not isinstance(method, Lora):
        return []
    reasons = []
    if method.dropout:
        reasons.append(f"method.dropout={method.dropout:g}: every engine would draw masks of its own, and none be compared; set it to 0")
    if method.dora:
        reasons.append(
            "method.dora=true: no engine here forms W + s B A in a step, whose rows' norms DoRA divides by, "
            "and the shared initial adapter holds no magnitudes; set it to false"
        )
    if method.rank_stabilised and not rank_stabilised:
        reasons.append("method.rank_stabilised=true has not been tried with this engine's adapters; use engine=hf or engine=fused")
    if method.b_learning_rate_ratio != 1 and not ratio:
        reasons.append(
            f"method.b_learning_rate_ratio={method.b_learning_rate_ratio:g}: this engine's optimizer has one learning rate; "
            "use engine=hf or engine=fused, or set it to 1"
        )
    return reasons
