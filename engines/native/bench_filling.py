"""``python -m engines.native.bench_filling TOKENS``: what filling up and captures cost a run on a token file, counted without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from engines.native.buckets import POLICY, Policy, SharedSizes, extent
from harness.data.tokens import Batch, TokenFile, chunks, epoch_order, pack

# About what a capture holds the device up, in positions (1B on an H100: 5 to 34 ms longer steps, three runs of 88 steps, 2026-11-28), and
# what a row of logits costs beside a position in the layers (1B).
_CAPTURE, _ROW = 2500.0, 0.27


@dataclass(frozen=True, slots=True)
class Cost:
    """``captures`` beside the one of the largest sizes; ``filling`` and ``whole``, with captures: shares of what the samples cost alone."""

    captures: int
    filling: float
    whole: float


def cost(batches: Sequence[Batch], policy: Policy, capture: float = _CAPTURE, row: float = _ROW) -> Cost:
    """Of a run of these ``batches``; a ``capture`` and a ``row`` of logits in positions."""
    found = extent(batches, shared=True, policy=policy)
    shared = SharedSizes(found, policy)
    rows = [shared.row(batch) for batch in batches]
    alone = sum(sum(batch.lengths[0]) + row * batch.num_labels for batch in batches)
    positions = sum(each.num_positions + row * (each.sizes.num_rows if each.sizes else each.batch.num_labels) for each in rows)
    captures = len({each.sizes for each in rows} - {None, found.largest})
    return Cost(captures, positions / alone - 1, (positions + captures * capture) / alone - 1)


def batches_of(tokens: TokenFile, *, seed: int, steps: int, samples: int, micro_batch: int) -> Iterator[Batch]:
    """The packed rows of a run, in its order."""
    size = len(tokens.train)
    for step in range(steps):
        places = (divmod(number, size) for number in range(step * samples, (step + 1) * samples))
        chosen = [tokens.train[int(epoch_order(seed, epoch, size)[place])] for epoch, place in places]
        yield from map(pack, chunks(chosen, micro_batch))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each policy: captures, filling and both together for each kind of run, means of all seeds."""
    parser = argparse.ArgumentParser(prog="python -m engines.native.bench_filling", description=__doc__)
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="a token file, as prepare leaves it in the cache")
    parser.add_argument("--steps", type=int, nargs="+", default=[88, 440])
    parser.add_argument("--samples", type=int, default=64, help="of a step")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-an-octave", type=int, nargs="+", default=[POLICY.steps_an_octave])
    parser.add_argument("--worth-a-capture", type=int, nargs="+", default=[POLICY.worth_a_capture])
    parser.add_argument("--capture", type=float, default=_CAPTURE, help="what one costs, in positions (%(default)g)")
    options = parser.parse_args(arguments)
    tokens = TokenFile.open(options.tokens)
    policies = [Policy(*each) for each in product(options.steps_an_octave, options.worth_a_capture)]
    for steps, micro_batch in product(options.steps, options.micro_batch):
        print(f"{steps} steps of {options.samples} samples, micro-batches of {micro_batch}: captures, filling, both")
        kinds = {"steps": steps, "samples": options.samples, "micro_batch": micro_batch}
        runs = [list(batches_of(tokens, seed=seed, **kinds)) for seed in range(options.seeds)]
        for policy in policies:
            found = [cost(batches, policy, options.capture) for batches in runs]
            captures, filling, whole = (fmean(values) for values in zip(*map(astuple, found), strict=True))
            said = f"{policy.steps_an_octave:>4} an octave, {policy.worth_a_capture:>5}"
            print(f"  {said}: {captures:5.1f} {filling:7.2%} {whole:7.2%}", flush=True)


if __name__ == "__main__":
    main()
