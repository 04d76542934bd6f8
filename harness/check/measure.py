"""Measure both trees here, interleaved: every run is the tree's own command line in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.check.judge import Measured
from harness.check.trees import Tree
from harness.comparable import Run, runs
from harness.endings import last_lines
from harness.errors import RecordError, StoreError
from harness.gates import Counted, loads_counted
from harness.guard import guarded
from harness.store import load, writing

SIDES = ("base", "candidate")
_ACCIDENTS = ("unsteady", "contended")  # the doing of the machine, not of the tree
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """``cells``: names, each with the overrides that make it in either tree. ``pairs`` 0: count only. ``arguments``: of every command."""

    cells: tuple[tuple[str, tuple[str, ...]], ...]
    pairs: int
    arguments: tuple[str, ...]
    cache: Path
    root: Path
    first_repeat: int = 0

    def side(self, name: str) -> Path:
        """The folder of results of one tree."""
        return self.root / name


@dataclass
class Bench:
    """Runs the commands of both trees one after the other, and remembers which records are already known.

    ``held``: the descriptor of our turn on the machine's store.
    """

    trees: Mapping[str, Tree]
    plan: Plan
    held: int
    seen: dict[str, set[str]] = field(default_factory=lambda: {side: set() for side in SIDES})

    @property
    def sides(self) -> tuple[str, ...]:
        """Both, or the candidate alone where the base is stored."""
        return tuple(side for side in SIDES if side in self.trees)

    def count(self) -> dict[str, Measured]:
        """A counted run of every cell in each tree."""
        return {name: self._counted(index, name, overrides) for index, (name, overrides) in enumerate(self.plan.cells)}

    def time(self, cells: Mapping[str, Measured]) -> dict[str, Measured]:
        """Timed pairs of every cell that has not failed, base first and candidate first in turn."""
        found = dict(cells)
        for pair in range(self.plan.pairs):
            for name, overrides in self.plan.cells:
                if found[name].failed is None:
                    found[name] = self._pair(found[name], overrides, pair)
        return found

    def _pair(self, cell: Measured, overrides: Sequence[str], pair: int) -> Measured:
        """One run of each tree. What something else on the machine spoilt is measured again, both sides."""
        order = self.sides if pair % 2 == 0 else self.sides[::-1]
        both: dict[str, Run] = {}
        failed = None
        for _ in range(_TRIES):
            both, failed = {}, None
            for side in order:
                run = self._timed(side, cell.name, overrides, pair)
                if isinstance(run, str):
                    return replace(cell, failed=run)
                both[side] = run
                if run.record.status != "ok":
                    failed = run.record
                    break
            if failed is None or failed.status not in _ACCIDENTS:
                break
        why = f"the {list(both)[-1]} ended {failed.status} (pair {pair + 1}): {failed.reason}" if failed else None
        base, candidate = (
            (*before, *([both[side]] if side in both else [])) for side, before in zip(SIDES, (cell.base, cell.candidate), strict=True)
        )
        return replace(cell, failed=why, base=base, candidate=candidate)

    def _counted(self, index: int, name: str, overrides: Sequence[str]) -> Measured:
        lacking = [side for side in self.sides if not (self.trees[side].path / "harness" / "count.py").is_file()]
        if lacking:
            return Measured(
                name, notes=(f"the {' and the '.join(lacking)} is older than counting: of counts only what records say is known",)
            )
        each: list[Counted] = []
        for side in self.sides:
            out = self.plan.side(side) / "counts" / f"{index}.json"
            command = [*self._python(side, "harness.count"), "--out", str(out), *overrides, f"cache={self.plan.cache}"]
            code = self._run(side, command)
            if not out.is_file():
                return Measured(name, failed=f"the {side} does not count it (exit code {code}): {self._said(side)}")
            try:
                each.append(loads_counted(out.read_text(encoding="utf-8"), f"{side}/counts/{out.name}"))
            except RecordError as error:
                return Measured(name, failed=str(error))
            print(f"  counted   {side:<9}  {name}", flush=True)
        return Measured(name, counted=(each[0], each[1]) if len(each) == len(SIDES) else None)

    def _timed(self, side: str, name: str, overrides: Sequence[str], pair: int) -> Run | str:
        """The run, or why there is none."""
        root = self.plan.side(side)
        fixed = (
            f"repeat={self.plan.first_repeat + pair}",
            f"runs={root}",
            f"cache={self.plan.cache}",
            "rerun=all",
            "keep=none",
            "plan=run",
        )
        code = self._run(side, [*self._python(side, "harness"), *overrides, *fixed])
        results = load(root)
        fresh = [run for run, stored in zip(runs(results), results.stored, strict=True) if stored.path not in self.seen[side]]
        self.seen[side] = {stored.path for stored in results.stored}
        if len(fresh) != 1:
            return f"the {side} left no record (exit code {code}): {'; '.join(results.problems) or self._said(side)}"
        record, tree = fresh[0].record, self.trees[side]
        if tree.commit is not None and record.provenance.commit != tree.commit:
            ran = record.provenance.commit[:12]
            raise StoreError(f"the {side} ran {ran} instead of {tree.commit[:12]}: is another engine-room in the way?")
        seconds = record.measurement.steps.seconds if record.measurement else ()
        last = f"{seconds[-1]:.4g} s the last step" if seconds else ""
        print(f"  {f'pair {pair + 1}/{self.plan.pairs}':<10} {side:<9}  {name}  {record.status}  {last}", flush=True)
        return fresh[0]

    def _python(self, side: str, module: str) -> list[str]:
        return [self.trees[side].python, "-m", module, *self.plan.arguments]

    def _run(self, side: str, command: Sequence[str]) -> int:
        """``PYTHONSAFEPATH``: neither the command nor what it starts may find the other tree in the current folder."""
        environment = {**os.environ, "PYTHONPATH": _python_path(self.trees[side].path), "PYTHONSAFEPATH": "1"}
        with writing(self.plan.root):
            self._log(side).parent.mkdir(parents=True, exist_ok=True)
            log = self._log(side).open("wb")
        with log, guarded(command, held=self.held, env=environment, stdout=log, stderr=log) as process:
            return process.wait()

    def _log(self, side: str) -> Path:
        return self.plan.root / f"{side}.log"

    def _said(self, side: str) -> str:
        return last_lines(self._log(side))


def _python_path(tree: Path) -> str:
    """The tree, then what the user put on the path, without any other tree: packages may lie there."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([str(tree), *(path for path in given if not (Path(path) / "harness").is_dir())])
