"""``python -m harness.tune.replay FOLDER``: replay searches on the records of a grid, without a GPU, and hold them against what is true."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import ConfigError, HarnessError
from harness.tune.baselines import POLICIES, has_optuna
from harness.tune.grid import Grid, grids
from harness.tune.judge import Judged, MemoryJudged, calibrated, judged, memory_judged, near_best, over
from harness.tune.pack import records_of
from harness.tune.search import Rules, Search, search

MOST_RUNS = 8
PLANNED_STEPS = (500, 5000)
RUNGS = (6, 10)  # a grid's cells are short
SEEDS = 50

USAGE = """python -m harness.tune.replay PLACE [--seeds N] [--runs N] [--json]

PLACE: a folder with the records of a grid (python -m harness -m +sweep=grid_hf …), or a file that python -m harness.tune.pack made of it:
one workload, one machine, every combination. Each question is a choice of engines and the steps of a planned run; each policy gets the same
answers from the records and at most 8 runs, probes and partial races counted. Exit code 0 when the search keeps to 3 % regret on every
question, 3 when it does not, 6 when there is no grid."""
MOST_REGRET = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A grid, what is planned, and how hard it is: ``near``, the share of candidates within 3 % of the best."""

    engines: tuple[str, ...]
    planned_steps: int
    num_candidates: int
    near: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One policy on one question; of those that depend on chance, one entry for each seed. ``memory``: predictions after the search;
    ``lines``: of the memory model alone, from two passes of each line.
    """

    question: Question
    policy: str
    judged: tuple[Judged, ...]
    memory: MemoryJudged | None = None
    lines: MemoryJudged | None = None
    log: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, print, judge."""
    parser = argparse.ArgumentParser(prog="python -m harness.tune.replay", usage=USAGE)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--runs", type=int, default=MOST_RUNS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        records, problems = records_of(options.folder)
        found = grids(records)
        if not found:
            unread = "".join(f"\n{problem}" for problem in problems)
            raise ConfigError(
                f"{options.folder}: no records of a grid; python -m harness +sweep=grid_hf and its other parts make one{unread}"
            )
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 6
    answers = [answer for grid in found for answer in replay(grid, options.seeds, options.runs)]
    print(json.dumps([asdict(answer) for answer in answers], indent=1) if options.json else "\n".join(_text(answers)))
    kept = all(one.regret <= MOST_REGRET for answer in answers if answer.policy == "tune" for one in answer.judged)
    return 0 if kept else 3


def replay(grid: Grid, seeds: int = SEEDS, most_runs: int = MOST_RUNS) -> list[Answer]:
    """Every policy on every question of ``grid``."""
    return [answer for part in _parts(grid) for steps in PLANNED_STEPS for answer in _answers(part, steps, seeds, most_runs)]


def _parts(grid: Grid) -> list[Grid]:
    """All engines; without the engine that is best, again and again while two are left; every engine alone that has a choice of 20."""
    engines, parts = list(grid.space.expected), [grid]
    while len(engines) > 2:
        part = parts[-1]
        totals = {one: total for one in part.space.candidates if (total := part.total_seconds(one, PLANNED_STEPS[-1])) is not None}
        engines.remove(min(totals, key=lambda one: totals[one]).engine)
        parts.append(grid.only(engines))
    alone = [grid.only([engine]) for engine in grid.space.expected]
    return [*parts, *(part for part in alone if len(part.space.candidates) >= 20 and len(grid.space.expected) > 1)]


def _answers(grid: Grid, planned_steps: int, seeds: int, most_runs: int) -> list[Answer]:
    question = Question(
        engines=tuple(grid.space.expected),
        planned_steps=planned_steps,
        num_candidates=len(grid.space.candidates),
        near=near_best(grid, planned_steps),
    )
    rules = Rules(planned_steps=planned_steps, rungs=RUNGS, most_runs=most_runs)
    policy = Search(grid.space, grid.scale, grid.capacity_bytes, rules)
    told = search(policy, grid.measure)
    view = policy.view(told)
    ours = Answer(
        question=question,
        policy="tune",
        judged=(judged(told, grid, planned_steps, grid.seconds, view.incumbent),),
        memory=memory_judged(policy, told, grid),
        lines=calibrated(policy, grid),
        log=(*(f"{ask.candidate.title} {ask.steps} steps: {result.outcome}" for ask, result in told), f"stopped: {view.stopped}"),
    )
    others = [
        Answer(
            question=question,
            policy=name,
            judged=tuple(
                judged(run(grid.space, grid.measure, RUNGS[0], most_runs, seed), grid, planned_steps, grid.seconds)
                for seed in range(seeds if by_chance else 1)
            ),
        )
        for name, run, by_chance in POLICIES
        if name != "Optuna TPE" or has_optuna()
    ]
    return [ours, *others]


def _text(answers: Sequence[Answer]) -> list[str]:
    lines: list[str] = []
    for question in dict.fromkeys(answer.question for answer in answers):
        lines += [
            "",
            f"{', '.join(question.engines)}; {question.num_candidates} candidates, {100 * question.near:.1f} % within 3 % of the best; "
            f"a run of {question.planned_steps} steps",
            f"  {'':<32}{'regret %':>18}{'runs':>6}{'grid %':>8}{'out of memory':>16}",
        ]
        for answer in answers:
            if answer.question == question:
                lines += _row(answer)
    if not has_optuna():
        lines += ["", "Optuna TPE: not compared, optuna is not installed here (pip install optuna)"]
    return lines


def _row(answer: Answer) -> list[str]:
    regret, worst = over(answer.judged, lambda one: 100 * one.regret)
    runs, _ = over(answer.judged, lambda one: one.num_runs)
    share, _ = over(answer.judged, lambda one: 100 * one.grid_share)
    ooms, _ = over(answer.judged, lambda one: one.num_ooms)
    spread = f"{regret:.1f} (worst {worst:.1f})" if len(answer.judged) > 1 else f"{regret:.1f}"
    lines = [f"  {answer.policy:<32}{spread:>18}{runs:>6.0f}{share:>8.1f}{ooms:>16.0f}"]
    if answer.memory is not None and answer.lines is not None:
        lines.append(f"    memory of what was not measured: {_memory(answer.memory)}")
        lines.append(f"    … from two passes of each line of micro-batches: {_memory(answer.lines)}")
        lines.append(f"    out of memory once its engine was known: {answer.judged[0].num_late_ooms}")
    return [*lines, *(f"      {line}" for line in answer.log)]


def _memory(told: MemoryJudged) -> str:
    if told.error is None or told.beyond_weights is None:
        return "nothing to compare"
    off = f"{100 * told.error:.1f} % off on average, {100 * told.beyond_weights:.1f} % beyond the weights"
    return f"{off} ({told.num} candidates), {told.num_false_fits} false fits"


if __name__ == "__main__":
    sys.exit(main())
