"""Why the fused engine does not train a method or a model; light to import."""

from __future__ import annotations

from engines.native.shape import read_shape
from harness.errors import UnsupportedError
from harness.spec import Lora, Workload

_TARGETS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


def method_reasons(workload: Workload, compute_dtype: str) -> list[str]:
    """Types and modules that it does not train."""
    method, reasons = workload.method, []
    if method.dtype == "float16":
        reasons.append("method.dtype=float16 needs loss scaling, which fused does not do; use float32 or bfloat16")
    elif compute_dtype == "float32" and method.dtype != "float32":
        reasons.append(f"compute_dtype=float32 does not train {method.dtype} weights; set method.dtype=float32 or compute_dtype=bfloat16")
    unknown = sorted(set(method.targets) - _TARGETS) if isinstance(method, Lora) else []
    if unknown:
        reasons.append(f"method.targets has {', '.join(unknown)}; fused adapts {', '.join(sorted(_TARGETS))}")
    return reasons


def state_reasons(workload: Workload, optimizer_state: str, compute_dtype: str) -> list[str]:
    """Where 8-bit moments, and weights without masters, have no place."""
    if optimizer_state == "fp32":
        return []
    if isinstance(workload.method, Lora):
        return ["optimizer_state=int8 is for method=full: an adapter's moments are small beside the base; use optimizer_state=fp32"]
    if compute_dtype != "bfloat16" or workload.method.dtype != "float32":
        return [
            "optimizer_state=int8 keeps the weights in bfloat16, rounded at random; it needs compute_dtype=bfloat16, method.dtype=float32"
        ]
    return []


def product_reasons(products: str, operations: str, *, replay: bool) -> list[str]:
    """Where products cannot be made in the fastest way."""
    if products == "torch":
        return []
    reasons = []
    if operations != "fused":
        reasons.append("products=fastest asks cuBLASLt, which operations=reference does not use; set products=torch or operations=fused")
    if not replay:
        reasons.append(
            "products=fastest times every size that a step has for the first time, and only replay=true makes steps share sizes; "
            "set products=torch"
        )
    return reasons


def model_reasons(workload: Workload) -> list[str]:
    """What the decoder layer does not have."""
    if workload.model.config is None:
        return []
    try:
        read_shape(workload.model.config, workload.data.sequence_length)
    except UnsupportedError as error:
        return [str(error)]
    return []
