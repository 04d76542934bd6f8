"""``python -m harness.converge ROOT REFERENCE CANDIDATE VARIANT …``: does it learn as much, where single updates cannot agree?"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.comparable import Run, measured, not_finite, runs, unusable
from harness.deviations import HELD_OUT_FLOOR
from harness.errors import ConfigError, HarnessError, StoreError, nearest
from harness.exits import leave_with
from harness.parity import POWER
from harness.store import load

SAME, USAGE, NOT_COMPARABLE, DIFFERENT = 0, 2, 4, 7
LEAST_SEEDS = 3
SHARE = 0.005  # of what the reference learnt: two layers that learnt 1.98 strayed by 0.0011 for rounding alone (docs/full-fine-tuning.md)
SHOWN = 8  # names in a message
LATE = 0.25  # of the steps, at the end, whose mean training loss is compared
USAGE_TEXT = """python -m harness.converge ROOT REFERENCE CANDIDATE VARIANT … [--workload LABEL] [--json]

  python -m harness.converge runs hf,compute_dtype=float32 fused,optimizer_state=int8 fused,optimizer_state=fp32

Each names runs below ROOT as ENGINE[,KNOB=VALUE…]; ~KNOB names those of records that are older than this knob, A+B is a list. Runs are
paired by train.seed, at least 3 of them. Two figures of each pair: the held-out loss of the weights, and the mean training loss of the
last quarter of the steps. They may differ by 0.001, by 0.5 %% of what the
reference learnt, or by twice what any VARIANT, a harmless change, differs from it; and it must have learnt ten times that.

Exit code 0: same, 7: different, 4: not comparable, 2: the command is wrong."""
Figures = Mapping[int, tuple[float, float]]  # by seed: held-out loss, late training loss


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure: the candidate's less the reference's by seed, and what is allowed."""

    name: str
    differences: Mapping[int, float]
    allowed: float

    @property
    def worst(self) -> float:
        """The largest difference, either way."""
        return max(abs(difference) for difference in self.differences.values())

    def __str__(self) -> str:
        """One line for people."""
        each = ", ".join(f"{difference:+.5f}" for difference in self.differences.values())
        mean = statistics.fmean(self.differences.values())
        return f"  {self.name:<26} {each}  mean {mean:+.5f}, allowed {self.allowed:.5f}{'  different' if self.worst > self.allowed else ''}"


@dataclass(frozen=True, slots=True)
class Convergence:
    """``kind``: same, different or not comparable, then with the reason why."""

    kind: str
    compared: tuple[Compared, ...] = ()
    gain: float | None = None
    reason: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict and every difference beside its allowance. Returns 0, 2, 4 or 7."""
    options = _parser().parse_args(arguments)
    try:
        if not options.root.is_dir():
            raise StoreError(f"{options.root}: no folder; name the one that the sweep wrote to (runs=…)")
        known = [run for run in runs(load(options.root)) if not run.record.cell.workload.is_first_step]
        if not known:
            raise StoreError(f"{options.root}: no records of whole runs in it; name the folder that the sweep wrote to (runs=…)")
        for name in (options.reference, options.candidate, *options.variants):
            _named(known, name)
        known = _of_one_workload(known, options.workload)
        found = judge(known, options.reference, options.candidate, options.variants)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    print(json.dumps(_plain(found), indent=1) if options.json else _text(found))
    return {"same": SAME, "different": DIFFERENT}.get(found.kind, NOT_COMPARABLE)


def judge(known: Sequence[Run], reference: str, candidate: str, variants: Sequence[str]) -> Convergence:
    """Of runs of workloads that differ in their seed alone. Raises ConfigError for a name that none of them has."""
    named = {name: _figures(known, name) for name in (reference, candidate, *variants)}
    seeds = sorted(set(named[reference]) & set(named[candidate]))
    if broken := [run for run in known if not unusable(run) and not_finite(run) and _is(run, candidate)]:
        return Convergence("different", reason=not_finite(broken[0])[0])
    if len(seeds) < LEAST_SEEDS:
        return Convergence("not comparable", reason=f"{len(seeds)} seeds were scored for both, at least {LEAST_SEEDS} are needed")
    gain, compared = _gain(known, reference, named[reference]), []
    for index, name in enumerate(("held-out loss", "loss of the last quarter")):
        right = {seed: figures[index] for seed, figures in named[reference].items() if seed in seeds}
        strays = [abs(named[variant][seed][index] - right[seed]) for variant in variants for seed in set(named[variant]) & set(right)]
        differences = {seed: named[candidate][seed][index] - right[seed] for seed in seeds}
        compared.append(Compared(name, differences, max([HELD_OUT_FLOOR, SHARE * gain, *(2 * stray for stray in strays)])))
    if gain < POWER * compared[0].allowed:
        why = f"the reference learnt {gain:.4f}, less than {POWER:g} allowances of {compared[0].allowed:.4f}: anything would look the same"
        return Convergence("not comparable", tuple(compared), gain, why)
    return Convergence("different" if any(each.worst > each.allowed for each in compared) else "same", tuple(compared), gain)


def _of_one_workload(known: Sequence[Run], label: str | None) -> list[Run]:
    """The runs of the workloads that are one but for their seed; ``label`` picks them by one of theirs."""
    groups: dict[str, list[Run]] = {}
    for run in known:
        groups.setdefault(run.record.cell.workload.key_without_seed, []).append(run)
    named = [group for group in groups.values() if label is None or any(run.record.cell.workload.label == label for run in group)]
    if len(named) != 1:
        labels = ", ".join(sorted(group[0].record.cell.workload.label for group in groups.values())) or "none"
        which = "" if label is None else f", and none is '{label}'"
        raise ConfigError(f"one workload is compared, over its seeds; found: {labels}{which}; name one with --workload LABEL")
    return named[0]


def _is(run: Run, name: str) -> bool:
    engine, wanted = _asked(name)
    spec = run.record.cell.engine
    return spec.name == engine and all(_value(run, knob) == value for knob, value in wanted.items())


def _asked(name: str) -> tuple[str, dict[str, str | None]]:
    """The engine and the knobs that ``name`` asks for, null for one that is not to be there. Raises ConfigError where it is no name."""
    engine, *words = name.split(",")
    if not all("=" in word or re.fullmatch(r"~\w+", word) for word in words):
        raise ConfigError(
            f"'{name}': expected ENGINE[,KNOB=VALUE…], for example fused,optimizer_state=int8; ~KNOB: a run without this knob"
        )
    given: dict[str, str | None] = dict.fromkeys(word[1:] for word in words if word.startswith("~"))
    return engine, given | {knob: value for knob, _, value in (word.partition("=") for word in words if not word.startswith("~"))}


def _value(run: Run, knob: str) -> str | None:
    """As it is written in a name; None in a record that is older than the knob."""
    knobs = run.record.cell.engine.knobs
    if knob not in knobs:
        return None
    value = knobs[knob]
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)  # a comma ends the value in a name


def _named(known: Sequence[Run], name: str) -> list[Run]:
    """Those that ``name`` names; raises ConfigError where there is none, with what is nearest to the first word that none has."""
    named = [run for run in known if _is(run, name)]
    if named:
        return named
    engine, wanted = _asked(name)
    mine = [run for run in known if run.record.cell.engine.name == engine]
    if not mine:
        raise ConfigError(f"'{name}': no run of {engine}; {nearest(engine, {run.record.cell.engine.name for run in known})}")
    for knob, value in wanted.items():
        values = {_value(run, knob) for run in mine}
        if values == {None}:
            knobs = {known_knob for run in mine for known_knob in run.record.cell.engine.knobs}
            raise ConfigError(f"'{name}': no run of {engine} has a knob {knob}; {nearest(knob, knobs)}")
        if value not in values:
            there = sorted(f"~{knob}" if one is None else f"{knob}={one}" for one in values)
            raise ConfigError(f"'{name}': no run of {engine} has that {knob}; there are runs with {_few(there)}")
    raise ConfigError(f"'{name}': no run of {engine} has all of this at once; there are runs of {_names(mine)}")


def _chosen(known: Sequence[Run], name: str) -> list[Run]:
    """Those that ``name`` names, all of one set of knobs."""
    chosen = _named(known, name)
    if len({_knobs(run) for run in chosen}) > 1:
        raise ConfigError(f"'{name}' names runs of several sets of knobs, which are not averaged; say which: {_names(chosen)}")
    return chosen


def _knobs(run: Run) -> str:
    return json.dumps(run.record.cell.engine.knobs, sort_keys=True)


def _names(found: Sequence[Run]) -> str:
    """The sets of knobs of ``found``, runs of one engine: each by those in which they differ, as it can be asked for."""
    knobs = sorted({knob for run in found for knob in run.record.cell.engine.knobs})
    differ = [knob for knob in knobs if len({_value(run, knob) for run in found}) > 1]
    names = set()
    for run in found:
        values = ((knob, _value(run, knob)) for knob in differ)
        words = (f"~{knob}" if value is None else f"{knob}={value}" for knob, value in values)
        names.add(",".join([run.record.cell.engine.name, *words]))
    return _few(sorted(names))


def _few(words: Sequence[str]) -> str:
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return "; ".join(words[:SHOWN]) + more


def _figures(known: Sequence[Run], name: str) -> Figures:
    """Means over the repeats of each seed."""
    chosen = _chosen(known, name)
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for run in chosen:
        if not unusable(run) and run.score is not None and not not_finite(run):
            losses = measured(run).steps.losses
            late = statistics.fmean(losses[-max(1, round(LATE * len(losses))) :])
            by_seed.setdefault(run.record.cell.workload.train.seed, []).append((run.score.held_out_loss, late))
    return {seed: (statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs)) for seed, pairs in by_seed.items()}


def _gain(known: Sequence[Run], reference: str, figures: Figures) -> float:
    base = next(run.base_score.held_out_loss for run in known if _is(run, reference) and run.base_score is not None)
    return min(base - held_out for held_out, _ in figures.values())


def _text(found: Convergence) -> str:
    lines = [f"convergence: {found.kind}", *map(str, found.compared)]
    if found.gain is not None:
        lines.append(f"  the reference learnt {found.gain:.4f} (held-out loss of the base less its own)")
    return "\n".join([*lines, *([f"because: {found.reason}"] if found.reason else [])])


def _plain(found: Convergence) -> dict[str, object]:
    compared = [{"name": each.name, "differences": dict(each.differences), "allowed": each.allowed} for each in found.compared]
    return {"verdict": found.kind, "gain": found.gain, "reason": found.reason, "compared": compared}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.converge", usage=USAGE_TEXT)
    parser.add_argument("root", type=Path)
    parser.add_argument("reference")
    parser.add_argument("candidate")
    parser.add_argument("variants", nargs="*", default=[], help="harmless changes of the reference, which widen what is allowed")
    parser.add_argument("--workload", help="the label of one of its workloads, where ROOT holds several")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    return parser


if __name__ == "__main__":
    leave_with(main)
