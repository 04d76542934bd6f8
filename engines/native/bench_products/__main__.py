"""``python -m engines.native.bench_products``: every product of a LoRA step as torch makes it, beside the fastest way that cuBLASLt offers.

A line for each product, with how often a step makes it and what the fastest way would save. Calls follow one another without a pause, so
that the GPU is as warm, and its clock as low, as in training; ways take turns, so that drift meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engines.native.bench import model_shape, random_decoder, random_steps
from engines.native.bench_products.products import products
from engines.native.cublaslt import CublasLt, Multiplier
from engines.native.fastest import LEAST_FLOPS
from engines.native.products import Product
from harness.errors import HarnessError

_BLOCK_SECONDS = 0.06  # of one way, before the next takes its turn
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds of one product: as torch makes it, as cuBLASLt's first choice, and in its fastest way, by place in its list."""

    product: Product
    calls: int
    torch: float
    first: float
    fastest: float
    place: int
    num_ways: int

    @property
    def saved(self) -> float:
        """A step, in milliseconds."""
        return self.calls * (self.torch - self.fastest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for each model and batch."""
    parser = argparse.ArgumentParser(prog="python -m engines.native.bench_products", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["llama3_1b"], help="names of conf/model")
    parser.add_argument("--batch", nargs="+", default=["4x2048"], help="documents x tokens of each")
    parser.add_argument("--ways", type=int, default=16, help="the most that cuBLASLt is asked for")
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    lt = CublasLt(torch.device("cuda"))
    for name in options.model:
        for batch in options.batch:
            documents, tokens = (int(part) for part in batch.split("x"))
            found, others = of_step(name, documents, tokens)
            print(
                f"{name} {batch}: {sum(found.values()):,} products in bf16 a step" + (f", not compared: {dict(others)}" if others else "")
            )
            _table([timed(product, calls, options.ways, lt) for product, calls in found.most_common() if product.flops >= LEAST_FLOPS])


def of_step(name: str, documents: int, tokens: int) -> tuple[Counter[Product], Counter[str]]:
    """The products of a step of the whole model, counted on cuts of two and of three layers."""
    counted = []
    for num_layers in (2, 3):
        decoder = random_decoder(model_shape(name, num_layers), 2048)
        step = random_steps(decoder, documents, tokens, replay=False)
        step(0)
        counted.append(products(partial(step, 1)))
        del decoder, step
        torch.cuda.empty_cache()
    return _extrapolated([found for found, _ in counted], model_shape(name, None).num_layers), counted[0][1]


def _extrapolated(counts: Sequence[Counter[Product]], num_layers: int) -> Counter[Product]:
    two, three = counts
    return Counter({product: two[product] + (three[product] - two[product]) * (num_layers - 2) for product in three})


def timed(product: Product, calls: int, most: int, lt: CublasLt) -> Timed:
    """Time torch and every way in turns; a way whose result differs by more than the rounding of bf16 raises."""
    operands = product.operands(torch.device("cuda"))
    multiplier = Multiplier(product, lt, most)
    if not multiplier.ways:
        raise HarnessError(f"{product}: cuBLASLt offers no way to make it")
    product.run(*operands)
    truth = operands[2].float()
    runs: list[Callable[[], Any]] = [partial(product.run, *operands)]
    for way in multiplier.ways:
        run = partial(multiplier.run, way, *operands)
        run()
        off = (operands[2].float() - truth).abs().max() / truth.abs().max()
        if not off <= 2.0**-7:
            raise ArithmeticError(f"{product}: another result, off by {float(off):.3g} of the largest value")
        runs.append(run)
    of_torch, *ways = (statistics.median(blocks) for blocks in zip(*(_round(runs) for _ in range(_ROUNDS)), strict=True))
    place = min(range(len(ways)), key=ways.__getitem__)
    return Timed(product, calls, of_torch, ways[0], ways[place], place, len(ways))


def _round(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds a call of each, a block of calls after the other."""
    return [_block(run, max(3, min(400, int(1000 * _BLOCK_SECONDS / max(_block(run, 2), 1e-3))))) for run in runs]


def _block(run: Callable[[], Any], calls: int) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / calls


def _table(rows: Sequence[Timed]) -> None:
    for row in sorted(rows, key=lambda row: -row.calls * row.torch):
        rate = row.product.flops / row.torch / 1e9
        print(
            f"  {row.calls:4d} x {row.product!s:45} torch {row.torch:.4f} ms ({rate:.0f} TFLOP/s), first {row.first:.4f}, "
            f"fastest {row.fastest:.4f} (number {row.place + 1} of {row.num_ways}): {row.saved:+.2f} ms a step",
            flush=True,
        )
    whole = sum(row.calls * row.torch for row in rows)
    print(f"  together {whole:.1f} ms a step, {sum(max(0.0, row.saved) for row in rows):.2f} less with the fastest ways", flush=True)


if __name__ == "__main__":
    main()
