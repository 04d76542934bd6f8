"""FUSED and FILLING: the operations of the table by Triton, cuBLAS and cuDNN, for bf16 LoRA on an NVIDIA GPU.

Legend: T tokens, H hidden, N output and K input columns of a linear group, P its padded ranks, W = N + P, L supervised rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.native import attention as attend
from engines.native import reference
from engines.native.kernels.cross_entropy import cross_entropy_
from engines.native.kernels.embedding import embed
from engines.native.kernels.head_norms import norm_rotate, norm_rotate_back
from engines.native.kernels.nf4 import decode_nf4
from engines.native.kernels.outer import COLUMNS, add_outer_
from engines.native.kernels.parts import copy_parts
from engines.native.kernels.rms_norm import rms_norm, rms_norm_backward
from engines.native.kernels.rotary import rotate_
from engines.native.kernels.rotary import rotate_back as rotate_rows_back
from engines.native.kernels.swiglu import swiglu as swiglu_rows
from engines.native.kernels.swiglu import swiglu_backward_
from engines.native.kernels.swiglu_gradients import swiglu_gradients_
from engines.native.nf4 import Filling
from engines.native.ops import HeadNorms, Heads, Input, Normed, NormSource, Ops
from engines.native.packed import Packed
from engines.native.weights import Linear, LowRank, Weight
from engines.native.wide_input import with_low


def norm(x_TH: Tensor, delta_TH: Tensor | None, weight: Weight, epsilon: float, linear: Linear) -> Normed:
    """The sum and its RMSNorm in one kernel, and one product for x A^T behind it."""
    wide_TW, inverse_T, sum_TH = rms_norm(x_TH, weight.value, epsilon, linear.padded_rank, delta_TH)
    return Normed(with_low(wide_TW, linear, outlives=True), sum_TH, inverse_T)


def norm_backward(dy_TH: Tensor, x_TH: Tensor, inverse_T: Tensor, weight: Weight, residual_TH: Tensor | None, padded_rank: int) -> Tensor:
    """One kernel with the residual in it. Only for frozen norms."""
    return rms_norm_backward(dy_TH, x_TH, weight.value, inverse_T, residual_TH, padded_rank)


def plain_norm(x: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """One kernel."""
    return rms_norm(x, weight.value, epsilon, 0)[0]


def plain_norm_backward(dy: Tensor, x: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """The rows' root mean squares once more, then one kernel."""
    _, inverse, _ = rms_norm(x, weight.value, epsilon, 0)
    return rms_norm_backward(dy, x, weight.value, inverse, None, 0)


def linear(input: Input, linear: Linear, room: int) -> Tensor:
    """One product; the bias rides in its epilogue."""
    outputs = linear.num_outputs
    weight = linear.wide[:outputs].t()
    y_TN = input.wide.new_empty(len(input.wide), outputs + room)[:, :outputs]
    if linear.bias is not None:
        return torch.addmm(linear.bias.value, input.wide, weight, out=y_TN)
    return torch.mm(input.wide, weight, out=y_TN)


def fill(dy_TW: Tensor, linear: Linear) -> None:
    """s dy B into the columns from N on, one product: beside each block's B the buffer holds zeros.

    H100, Llama-3.1-8B shape, 8,192 tokens (2026-11-26, ms): query, key and value 0.049 for 0.074 in three products.
    """
    if linear.lora is None:
        return
    outputs, into = linear.num_outputs, dy_TW[:, linear.num_outputs :]
    torch.addmm(into, dy_TW[:, :outputs], linear.wide[:outputs, linear.num_inputs :], beta=0, alpha=linear.lora.scale, out=into)


def weight_gradients(dy_TW: Tensor, source: Tensor | NormSource, linear: Linear) -> None:
    """dA; a normed input is not made again for it."""
    if linear.lora is None:
        return
    lora = linear.lora
    x_TK, scaling = (source.x, (source.inverse, source.weight.value)) if isinstance(source, NormSource) else (source, None)
    assert lora.down.gradient is not None
    add_outer_(lora.down.gradient.t(), x_TK, _thin(dy_TW, linear, lora), lora.arrived, scaling)


def up_gradients(dy_TW: Tensor, low_TP: Tensor | None, linear: Linear) -> None:
    """dB, in one launch where the blocks begin at whole tiles."""
    if linear.lora is None:
        return
    lora = linear.lora
    assert low_TP is not None
    assert lora.up.grad is not None
    starts = [block.output.start for block in lora.blocks[1:]]
    if len(lora.up) == linear.num_outputs and not any(start % COLUMNS for start in starts):
        add_outer_(lora.up.grad, dy_TW[:, : linear.num_outputs], low_TP, lora.arrived, starts=starts)
        return
    for block in lora.blocks:
        assert block.up.gradient is not None
        add_outer_(block.up.gradient, dy_TW[:, block.output], low_TP[:, block.rank], lora.arrived)


def rotate(projected: Heads, norms: HeadNorms | None, packed: Packed) -> Heads:
    """One launch, norms included; the queries and keys of a token lie side by side."""
    x_TN, angles = _side_by_side(projected), (packed.cosine, packed.sine)
    heads, kv_heads = projected.queries.shape[1], projected.keys.shape[1]
    if norms is None:
        rotate_(x_TN, heads + kv_heads, *angles)
        return projected
    rotated = norm_rotate(x_TN, heads, kv_heads, norms.query.value, norms.key.value, norms.epsilon, *angles)
    return Heads(rotated[:, :heads], rotated[:, heads:], projected.values)


def rotate_back(gradients: Heads, projected: Heads | None, norms: HeadNorms | None, packed: Packed, padded_rank: int) -> Tensor:
    """One kernel from three gradients to the gradient of the projection, norms included. Only for frozen norms."""
    given, angles = (gradients.queries, gradients.keys, gradients.values), (packed.cosine, packed.sine)
    if projected is None or norms is None:
        return rotate_rows_back(*given, *angles, padded_rank)
    x_TN = _side_by_side(projected)
    return norm_rotate_back(*given, x_TN, norms.query.value, norms.key.value, norms.epsilon, *angles, padded_rank)


def swiglu(gate_up_TN: Tensor, linear: Linear) -> Input:
    """One kernel, and one product for h A^T."""
    return with_low(swiglu_rows(gate_up_TN, linear.padded_rank), linear, outlives=True)


def swiglu_backward(d_h_TK: Tensor, gate_up_TN: Tensor, dy_TW: Tensor, low_TP: Tensor | None, down: Linear, group: Linear) -> Tensor:
    """One kernel, thin gradients included, where all three linears are adapted alike; the result lies where gate_up was."""
    inner, outer = down.lora, group.lora
    if inner is not None and outer is not None and low_TP is not None and _all_alike(inner, outer, group):
        assert inner.down.gradient is not None
        assert outer.up.grad is not None
        thin_TR = _thin(dy_TW, down, inner)
        return swiglu_gradients_(d_h_TK, gate_up_TN, group.padded_rank, thin_TR, low_TP, inner.down.gradient, outer.up.grad, inner.arrived)
    h_TK, gradient_TW = swiglu_backward_(d_h_TK, gate_up_TN, group.padded_rank)
    weight_gradients(dy_TW, h_TK, down)
    up_gradients(gradient_TW, low_TP, group)
    return gradient_TW


def cross_entropy(hidden_LH: Tensor, head: Weight, targets_L: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Logits of ``chunk`` rows at a time in one buffer: a product, one kernel that makes them their gradient, a product; a third for a head
    that is trained.
    """
    d_hidden_LH = torch.empty_like(hidden_LH)
    losses_L = torch.empty(len(hidden_LH), dtype=torch.float32, device=hidden_LH.device)
    buffer = hidden_LH.new_empty(min(chunk, len(hidden_LH)), len(head.value))
    for start in range(0, len(hidden_LH), chunk):
        rows = slice(start, min(start + chunk, len(hidden_LH)))
        logits = buffer[: rows.stop - rows.start]
        torch.mm(hidden_LH[rows], head.value.t(), out=logits)
        cross_entropy_(logits, targets_L[rows], losses_L[rows], scale)
        torch.mm(logits, head.value, out=d_hidden_LH[rows])
        head.add_product(logits, hidden_LH[rows])
    return losses_L, d_hidden_LH


def _side_by_side(heads: Heads) -> Tensor:
    """[T, (C + G) D]: queries and keys as the rows of one view. Raises ValueError where they do not lie in one buffer."""
    queries, keys = heads.queries, heads.keys
    (tokens, num_heads, head_dim), row = queries.shape, queries.stride(0)
    if keys.data_ptr() - queries.data_ptr() != num_heads * head_dim * queries.element_size() or keys.stride(0) != row:
        raise ValueError("queries and keys lie apart; expected views of one projection, keys behind queries")
    return queries.as_strided((tokens, (num_heads + keys.shape[1]) * head_dim), (row, 1))


def _thin(dy_TW: Tensor, linear: Linear, lora: LowRank) -> Tensor:
    """s dy B of a filled dy, without the padding."""
    return dy_TW[:, linear.num_outputs : linear.num_outputs + len(lora.down.value)]


def _all_alike(down: LowRank, gate_up: LowRank, group: Linear) -> bool:
    """Whether gate and up are both adapted, with as many ranks as the down projection."""
    return len(gate_up.up) == group.num_outputs and gate_up.up.shape[1] == len(down.down.value)


FUSED = Ops(
    embed=embed,
    norm=norm,
    norm_backward=norm_backward,
    plain_norm=plain_norm,
    plain_norm_backward=plain_norm_backward,
    linear=linear,
    fill=fill,
    input_gradient=reference.input_gradient,
    weight_gradients=weight_gradients,
    up_gradients=up_gradients,
    rotate=rotate,
    rotate_back=rotate_back,
    attention=attend.attention,
    attention_backward=attend.attention_backward,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
    cross_entropy=cross_entropy,
)
FILLING = Filling(decode_nf4, copy_parts)
