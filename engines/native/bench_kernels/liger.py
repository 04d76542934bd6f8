"""Liger's kernels for the same operations, called as its autograd functions call them; liger-kernel is optional, so imported inside.

Where Liger's operation does less than the row's, the page says so.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from engines.native.bench_kernels.setting import Call, restore

_PLAIN = "llama"  # its name for the norm that rounds before it multiplies by the weight


def version() -> str | None:
    """The installed version, None without one."""
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> Call:
    """The sum and its norm."""
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return Call(lambda: fused_add_rms_norm_forward(x, delta, weight, epsilon, 0.0, _PLAIN))


def rms_norm_backward(dy: Tensor, residual: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Call:
    """With the residual's gradient, without the weight's."""
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward, fused_add_rms_norm_forward

    _, sums, inverse, block, warps, stages, mode = fused_add_rms_norm_forward(x, torch.zeros_like(x), weight, epsilon, 0.0, _PLAIN)
    there = residual.contiguous()
    return Call(
        lambda: fused_add_rms_norm_backward(dy, there, sums, weight, inverse, 0.0, mode, block, warps, stages, False, needs_dw=False)
    )


def swiglu(gate_up: Tensor) -> Call:
    """From gate and up apart."""
    from liger_kernel.ops.swiglu import swiglu_forward

    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=1))
    return Call(lambda: swiglu_forward(gate, up))


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Call:
    """In the place of gate and up; h is not made."""
    from liger_kernel.ops.swiglu import swiglu_backward as backward

    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=1))
    resets, gradient = (restore(gate), restore(up)), dh.contiguous()
    return Call(lambda: backward(gate, up, gradient), lambda: [reset() for reset in resets])


def rotate(queries: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor) -> Call:
    """In place, queries and keys apart."""
    from liger_kernel.ops.rope import rope_forward

    q, k, cos, sin = _roped(queries, keys, cosine, sine)
    return Call(lambda: rope_forward(q, k, cos, sin))


def rotate_back(queries: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor) -> Call:
    """In place; nothing is laid side by side."""
    from liger_kernel.ops.rope import rope_backward

    q, k, cos, sin = _roped(queries, keys, cosine, sine)
    return Call(lambda: rope_backward(q, k, cos, sin))


def cross_entropy(logits: Tensor, targets: Tensor) -> Call:
    """Losses and gradient in place; its checks of the targets wait for the GPU, and that time is in it."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    mine: Any = logits.detach().clone().requires_grad_()
    return Call(lambda: cross_entropy_forward(mine, targets, None, -100, 0.0, 0.0, "sum", None, False), restore(mine))


def _roped(queries: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (x.contiguous().unsqueeze(0).transpose(1, 2) for x in (queries, keys))
    cos, sin = (torch.cat((half, half), dim=1).to(queries.dtype).unsqueeze(0) for half in (cosine, sine))
    return q, k, cos, sin
