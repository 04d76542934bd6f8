"""Attention of short documents by our own kernels against the reference in float64: odd lengths, shared heads, odd sizes of heads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engines.native import attention as dispatch
from engines.native import reference
from engines.native.kernels.attention import CANDIDATES, Cut, attend
from engines.native.kernels.attention_backward import attend_backward
from engines.native.ops import Heads
from engines.native.packed import Packed
from tests.engines.oracle import DEVICE, INTERPRETED, judged, random
from tests.engines.test_head_kernels import double, heads_of, of, packed
from tests.engines.test_kernels import plain_linear

pytestmark = INTERPRETED
UNEVEN = (1, 70, 2, 33, 41)  # tiles of 32 and of 64 tokens cut them, and hold several of them


def inputs(lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Heads, Packed]:
    """Views of one projection whose rows lie further apart."""
    qkv = random(sum(lengths), (heads + 2 * kv_heads) * head_dim, dtype=dtype, room=8)
    return Heads(*heads_of(qkv, heads, kv_heads, head_dim)), packed(lengths, head_dim // 2)


def by_reference(heads: Heads, dy: Tensor, row: Packed) -> tuple[Tensor, Heads]:
    linear = plain_linear(heads.queries[0].numel())
    attended = reference.attention(heads, row, linear)
    return attended.input.wide, reference.attention_backward(dy, heads, attended, row)


def judge(found: Sequence[Tensor], usual: Sequence[Tensor], right: Sequence[Tensor], row: Packed) -> None:
    """Document by document: a token that sees few keys has errors of few causes, so one such row says little; and no element is astray by
    more than rounding of the largest.
    """
    for mine, plain, truth in zip(found, usual, right, strict=True):
        near = 16 * torch.finfo(mine.dtype).eps * float(truth.abs().max())
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=max(near, 4 * float((plain - truth).abs().max())))
        for one, other, expected in zip(*(each.split(row.lengths) for each in (mine, plain, truth)), strict=True):
            if len(one) > 1:  # the gradients by q and k of a token that is alone are nothing
                judged(one.reshape(1, -1), other.reshape(1, -1), expected.reshape(1, -1))


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim"),
    [
        ((1,), 1, 1, 16),
        (UNEVEN, 4, 2, 24),
        (UNEVEN, 3, 1, 16),
        (UNEVEN[::-1], 2, 2, 64),
        ((64, 32, 128), 2, 1, 6),
        ((5, 9), 2, 1, 128),
        (UNEVEN, 6, 1, 16),
        (UNEVEN, 32, 2, 16),
    ],
)
def test_output_and_gradients(lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    given, row = inputs(lengths, heads, kv_heads, head_dim, dtype)
    columns = heads * head_dim
    dy = random(sum(lengths), columns, dtype=dtype, room=3).unflatten(1, (heads, head_dim))
    room = random(sum(lengths), columns, dtype=dtype, room=8)
    y, before = room.unflatten(1, (heads, head_dim)), room.as_strided((len(room), columns + 8), (columns + 8, 1))[:, columns:].clone()
    sums = attend(*of(given), row.begins, y)
    right, right_gradients = by_reference(Heads(*double(*of(given))), dy.double(), row)
    usual, usual_gradients = by_reference(given, dy, row)
    judge([y.flatten(1)], [usual], [right], row)
    assert room.as_strided((len(room), columns + 8), (columns + 8, 1))[:, columns:].equal(before), "it wrote beside its rows"
    found = attend_backward(dy, *of(given), y, sums, row.begins, row.ends)
    assert all(each.is_contiguous() for each in found)
    judge(found, of(usual_gradients), of(right_gradients), row)
    again = attend_backward(dy, *of(given), y, sums, row.begins, row.ends)
    assert all(one.equal(other) for one, other in zip(found, again, strict=True)), "it adds up in no order of its own"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 24), (8, 2, 64)])
def test_in_16_bits(heads: int, kv_heads: int, head_dim: int) -> None:
    """Half precision, which the interpreter has right: p and ds are rounded before they are multiplied, as on a GPU."""
    given, row = inputs(UNEVEN, heads, kv_heads, head_dim, torch.float16)
    dy, y = random(147, heads, head_dim, dtype=torch.float16), random(147, heads, head_dim, dtype=torch.float16)
    sums = attend(*of(given), row.begins, y)
    found = attend_backward(dy, *of(given), y, sums, row.begins, row.ends)
    right, right_gradients = by_reference(Heads(*double(*of(given))), dy.double(), row)
    usual, usual_gradients = by_reference(given, dy, row)
    judge([y.flatten(1)], [usual], [right], row)
    judge(found, of(usual_gradients), of(right_gradients), row)


def test_scores_that_exp_cannot_hold(dtype: torch.dtype) -> None:
    given, row = inputs((9, 30), 2, 1, 16, dtype)
    large = Heads(given.queries * 100, given.keys * 100, given.values)
    y = torch.empty_like(large.queries)
    attend(*of(large), row.begins, y)
    right, _ = by_reference(Heads(*double(*of(large))), y.double(), row)
    usual, _ = by_reference(large, y, row)
    judge([y.flatten(1)], [usual], [right], row)


def test_a_document_sees_nothing_of_others() -> None:
    """To the bit: what stands in another document changes neither its output nor its gradients, not even no number at all."""
    given, row = inputs((20, 30, 9), 2, 1, 16, torch.float32)
    dy = random(59, 2, 16)

    def made(heads: Heads, gradient: Tensor) -> tuple[Tensor, ...]:
        y = torch.empty_like(heads.queries)
        sums = attend(*of(heads), row.begins, y)
        return y, *attend_backward(gradient, *of(heads), y, sums, row.begins, row.ends)

    other = Heads(*(each.clone() for each in of(given)))
    changed = dy.clone()
    for each in (*of(other), changed):
        each[:20] += 7
        each[50:] -= 7
    for one, two in zip(made(given, dy), made(other, changed), strict=True):
        assert one[20:50].equal(two[20:50])
        assert not one[:20].equal(two[:20])


@pytest.mark.parametrize(
    ("queries", "keys"), sorted({(cut.queries, cut.keys) for cuts in CANDIDATES.values() for cut in cuts} | {(16, 16)})
)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_every_way_to_cut_tokens_is_right(queries: int, keys: int, apart: bool) -> None:
    given, row = inputs(UNEVEN, 2, 1, 16, torch.float32)
    dy, cut = random(147, 2, 16), Cut(queries, keys, 4, 2, apart)
    y = torch.empty_like(given.queries)
    sums = attend(*of(given), row.begins, y, cut)
    found = attend_backward(dy, *of(given), y, sums, row.begins, row.ends, cut, cut)
    right, gradients = by_reference(Heads(*double(*of(given))), dy.double(), row)
    torch.testing.assert_close(y.flatten(1).double(), right, rtol=1e-5, atol=1e-5)
    for mine, truth in zip(found, of(gradients), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    given, row = inputs((5, 9), 4, 2, 16, torch.float32)
    y, keys, begins = torch.empty_like(given.queries), given.keys, row.begins
    with pytest.raises(ValueError, match=r"bounds are \[14\] of torch.int64; expected \[14\] of torch.int32"):
        attend(*of(given), begins.long(), y)
    with pytest.raises(ValueError, match=r"k is \[14, 3, 16\]; q is \[14, 4, 16\]"):
        attend(given.queries, random(14, 3, 16), given.values, begins, y)
    with pytest.raises(ValueError, match=r"v is \[14, 1, 16\]"):
        attend(given.queries, keys, random(14, 1, 16), begins, y)
    with pytest.raises(ValueError, match=r"y is \[14, 2, 16\]"):
        attend(*of(given), begins, torch.empty_like(keys))
    with pytest.raises(ValueError, match="heads have 136 columns; expected at most 128"):
        attend(*(random(14, 1, 136) for _ in range(3)), begins, random(14, 1, 136))
    with pytest.raises(ValueError, match="k has strides"):
        attend(given.queries, keys.transpose(1, 2).contiguous().transpose(1, 2), given.values, begins, y)
    with pytest.raises(ValueError, match=r"sums is \[4, 14\]; expected what attend returned, \[14, 4\]"):
        attend_backward(y, *of(given), y, torch.zeros(4, 14, device=DEVICE), begins, row.ends)


@pytest.mark.parametrize(
    ("lengths", "head_dim", "ours"),
    [
        ((8, 8), 16, False), ((8, 9), 16, True), ((1024, 9), 16, True), ((1060, 9), 16, False), ((2000, *[9] * 300), 16, True),
        ((8, 9), 128, True), ((8, 9), 136, False),
    ],
)  # fmt: skip
def test_our_kernels_take_short_and_uneven_documents(lengths: tuple[int, ...], head_dim: int, ours: bool) -> None:
    heads = Heads(*(torch.empty(sum(lengths), 1, head_dim) for _ in range(3)))
    assert dispatch.by_own_kernels(heads, packed(lengths, 2)) is ours


def test_attention_and_its_gradients_as_the_layer_asks_for_them(dtype: torch.dtype) -> None:
    """Through the table's operations: written into the input of the group behind, without a copy."""
    given, row = inputs(UNEVEN, 4, 2, 16, dtype)
    linear, dy = plain_linear(64), random(147, 4, 16, dtype=dtype)
    attended = dispatch.attention(given, row, linear)
    found = dispatch.attention_backward(dy, given, attended, row)
    right, right_gradients = by_reference(Heads(*double(*of(given))), dy.double(), row)
    usual, usual_gradients = by_reference(given, dy, row)
    judge([attended.input.wide], [usual], [right], row)
    judge(of(found), of(usual_gradients), of(right_gradients), row)


@pytest.mark.parametrize("width", [12, 16, 20])
def test_rows_as_far_apart_as_a_plan_of_cudnn_wants(width: int) -> None:
    x = random(5, 12, dtype=torch.float32, room=4).view(5, 3, 4)
    found = dispatch.in_rows_of(x, width)
    assert (found.stride(), found.equal(x), found is x) == ((width, 4, 1), True, width == 16)
