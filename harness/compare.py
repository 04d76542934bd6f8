"""``python -m harness.compare REF CANDIDATE``: did the candidate train the same thing? Of two records, run folders or adapters."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.anchors import anchor_at
from harness.comparable import Run, runs
from harness.config import requests
from harness.errors import ConfigError, HarnessError, StoreError
from harness.exits import leave_with
from harness.launch import run_door
from harness.parity import judge_against, judge_weights
from harness.places import PairItem, ScoreItem, ScoreRequest
from harness.preparing import prepared
from harness.record import Score, loads_score
from harness.store import load, read_pair
from harness.turns import turn
from harness.updates import alike
from harness.verdict import Verdict
from harness.weights import adapter_sha256

SAME, USAGE, NOT_COMPARABLE, DIFFERENT = 0, 2, 4, 7
USAGE_TEXT = """python -m harness.compare REF CANDIDATE [--json] [--strict] [--root ROOT …] [OVERRIDE …]

  python -m harness.compare RECORD.json RECORD.json           two records, anywhere below a folder of results
  python -m harness.compare runs/…/hf-1a2b runs/…/fused-3c4d  two run folders: the newest record of each
  python -m harness.compare ADAPTER ADAPTER model=smollm2_135m data=python_docs
                                                              two PEFT adapters, trained as the overrides say

Exit code 0: same, 7: different, 4: not comparable, 2: the command is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict, every deviation beside its allowance, the worst and where. Returns 0, 2, 4 or 7."""
    options = _parser().parse_args(arguments)
    try:
        given = [_kind(path) for path in (options.reference, options.candidate)]
        if given == ["adapter", "adapter"]:
            found = _judge_adapters(options.reference, options.candidate, options.overrides)
        elif "adapter" in given:
            raise ConfigError("a record and an adapter cannot be compared: give two records, or two adapters")
        elif options.overrides:
            raise ConfigError(f"{' '.join(options.overrides)}: overrides describe the work of two adapters; a record says so itself")
        else:
            found = _judge_records(options.reference, options.candidate, options.root)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    partly = bool(found.untested) and options.strict and found.kind == "same"
    print(json.dumps(_plain(found), indent=1, allow_nan=False) if options.json else _text(found))
    if partly:
        print("--strict: not every test was made", file=sys.stderr)
    return NOT_COMPARABLE if partly else {"same": SAME, "different": DIFFERENT}.get(found.kind, NOT_COMPARABLE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.compare", usage=USAGE_TEXT)
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("--strict", action="store_true", help="exit code 4 when a test could not be made")
    parser.add_argument("--root", type=Path, action="append", default=[], help="a further folder of results with variants of the reference")
    return parser


def _kind(path: Path) -> str:
    if path.is_file() and path.suffix == ".json":
        return "record"
    if not path.is_dir():
        raise StoreError(f"{path}: expected a record (a .json file), a folder of a run's records, or of a PEFT adapter")
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if any(path.glob("*.json")):
        return "record"
    raise StoreError(f"{path}: neither records nor a PEFT adapter here; name one record, one run's folder, or one adapter")


def _judge_records(reference: Path, candidate: Path, more: Sequence[Path]) -> Verdict:
    """With the variants of the reference that lie in the same results, and the scores and updates that are known there."""
    files = [_record_file(path) for path in (reference, candidate)]
    for file in files:
        if len(file.parents) < 4:
            raise StoreError(f"{file}: a record lies in ROOT/MACHINE/WORKLOAD/ENGINE-KEY/; keep it where the sweep wrote it")
    for root in more:
        if not any(root.glob("*/*/*/*.json")):
            raise StoreError(f"--root {root}: no results in it; expected a folder of MACHINE/WORKLOAD/ENGINE-KEY/RECORD.json, as runs=… is")
    roots = list(dict.fromkeys([*(file.parents[3] for file in files), *(root.resolve() for root in more)]))
    results = load(*roots)
    known = runs(results)
    at = {root / stored.path: run for root in roots for stored, run in zip(results.stored, known, strict=True)}
    unread = [problem for problem in results.problems if any(file.name in problem for file in files)]
    if unread:
        raise StoreError("\n".join(unread))
    one, other = (_run_at(file, at) for file in files)
    return judge_against(other, anchor_at(one, known))


def _record_file(path: Path) -> Path:
    return (max(path.glob("*.json")) if path.is_dir() else path).resolve()  # their names begin with the moment of the start


def _run_at(file: Path, at: dict[Path, Run]) -> Run:
    if file not in at:
        raise StoreError(f"{file}: no record of a results folder; expected ROOT/MACHINE/WORKLOAD/ENGINE-KEY/RECORD.json")
    return at[file]


def _judge_adapters(reference: Path, candidate: Path, overrides: Sequence[str]) -> Verdict:
    """Both are scored on the held-out rows of the workload that ``overrides`` describe, their updates taken from its initial adapter."""
    settings, found = requests(overrides, multirun=None)
    (request,) = found
    hashes = adapter_sha256(reference), adapter_sha256(candidate)
    root = Path(settings.runs).expanduser().resolve()
    with turn(root, lambda: print("waiting: a sweep is measuring here", file=sys.stderr)) as held, tempfile.TemporaryDirectory() as work:
        place = prepared(request, settings.cache, Path(work), held=held, say=print)
        weights = {None: None, hashes[0]: str(reference.resolve()), hashes[1]: str(candidate.resolve())}
        items = tuple(ScoreItem(adapter=path, adapter_sha256=sha, out=f"{work}/{sha or 'base'}.json") for sha, path in weights.items())
        pair = PairItem(trained=(str(reference.resolve()), str(candidate.resolve())), trained_sha256=hashes, out=f"{work}/pair.json")
        asked = ScoreRequest(workload=request.cell.workload, prepared=place, items=items, device=request.machine.device, pairs=(pair,))
        run_door("harness.score", asked, Path(work) / "score.json", held=held)
        scores = {item.adapter_sha256: _score(Path(item.out)) for item in items}
        compared = read_pair(Path(pair.out), "the pair of updates")
    start = compared.start_sha256
    final = alike({(start, *compared.trained_sha256): compared}, start, hashes[1], hashes[0])
    assert final is not None
    return judge_weights(scores[hashes[1]], scores[hashes[0]], scores[None], final)


def _score(path: Path) -> Score:
    return loads_score(path.read_text(encoding="utf-8"), path.name)


def _text(found: Verdict) -> str:
    lines = [f"verdict: {found.label}"]
    if found.tests:
        lines += ["", f"  {'test':<32} {'off by':>10} {'allowed':>10} {'of it':>8}"]
    for test, allowed in found.tests:
        share = test.excess / allowed
        seen = f"  {test.ratio:.4f} x" if test.ratio is not None else f"  cosine {test.cosine:.5f}" if test.cosine is not None else ""
        mark = "  different" if share > 1 else ""
        name = f"{test.name}{test.where}"
        lines.append(f"  {name:<32} {test.excess * test.unit:>10.3g} {allowed * test.unit:>10.3g} {share:>8.2f}{seen}{mark}")
    lines += [f"  {name:<32} not tested: {why}" for name, why in (found.untested or {}).items()]
    lines += ["", *([f"worst: {found.worst}"] if found.tests else []), *(f"because: {reason}" for reason in found.reasons)]
    lines += [f"likely: {found.hint}"] if found.hint else []
    if found.kind == "not comparable" and found.light.text:
        lines.append(f"the light check {found.light.text}: {found.light.detail}")
    return "\n".join(lines).strip()


def _plain(found: Verdict) -> dict[str, Any]:
    return {
        "verdict": found.kind,
        "label": found.label,
        "anchor": found.anchor,
        "worst": found.worst,
        "reasons": list(found.reasons),
        "hint": found.hint,
        "light": {"passed": found.light.passed, "open": found.light.open, "detail": found.light.detail},
        "untested": dict(found.untested or {}),
        "tests": [
            {
                "name": test.name,
                "where": test.where.strip(" ()"),
                "deviation": _finite(test.excess * test.unit),
                "allowed": allowed * test.unit,
                "share": _finite(test.excess / allowed),
                "ratio": test.ratio,
                "cosine": test.cosine,
                "passed": test.excess <= allowed,
            }
            for test, allowed in found.tests
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity; null with ``passed`` false says it."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    leave_with(main)
