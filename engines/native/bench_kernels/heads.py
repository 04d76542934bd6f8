"""Rows of the kernels between the projection of heads and attention: rotation, with and without norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engines.native import fused_ops, reference
from engines.native.bench_kernels import liger
from engines.native.bench_kernels.setting import Call, Row, Setting, by
from engines.native.kernels.head_norms import norm_rotate, norm_rotate_back
from engines.native.kernels.rotary import rotate_, rotate_back

_FP32 = 4


def _rotate(s: Setting) -> Row:
    heads, packed, shape = s.heads(), s.packed(s.even), s.shape
    turned = shape.query_size + shape.key_size
    return Row(
        kernel=rotate_,
        size=f"{by(s.tokens, shape.num_heads + shape.num_kv_heads)} heads of {shape.head_dim}",
        ours=Call(lambda: fused_ops.rotate(heads, None, packed)),
        reference=Call(lambda: reference.rotate(heads, None, packed)),
        num_bytes=2 * s.item * s.tokens * turned + _FP32 * s.tokens * shape.head_dim,
        liger=lambda: liger.rotate(heads.queries, heads.keys, packed.cosine, packed.sine),
    )


def _rotate_back(s: Setting) -> Row:
    gradients, packed, shape, room = s.head_gradients(), s.packed(s.even), s.shape, s.layer.qkv.padded_rank
    columns = shape.query_size + 2 * shape.key_size
    return Row(
        kernel=rotate_back,
        size=f"{by(s.tokens, shape.num_heads + 2 * shape.num_kv_heads)} heads of {shape.head_dim}",
        ours=Call(lambda: fused_ops.rotate_back(gradients, None, None, packed, room)),
        reference=Call(lambda: reference.rotate_back(gradients, None, None, packed, room)),
        num_bytes=s.item * s.tokens * (2 * columns + room) + _FP32 * s.tokens * shape.head_dim,
        liger=lambda: liger.rotate_back(gradients.queries, gradients.keys, packed.cosine, packed.sine),
    )


def _norm_rotate(s: Setting) -> Row:
    heads, packed, shape, norms = s.heads(), s.packed(s.even), s.shape, s.head_norms()
    turned = shape.query_size + shape.key_size
    return Row(
        kernel=norm_rotate,
        size=f"{by(s.tokens, shape.num_heads + shape.num_kv_heads)} heads of {shape.head_dim}",
        ours=Call(lambda: fused_ops.rotate(heads, norms, packed)),
        reference=Call(lambda: reference.rotate(heads, norms, packed)),
        num_bytes=2 * s.item * (s.tokens * turned + shape.head_dim) + _FP32 * s.tokens * shape.head_dim,
    )


def _norm_rotate_back(s: Setting) -> Row:
    heads, gradients, packed, shape, norms = s.heads(), s.head_gradients(), s.packed(s.even), s.shape, s.head_norms()
    turned, columns, room = shape.query_size + shape.key_size, shape.query_size + 2 * shape.key_size, s.layer.qkv.padded_rank
    return Row(
        kernel=norm_rotate_back,
        size=f"{by(s.tokens, shape.num_heads + 2 * shape.num_kv_heads)} heads of {shape.head_dim}",
        ours=Call(lambda: fused_ops.rotate_back(gradients, heads, norms, packed, room)),
        reference=Call(lambda: reference.rotate_back(gradients, heads, norms, packed, room)),
        num_bytes=s.item * (s.tokens * (turned + 2 * columns + room) + 2 * shape.head_dim) + _FP32 * s.tokens * shape.head_dim,
    )


HEAD_ROWS: Mapping[str, Callable[[Setting], Row]] = {
    "rotate": _rotate,
    "rotate_back": _rotate_back,
    "norm_rotate": _norm_rotate,
    "norm_rotate_back": _norm_rotate_back,
}
