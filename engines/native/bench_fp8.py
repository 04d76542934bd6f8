"""``python -m engines.native.bench_fp8``: 8-bit products of linear groups beside bf16 ones, their error, and the kernels around them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.testing
from torch import Tensor

from engines.native.bench import RANK, model_shape
from engines.native.fp8 import RANK_MULTIPLE, Fp8Rows
from engines.native.kernels.fp8 import decode_rows, quantise_wide, write_low, write_tail
from engines.native.kernels.fp8_inputs import rms_norm_codes, swiglu_codes
from engines.native.kernels.rms_norm import rms_norm
from engines.native.kernels.swiglu import swiglu
from engines.native.shape import LlamaShape


@dataclass(frozen=True, slots=True)
class Group:
    """A linear group: N outputs, K inputs and R ranks."""

    name: str
    outputs: int
    inputs: int
    ranks: int


def groups(shape: LlamaShape) -> tuple[Group, ...]:
    """Of one layer, all linears adapted."""
    hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.query_size
    return (
        Group("qkv", queries + 2 * shape.key_size, hidden, 3 * RANK),
        Group("output", hidden, queries, RANK),
        Group("gate_up", 2 * inner, hidden, 2 * RANK),
        Group("down", hidden, inner, RANK),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each product and its quantisation; raises RuntimeError where a result is not near the exact one."""
    parser = argparse.ArgumentParser(prog="python -m engines.native.bench_fp8", description=__doc__)
    parser.add_argument("--model", default="llama3_8b", help="a name of conf/model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {options.model}; ms, medians with cold caches")
    torch.manual_seed(0)
    for tokens in options.tokens:
        totals = [0.0] * 5
        for group in groups(model_shape(options.model, None)):
            for direction, rows, columns in (("y", group.outputs, group.inputs), ("dx", group.inputs, group.outputs)):
                times = _product(f"{group.name} {direction}", tokens, rows, columns, -(-group.ranks // RANK_MULTIPLE) * RANK_MULTIPLE)
                totals = [total + time for total, time in zip(totals, times, strict=True)]
        for line in _producers(tokens, model_shape(options.model, None)):
            print(line, flush=True)
        said = ("bf16", "8 bits, adapter inside", "without", "exact sums", "quantised")
        print(f"{tokens} tokens, a layer: {', '.join(f'{name} {total:.3f}' for name, total in zip(said, totals, strict=True))}", flush=True)


def _product(name: str, tokens: int, rows: int, columns: int, room: int) -> tuple[float, ...]:
    """Times of [tokens, columns] by [rows, columns], with ``room`` padded ranks behind."""
    wide = torch.randn(tokens, columns + room, device="cuda", dtype=torch.bfloat16)
    weight = 0.02 * torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    up = 0.002 * torch.randn(rows, room, device="cuda", dtype=torch.bfloat16)
    made = Fp8Rows.of(weight, room, room)
    write_tail(made, up)
    codes, scales = quantise_wide(wide, columns)
    right = torch.cat([weight, up], dim=1)
    _check(name, lambda part: _scaled(codes[part], scales[part], made), wide, right)
    bf16 = _time(lambda: wide[:, :columns] @ weight.t())
    inside = _time(lambda: _scaled(codes, scales, made))
    plain_codes, plain = codes[:, :columns].contiguous(), Fp8Rows.of(weight, 0)
    times = bf16, inside, _time(lambda: _scaled(plain_codes, scales, plain)), _time(lambda: _scaled(codes, scales, made, fast=False))
    quantised = _time(lambda: quantise_wide(wide, columns))
    decoded = torch.empty_like(weight)
    flops, read = 2e-9 * tokens * rows * columns, tokens * (wide.shape[1] * 2 + codes.shape[1]) * 1e-6
    extra = f"tail {_time(lambda: write_tail(made, up)):.3f}, decode {_time(lambda: decode_rows(made, decoded)):.3f}"
    low = wide[:, columns:]
    into = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
    added = _time(lambda: into.addmm_(low, up.t()))
    print(
        f"{name:<11} {tokens} x {columns} x {rows}, {room} ranks: bf16 {times[0]:.3f} ({flops / times[0]:.0f} TFLOP/s), 8 bits with the "
        f"adapter {times[1]:.3f} ({flops / times[1]:.0f}), without {times[2]:.3f} ({flops / times[2]:.0f}), exact sums {times[3]:.3f} "
        f"({flops / times[3]:.0f}); quantise {quantised:.3f} ({read / quantised:.0f} GB/s), {extra}; an adapter added apart {added:.3f}",
        flush=True,
    )
    return *times, quantised


def _producers(tokens: int, shape: LlamaShape) -> Iterator[str]:
    """Norm and SwiGLU that round what they make, beside those that do not and a rounding afterwards."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    x, delta = (torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight, gate_up = torch.ones(hidden, device="cuda", dtype=torch.bfloat16), torch.randn(tokens, 2 * inner, device="cuda").bfloat16()
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "norm": (lambda: rms_norm_codes(x, weight, 1e-5, RANK, delta), lambda: rms_norm(x, weight, 1e-5, RANK, delta), hidden),
        "swiglu": (lambda: swiglu_codes(gate_up, RANK), lambda: swiglu(gate_up, RANK), inner),
    }
    for name, (rounding, plain, columns) in calls.items():
        made = plain()
        after, thin = _rounded_after(made[0] if isinstance(made, tuple) else made, columns)
        yield (
            f"{name:<11} {tokens} x {columns}: rounding {_time(rounding):.3f}; without {_time(plain):.3f}, rounded after {after:.3f}; "
            f"thin {thin:.3f}"
        )


def _rounded_after(wide: Tensor, columns: int) -> tuple[float, float]:
    """Times of rounding what is there, and of storing its thin part behind the codes."""
    codes, scales = quantise_wide(wide, columns)
    low = wide[:, columns:].contiguous()
    return _time(lambda: quantise_wide(wide, columns)), _time(lambda: write_low(codes, scales, low))


def _scaled(codes: Tensor, scales: Tensor, rows: Fp8Rows, *, fast: bool = True) -> Tensor:
    made: Tensor = torch._scaled_mm(
        codes, rows.codes.t(), scales.unsqueeze(1), rows.scales.unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return made


def _check(name: str, product: Callable[[slice], Tensor], wide: Tensor, right: Tensor) -> None:
    """Against float64 on some rows, and the zeros of the room."""
    for part in _parts(len(wide)):
        found, truth = product(part), wide[part].double() @ right.double().t()
        error = float((found[:, : len(right)].double() - truth).norm() / truth.norm())
        print(f"{name:<11} rows {part.start} to {part.stop}: relative error {error:.4f}")
        if not error < 0.06 or bool(found[:, len(right) :].any()):
            raise RuntimeError(f"{name}: an 8-bit product is {error:.3g} off, or not zero behind its rows; expected less than 0.06")


def _parts(count: int) -> Iterator[slice]:
    yield slice(0, min(count, 64))
    yield slice(count - 48, count)


def _time(call: Callable[[], Any]) -> float:
    """Milliseconds, the median."""
    return float(triton.testing.do_bench(call, warmup=10, rep=60, return_mode="median"))


if __name__ == "__main__":
    main()
