"""How often the rule of a check is wrong, and how often it finds what it should: simulated runs, drift and noise as on real machines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.stats import CONFIDENCE, EFFECT

RUN_NOISE = 0.01  # standard deviation of the logarithm of a run's median step
DRIFT = 0.03  # by which the machine gets slower from the first run of a sitting to the last
SLOWDOWN = 0.03  # what must be found
MOST_FALSE = 0.02
LEAST_POWER = 0.95
LEAST_PAIRS = 8
MOST_PAIRS = 24
TABLE = ((1, (3, 5, 8, 12)), (10, (5, 8, 10, 11, 12, 16)))  # cells, and pairs of each
_TRIALS = 20_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """``false``: checks of identical trees in which any cell is called different. ``found``: slowed cells that are called regressed.

    ``blocked``: ``false`` had all runs of one tree come before all of the other.
    """

    num_cells: int
    pairs: int
    false: float
    found: float
    blocked: float


def simulate(num_cells: int, pairs: int) -> Rates:
    """Seeded: the same numbers every time. Of ``num_cells`` cells the first is slowed down where power is asked."""
    generator = np.random.default_rng(_SEED)
    noise = generator.normal(0, RUN_NOISE, (_TRIALS, num_cells, pairs, 2))
    differences = noise[..., 1] - noise[..., 0] + _drift(pairs, interleaved=True)
    slowed = differences.copy()
    slowed[:, 0] += np.log1p(SLOWDOWN)
    blocked = noise[..., 1] - noise[..., 0] + _drift(pairs, interleaved=False)
    return Rates(
        num_cells,
        pairs,
        false=float(np.mean(np.any(decide(differences) != 0, axis=1))),
        found=float(np.mean(decide(slowed)[:, 0] == 1)),
        blocked=float(np.mean(np.any(decide(blocked) != 0, axis=1))),
    )


def decide(log_ratios: NDArray[np.float64]) -> NDArray[np.int64]:
    """``rule.judge`` over (trials, cells, pairs) of ln(candidate / base): 1 regressed, -1 improved, 0 neither."""
    from scipy.special import stdtr

    pairs = log_ratios.shape[-1]
    mean = log_ratios.mean(axis=-1)
    error = log_ratios.std(axis=-1, ddof=1) / np.sqrt(pairs)
    sure = _holm(2 * stdtr(pairs - 1, -np.abs(mean) / error))
    return np.where(sure & (np.abs(mean) > np.log1p(EFFECT)), np.sign(mean), 0).astype(np.int64)


def pairs_needed(num_cells: int) -> int:
    """The fewest pairs, and never fewer than 8, at which a cell that is 3 % slower is found 95 times in 100 among ``num_cells``."""
    enough = (pairs for pairs in range(LEAST_PAIRS, MOST_PAIRS) if simulate(num_cells, pairs).found >= LEAST_POWER)
    return next(enough, MOST_PAIRS)


def self_test() -> tuple[str, bool]:
    """A table of error rates for people, and whether what the documentation claims holds."""
    rows = [simulate(num_cells, pairs) for num_cells, each in TABLE for pairs in each]
    needed = {num_cells: pairs_needed(num_cells) for num_cells, _ in TABLE}
    one = next(row for row in rows if (row.num_cells, row.pairs) == (1, LEAST_PAIRS))
    ten = simulate(10, needed[10])
    claims = {
        f"1 cell, {LEAST_PAIRS} pairs: at most {MOST_FALSE:.0%} false alarms ({one.false:.2%})": one.false <= MOST_FALSE,
        f"1 cell, {LEAST_PAIRS} pairs: at least {LEAST_POWER:.0%} of +3 % found ({one.found:.1%})": one.found >= LEAST_POWER,
        f"10 cells, {needed[10]} pairs: at most {MOST_FALSE:.0%} false alarms ({ten.false:.2%})": ten.false <= MOST_FALSE,
        f"10 cells, {needed[10]} pairs: at least {LEAST_POWER:.0%} of +3 % found ({ten.found:.1%})": ten.found >= LEAST_POWER,
        "no number of pairs gives more false alarms": all(row.false <= MOST_FALSE for row in rows),
    }
    lines = [
        f"{_TRIALS:,} simulated checks each: {RUN_NOISE:.0%} noise a run, {DRIFT:.0%} drift over the sitting, {CONFIDENCE:.0%} intervals",
        "",
        f"{'cells':>5}  {'pairs':>5}  {'false alarms':>12}  {'+3 % found':>10}  {'false alarms, AAAABBBB':>22}",
        *(f"{row.num_cells:>5}  {row.pairs:>5}  {row.false:>12.2%}  {row.found:>10.1%}  {row.blocked:>22.1%}" for row in rows),
        "",
        *(f"{'holds' if kept else 'FAILS'}  {claim}" for claim, kept in claims.items()),
    ]
    return "\n".join(lines), all(claims.values())


def _drift(pairs: int, *, interleaved: bool) -> NDArray[np.float64]:
    """What drift adds to candidate over base in each pair. Interleaved: base first, then candidate first, and so on."""
    pace = np.linspace(0, DRIFT, 2 * pairs)
    if not interleaved:
        return pace[pairs:] - pace[:pairs]
    gap = pace[1::2] - pace[::2]
    return np.where(np.arange(pairs) % 2 == 0, gap, -gap)


def _holm(p_values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """``stats.holm`` over the last axis."""
    count = p_values.shape[-1]
    order = np.argsort(p_values, axis=-1)
    passed = np.take_along_axis(p_values, order, -1) <= (1 - CONFIDENCE) / (count - np.arange(count))
    rejected = np.logical_and.accumulate(passed, axis=-1)
    found = np.empty_like(rejected)
    np.put_along_axis(found, order, rejected, -1)
    return found
