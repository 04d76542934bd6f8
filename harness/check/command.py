"""From what was asked to an outcome: measure, judge, measure again what was too hot, print, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness.check.exports import benchmark_json, junit
from harness.check.facts import GATES
from harness.check.judge import Measured, outcomes
from harness.check.measure import Bench, Plan
from harness.check.outcome import CellOutcome, Exit, Outcome
from harness.check.settings import CheckSettings, read_settings
from harness.check.show import markdown, text
from harness.check.simulate import pairs_needed
from harness.check.stored import expect_records_of, named, stored_cells
from harness.check.trees import Sharing, base_tree, this_tree
from harness.compose import searchpath
from harness.config import Request, Settings, requests
from harness.endings import TREE
from harness.errors import ConfigError, nearest
from harness.plan import plan as planned
from harness.store import write_at_once, writing
from harness.turns import turn

PLACES = ("runs", "cache")  # overrides that say where, not what


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command line of a check."""

    base: str | None
    records: Path | None
    candidate: Path | None
    overrides: tuple[str, ...]
    pairs: int | None
    gates: bool
    strict: bool
    allow: tuple[str, ...]
    environment: Sharing
    config_dir: Path | None
    markdown: Path | None
    junit: Path | None
    benchmark_json: Path | None


def run(asked: Asked) -> Exit:
    """Do what was asked. Raises HarnessError for anything that the user can put right."""
    settings = read_settings()
    _refuse(asked)
    outcome = _measure(asked, settings) if asked.candidate is None else _judge_stored(asked, settings)
    code = outcome.exit(strict=asked.strict)
    print(text(outcome, code))
    files = {
        asked.markdown: markdown(outcome, code),
        asked.junit: junit(outcome, code, strict=asked.strict),
        asked.benchmark_json: benchmark_json(outcome),
    }
    for path, content in files.items():
        if path is not None:
            write_at_once(path.resolve(), content.encode())
    return code


def _refuse(asked: Asked) -> None:
    problems = [f"--allow {name}: there is no such count; {nearest(name, GATES)}" for name in asked.allow if name not in GATES]
    if asked.records and asked.gates:
        problems.append("--gates counts both trees here; with --records counts are compared where both sides have them")
    if asked.candidate and not asked.records:
        problems.append("--candidate is compared with --records, the folder of the base's records; give that too, or leave it out")
    if asked.candidate and (_says_what(asked) or asked.pairs):
        problems.append("--candidate: records are there, nothing is measured; leave out --pairs and all overrides but runs= and cache=")
    problems += [f"{line}: a check chooses the repeats; use --pairs" for line in asked.overrides if line.startswith("repeat=")]
    if problems:
        raise ConfigError("\n".join(problems))


def _judge_stored(asked: Asked, settings: CheckSettings) -> Outcome:
    assert asked.records is not None
    assert asked.candidate is not None
    cells, notes = stored_cells(asked.records, asked.candidate)
    return Outcome(f"records in {asked.candidate} against those in {asked.records}", outcomes(cells, settings, asked.allow), notes)


def _measure(asked: Asked, settings: CheckSettings) -> Outcome:
    where, found = _requests(asked, settings)
    runs = Path(where.runs).expanduser().resolve()
    if asked.records is not None:
        expect_records_of({one.machine.key for one in planned(found, [], "all")}, asked.records)
    plan = Plan(
        cells=tuple(zip(named([(one.cell.engine, one.cell.workload) for one in found]), _overrides(asked, settings, found), strict=True)),
        pairs=0 if asked.gates else asked.pairs or settings.pairs or _enough_pairs(settings, found),
        arguments=("--config-dir", str(asked.config_dir)) if asked.config_dir else (),
        cache=Path(where.cache).expanduser().resolve(),
        root=runs / "check" / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"[:-3],
    )
    with turn(runs, lambda: print("waiting: somebody else is measuring here", flush=True)) as held:
        with writing(plan.root):
            plan.root.mkdir(parents=True)
        if asked.base is None:
            return _against_records(asked, settings, plan, held)
        with base_tree(asked.base, TREE, runs / "check", asked.environment) as base:
            trees = {"base": base, "candidate": this_tree(TREE)}
            print(f"{len(plan.cells)} cell(s), {plan.pairs} pair(s); records: {plan.root}", flush=True)
            cells = _judge_measured(Bench(trees, plan, held), settings, asked.allow)
            return Outcome(f"{trees['candidate'].name} against {base.name}", cells, base.notes)


def _judge_measured(bench: Bench, settings: CheckSettings, allowed: Sequence[str]) -> tuple[CellOutcome, ...]:
    """A gap that only the clock explains is measured once more."""
    measured = bench.time(bench.count())
    found = outcomes(tuple(measured.values()), settings, allowed)
    hot = [cell.name for cell in found if cell.timing is not None and cell.timing.thermal]
    if not hot:
        return found
    print(f"thermal: {', '.join(hot)}; measuring again", flush=True)
    cells = tuple((name, overrides) for name, overrides in bench.plan.cells if name in hot)
    again = replace(bench, plan=replace(bench.plan, cells=cells, first_repeat=bench.plan.pairs))
    cooler = again.time({name: replace(measured[name], base=(), candidate=()) for name in hot})
    return outcomes(tuple({**measured, **cooler}.values()), settings, allowed)


def _against_records(asked: Asked, settings: CheckSettings, plan: Plan, held: int) -> Outcome:
    """This tree, measured now, against what is stored."""
    bench = Bench({"candidate": this_tree(TREE)}, plan, held)
    measured: Mapping[str, Measured] = bench.time(bench.count())
    refused = [f"{cell.name}: {cell.failed}" for cell in measured.values() if cell.failed is not None and not cell.candidate]
    if refused:
        raise ConfigError("\n".join(refused))
    assert asked.records is not None
    cells, notes = stored_cells(asked.records, plan.side("candidate"))
    return Outcome(f"{bench.trees['candidate'].name} against records in {asked.records}", outcomes(cells, settings, asked.allow), notes)


def _requests(asked: Asked, settings: CheckSettings) -> tuple[Settings, list[Request]]:
    """The cells of the work, as this tree understands it."""
    given = _work(asked, settings)
    path = [searchpath(asked.config_dir)] if asked.config_dir else []
    where, found = requests([*path, *given], multirun=True)
    distinct = list({one.cell.key: one for one in found}.values())
    return where, distinct


def _work(asked: Asked, settings: CheckSettings) -> tuple[str, ...]:
    """What was given, and in front of it the configured work where nothing but places was given."""
    return asked.overrides if _says_what(asked) else (*settings.workload, *asked.overrides)


def _says_what(asked: Asked) -> bool:
    return any(line.partition("=")[0] not in PLACES for line in asked.overrides)


def _enough_pairs(settings: CheckSettings, found: Sequence[Request]) -> int:
    return pairs_needed(len(found), max(settings.run_noise.of(one.machine.device) for one in found))


def _overrides(asked: Asked, settings: CheckSettings, found: Sequence[Request]) -> list[tuple[str, ...]]:
    """For each cell what makes it in either tree: what was given, every list of values replaced by the one of this cell."""
    given = [line for line in _work(asked, settings) if line.partition("=")[0] not in PLACES]
    each = []
    for one in found:
        chosen = {_key(line) for line in one.overrides}
        each.append((*(line for line in given if _key(line) not in chosen), *one.overrides))
    return each


def _key(line: str) -> str:
    return line.partition("=")[0].lstrip("+~")
