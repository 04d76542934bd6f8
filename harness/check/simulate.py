"""How often the rule of a check is wrong, and how often it finds what it should: simulated runs, drift and noise as on real machines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.stats import CONFIDENCE, EFFECT

RUN_NOISE = 0.01  # standard deviation of the logarithm of a run's median step, where nobody has measured it
SLOWDOWN = 0.03  # what must be found
MOST_FALSE = 0.02
LEAST_POWER = 0.95
LEAST_PAIRS = 4  # fewer say little of their own scatter
MOST_PAIRS = 24
TABLE = ((1, (3, 5, 8, 12)), (10, (5, 8, 10, 11, 12, 16)))  # cells, and pairs of each
QUIET = 0.003  # the run noise of an H100, docs/method.md
QUIET_TABLE = ((1, (3, 4, 5)), (10, (3, 4, 5)))
_TRIALS = 20_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """``false``: checks of identical trees in which any cell is called different. ``found``: slowed cells that are called regressed.

    ``blocked``: ``false`` had all runs of one tree come before all of the other.
    """

    num_cells: int
    pairs: int
    noise: float
    false: float
    found: float
    blocked: float


def simulate(num_cells: int, pairs: int, noise: float = RUN_NOISE) -> Rates:
    """Seeded: the same numbers every time. Of ``num_cells`` cells the first is slowed down where power is asked.

    ``noise``: standard deviation of the logarithm of a run's median step. The machine drifts by three times as much over the sitting.
    """
    generator = np.random.default_rng(_SEED)
    runs = generator.normal(0, noise, (_TRIALS, num_cells, pairs, 2))
    differences = runs[..., 1] - runs[..., 0] + _drift(pairs, noise, interleaved=True)
    slowed = differences.copy()
    slowed[:, 0] += np.log1p(SLOWDOWN)
    blocked = runs[..., 1] - runs[..., 0] + _drift(pairs, noise, interleaved=False)
    return Rates(
        num_cells,
        pairs,
        noise,
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


def pairs_needed(num_cells: int, noise: float = RUN_NOISE) -> int:
    """The fewest pairs, and never fewer than 4, at which a cell that is 3 % slower is found 95 times in 100 among ``num_cells``."""
    enough = (pairs for pairs in range(LEAST_PAIRS, MOST_PAIRS) if simulate(num_cells, pairs, noise).found >= LEAST_POWER)
    return next(enough, MOST_PAIRS)


def self_test() -> tuple[str, bool]:
    """A table of error rates for people, and whether what the documentation claims holds."""
    tables = ((RUN_NOISE, TABLE), (QUIET, QUIET_TABLE))
    rows = [simulate(num_cells, pairs, noise) for noise, table in tables for num_cells, each in table for pairs in each]
    judged = [
        simulate(num_cells, pairs, noise)
        for noise, num_cells, pairs in (
            (RUN_NOISE, 1, 8), (RUN_NOISE, 10, pairs_needed(10)), (QUIET, 1, pairs_needed(1, QUIET)), (QUIET, 10, pairs_needed(10, QUIET)),
        )
    ]  # fmt: skip
    claims = {claim: kept for row in judged for claim, kept in _claims(row)}
    claims["no number of pairs gives more false alarms"] = all(row.false <= MOST_FALSE for row in rows)
    lines = [
        f"{_TRIALS:,} simulated checks each: noise a run as given, three times as much drift over the sitting, {CONFIDENCE:.0%} intervals",
        "",
        f"{'noise':>5}  {'cells':>5}  {'pairs':>5}  {'false alarms':>12}  {'+3 % found':>10}  {'false alarms, AAAABBBB':>22}",
        *(
            f"{row.noise:>5.1%}  {row.num_cells:>5}  {row.pairs:>5}  {row.false:>12.2%}  {row.found:>10.1%}  {row.blocked:>22.1%}"
            for row in rows
        ),
        "",
        *(f"{'holds' if kept else 'FAILS'}  {claim}" for claim, kept in claims.items()),
    ]
    return "\n".join(lines), all(claims.values())


def _claims(row: Rates) -> list[tuple[str, bool]]:
    what = f"{row.noise:.1%} noise, {row.num_cells} cell{'s' if row.num_cells > 1 else ''}, {row.pairs} pairs"
    return [
        (f"{what}: at most {MOST_FALSE:.0%} false alarms ({row.false:.2%})", row.false <= MOST_FALSE),
        (f"{what}: at least {LEAST_POWER:.0%} of +3 % found ({row.found:.1%})", row.found >= LEAST_POWER),
    ]


def _drift(pairs: int, noise: float, *, interleaved: bool) -> NDArray[np.float64]:
    """What drift adds to candidate over base in each pair. Interleaved: base first, then candidate first, and so on."""
    pace = np.linspace(0, 3 * noise, 2 * pairs)
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
