"""``python -m harness.converge ROOT REFERENCE CANDIDATE VARIANT …``: does it learn as much, where single updates cannot agree?"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.comparable import Run, measured, not_finite, runs, unusable
from harness.deviations import HELD_OUT_FLOOR
from harness.errors import ConfigError, HarnessError, StoreError
from harness.exits import leave_with
from harness.parity import POWER
from harness.store import load

SAME, USAGE, NOT_COMPARABLE, DIFFERENT = 0, 2, 4, 7
LEAST_SEEDS = 3
SHARE = 0.005  # of what the reference learnt: two layers that learnt 1.98 strayed by 0.0011 for rounding alone (docs/full-fine-tuning.md)
LATE = 0.25  # of the steps, at the end, whose mean training loss is compared
USAGE_TEXT = """python -m harness.converge ROOT REFERENCE CANDIDATE VARIANT … [--workload LABEL] [--json]

  python -m harness.converge runs hf,compute_dtype=float32 fused,optimizer_state=int8 fused,optimizer_state=fp32

Each names runs below ROOT as ENGINE[,KNOB=VALUE…]. Runs are paired by train.seed, at least 3 of them. Two figures of each pair: the
held-out loss of the weights, and the mean training loss of the last quarter of the steps. They may differ by 0.001, by 0.5 %% of what the
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
    engine, *wanted = name.split(",")
    spec = run.record.cell.engine
    if not all("=" in each for each in wanted):
        raise ConfigError(f"'{name}': expected ENGINE[,KNOB=VALUE…], for example fused,optimizer_state=int8")
    pairs = [each.split("=", 1) for each in wanted]
    return spec.name == engine and all(str(spec.knobs.get(knob)) == value for knob, value in pairs)


def _named(known: Sequence[Run], name: str) -> list[Run]:
    """Those that ``name`` names; raises ConfigError where there is none."""
    named = [run for run in known if _is(run, name)]
    if not named:
        there = _names(run for run in known if run.record.cell.engine.name == name.split(",")[0]) or _names(known)
        raise ConfigError(f"'{name}': no run of it; there are runs of {there or 'nothing'}")
    return named


def _chosen(known: Sequence[Run], name: str) -> list[Run]:
    """Those that ``name`` names, all of one set of knobs."""
    chosen = _named(known, name)
    if len({_knobs(run) for run in chosen}) > 1:
        raise ConfigError(f"'{name}' names runs of several sets of knobs, which are not averaged; say which: {_names(chosen)}")
    return chosen


def _knobs(run: Run) -> tuple[str, str]:
    spec = run.record.cell.engine
    return spec.name, json.dumps(spec.knobs, sort_keys=True)


def _names(found: Iterable[Run]) -> str:
    """The engines of ``found``, each with the knobs in which its runs differ."""
    specs = {_knobs(run): run.record.cell.engine for run in found}
    names = set()
    for spec in specs.values():
        others = [other.knobs for other in specs.values() if other.name == spec.name]
        differ = [knob for knob in spec.knobs if len({str(knobs.get(knob)) for knobs in others}) > 1]
        names.add(",".join([spec.name, *(f"{knob}={spec.knobs[knob]}" for knob in differ)]))
    return "; ".join(sorted(names))


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
    parser.add_argument("variants", nargs="*", help="harmless changes of the reference, which widen what is allowed")
    parser.add_argument("--workload", help="the label of one of its workloads, where ROOT holds several")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    return parser


if __name__ == "__main__":
    leave_with(main)
