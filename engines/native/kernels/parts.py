"""Up to four small matrices copied to places of one buffer in one launch: an A and the B of a linear group.

A copy of its own takes as long as a launch for each of them, 11 a layer and pass (8B shape: 821 launches, 5.6 of 478 ms, H200,
2026-11-27). The reference is ``Tensor.copy_``.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_rows

MOST = 4
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _copy_part(value, place, program, count, columns, stride, BLOCK: tl.constexpr):
    each = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = each < count
    tl.store(place + each // columns * stride + each % columns, tl.load(value + each, mask=there), mask=there)


@triton.jit
def _copy_parts(
    value0, value1, value2, value3, place0, place1, place2, place3, count0, count1, count2, count3, columns0, columns1, columns2, columns3,
    end0, end1, end2, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs before ``end0`` copy the first matrix, those before ``end1`` the second, and so on."""
    program = tl.program_id(0)
    if program < end0:
        _copy_part(value0, place0, program, count0, columns0, stride, BLOCK)
    elif program < end1:
        _copy_part(value1, place1, program - end0, count1, columns1, stride, BLOCK)
    elif program < end2:
        _copy_part(value2, place2, program - end1, count2, columns2, stride, BLOCK)
    else:
        _copy_part(value3, place3, program - end2, count3, columns3, stride, BLOCK)


def copy_parts(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """Write each contiguous matrix of ``values`` into its place; all places lie in one buffer, so their rows are equally far apart."""
    if not values:
        return
    if len(values) != len(places) or len(values) > MOST:
        raise ValueError(f"{len(values)} matrices for {len(places)} places; expected as many, at most {MOST}")
    stride = places[0].stride(0)
    for index, (value, place) in enumerate(zip(values, places, strict=True)):
        check_rows(f"place {index}", place, *value.shape)
        if not value.is_contiguous() or place.shape != value.shape or place.stride(0) != stride or place.dtype != value.dtype:
            raise ValueError(
                f"matrix {index} is {list(value.shape)} of {value.dtype}, its place {list(place.shape)} of {place.dtype} in rows of "
                f"{place.stride(0)}; expected contiguous values, the same size and type, rows of {stride}"
            )
    counts = [value.numel() for value in values]
    ends, end = [], 0
    for count in counts:
        ends.append(end := end + triton.cdiv(count, _BLOCK))
    spare = MOST - len(values)  # arguments that no program reads
    _copy_parts[(end,)](
        *values, *[values[0]] * spare, *places, *[places[0]] * spare, *counts, *[0] * spare,
        *(value.shape[1] for value in values), *[1] * spare, *[*ends, *[end] * spare][: MOST - 1], stride,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
