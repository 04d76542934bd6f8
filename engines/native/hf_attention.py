"""Attention for models of transformers, by its AttentionInterface: cuDNN's, and torch's own FlashAttention over documents end to end.

Neither has a mask function, so transformers makes no mask for them, and does not stop the host to find out whether it needs one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CUDNN, VARLEN = "cudnn", "varlen"  # names for attn_implementation


def register() -> None:
    """Make both names known to transformers, in this process."""
    from transformers import AttentionInterface

    AttentionInterface.register(CUDNN, cudnn_attention)
    AttentionInterface.register(VARLEN, varlen_attention)


def cudnn_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within each row by cuDNN and nothing else; torch raises RuntimeError where cuDNN cannot.

    query [rows, heads, positions, head size], key and value with fewer heads; returns [rows, positions, heads, head size].
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _expect_no_mask(CUDNN, attention_mask)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
        return found


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,  # what every attention is given: positions, dropout (a workload has none), the bounds of the keys, which are the queries'
) -> tuple[Tensor, None]:
    """Causal attention within each document by the FlashAttention 2 that torch brings (Dao 2023, arXiv 2307.08691).

    query [rows, heads, positions, head size], key and value with fewer heads; returns [rows, positions, heads, head size].
    ``cu_seq_lens_q`` int32 [documents + 1]: where documents begin among all positions, row after row; ``max_length_q``: the longest.
    """
    import torch

    _expect_no_mask(VARLEN, attention_mask)
    rows, _heads, positions, _size = query.shape
    # Beside fp32 masters the rotary embedding leaves fp32 queries and keys; autocast knows the public attention only.
    flat = [states.transpose(1, 2).flatten(0, 1).to(value.dtype) for states in (query, key, value)]
    output = torch.ops.aten._flash_attention_forward(
        *flat,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        0.0,  # dropout
        True,  # causal
        False,  # no debug mask
        scale=scaling,
        window_size_left=None if sliding_window is None else sliding_window - 1,
        window_size_right=None if sliding_window is None else 0,
    )[0]
    return output.view(rows, positions, *output.shape[1:]), None


def _expect_no_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError(f"attention={name} takes no attention_mask, got one of shape {tuple(mask.shape)}; give none")
