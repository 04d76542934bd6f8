"""What every kernel's public function does before it launches: check its tensors, choose a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

MAX_ROW = 16384  # widest row that one program holds in registers
# Arguments of kernels that change with the number of tokens in a row. Triton compiles a kernel again for a number that is 1, or divisible
# by 16 where others were not; a capture would wait until it is loaded. (``tokens_each`` is always divisible: a multiple of a tile's.)
OF_TOKENS = ("T", "splits")


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel that sums over tokens cuts its work: tokens at a time, warps a program, stages of its pipeline."""

    tokens: int
    warps: int
    stages: int


def check_rows(name: str, x: Tensor, num_rows: int, num_columns: int) -> None:
    """Raise ValueError unless ``x`` is [num_rows, at least num_columns] with adjacent columns."""
    if x.dim() != 2 or x.shape[0] != num_rows or x.shape[1] < num_columns or x.stride(1) != 1:
        raise ValueError(
            f"{name} is {list(x.shape)} with strides {list(x.stride())}; expected [{num_rows}, >={num_columns}], columns adjacent"
        )


def check_heads(**heads: Tensor) -> None:
    """Raise ValueError unless the heads [T, any, D] of a token lie side by side."""
    for name, x in heads.items():
        if x.stride()[1:] != (x.shape[2], 1):
            raise ValueError(f"{name} has strides {list(x.stride())}; expected the heads of a token side by side")


def check_counters(arrived: Tensor, num_tiles: int) -> None:
    """Raise ValueError unless ``arrived`` holds a counter for every tile."""
    if len(arrived) < num_tiles or arrived.dtype != torch.int32:
        raise ValueError(f"arrived holds {len(arrived)} counters of {arrived.dtype}; expected at least {num_tiles} of torch.int32")


def split_tokens(num_tokens: int, num_tiles: int, tile: Tile, num_programs: int) -> tuple[int, int]:
    """How many programs share the tokens of each tile, and how many each gets: about ``num_programs`` in all, none without work."""
    splits = max(1, min(triton.cdiv(num_programs, num_tiles), triton.cdiv(num_tokens, 2 * tile.tokens)))
    tokens_each = triton.cdiv(triton.cdiv(num_tokens, splits), tile.tokens) * tile.tokens
    return triton.cdiv(num_tokens, tokens_each), tokens_each


def row_block(num_columns: int) -> int:
    """The power of two that holds a row. Raises ValueError for rows wider than MAX_ROW."""
    if num_columns > MAX_ROW:
        raise ValueError(f"a row of {num_columns} columns is wider than the {MAX_ROW} that one program holds")
    return int(triton.next_power_of_2(num_columns))


def head_block(head_dim: int) -> int:
    """Columns that a tile of a product holds of a head: the next power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def row_warps(block: int) -> int:
    """Warps for a program that holds ``block`` elements: 16 to 32 a thread."""
    return min(16, max(1, block // 512))
