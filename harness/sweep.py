"""Run the cells of a sweep one after the other, keep every record, score what was trained, and report."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

from rich.console import Console

from harness import report
from harness.config import Request, Settings
from harness.data.tokens import TokenFile
from harness.launch import adapter_folder, run_cell, run_door, unsupported
from harness.places import Prepared, PrepareRequest, ScoreItem, ScoreRequest
from harness.plan import Planned, least_memory_bytes, plan, weights_bytes
from harness.progress import label, sweep_progress
from harness.record import Record, loads_score
from harness.spec import parse
from harness.store import Results, load, save, save_score, score_path

_GIB = 2**30


class Exit(IntEnum):
    """Exit codes of a sweep."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CELLS_FAILED = 5
    NOTHING_RAN = 6
    INTERRUPTED = 130


def run(settings: Settings, requests: Sequence[Request], console: Console) -> Exit:
    """Run what needs running; the result tells scripts whether every cell has an answer."""
    root = Path(settings.runs).expanduser().resolve()
    cache = Path(settings.cache).expanduser().resolve()
    earlier = [stored.record for stored in load(root).stored]
    planned = plan(requests, earlier, settings.rerun)
    if settings.plan == "only":
        _show(planned, console)
        return Exit.OK
    prepared = _prepare(planned, cache, root, console)
    records = _run_cells(planned, prepared, earlier, root, console)
    _score(planned, prepared, [*earlier, *records], root, settings, console)
    return _finish(planned, records, earlier, root, console)


def _prepare(planned: Sequence[Planned], cache: Path, root: Path, console: Console) -> dict[str, Prepared]:
    """Make tokens, base and adapter of every workload before anything is measured: bad data ends a sweep at its start."""
    prepared: dict[str, Prepared] = {}
    for cell in planned:
        workload = cell.request.cell.workload
        if cell.action == "unsupported" or workload.key in prepared:
            continue
        if not console.is_terminal or cell.action == "run":
            console.print(f"preparing {workload.label}", markup=False, highlight=False)
        job = root / "work" / "prepare" / f"{workload.key}.json"
        out = job.with_suffix(".prepared.json")
        request = PrepareRequest(workload=workload, sources=cell.request.sources, cache=str(cache), out=str(out))
        run_door("harness.prepare", request, job, network=True)
        prepared[workload.key] = parse(Prepared, json.loads(out.read_text(encoding="utf-8")))
    return prepared


def _run_cells(
    planned: Sequence[Planned], prepared: dict[str, Prepared], earlier: Sequence[Record], root: Path, console: Console
) -> list[Record]:
    recorded = {(record.machine.key, record.cell.key, record.status) for record in earlier}
    records: list[Record] = []
    for cell in planned:
        key = (cell.machine.key, cell.request.cell.key, "unsupported")
        if cell.action == "unsupported" and key not in recorded:
            record = unsupported(cell.request, cell.machine, str(cell.reason))
            save(record, root)
            console.print(f"  {'unsupported':<12} {label(cell)}: {cell.reason}", markup=False, highlight=False)
    waiting = [cell for cell in planned if cell.action == "run"]
    if not waiting:
        return records
    sitting = secrets.token_hex(4)
    with sweep_progress(console, waiting) as progress:
        for cell in waiting:
            progress.begin(cell)
            place = prepared[cell.request.cell.workload.key]
            record = run_cell(cell.request, cell.machine, place, root, progress.event, sitting)
            save(record, root)
            progress.end(record)
            records.append(record)
    return records


def _score(
    planned: Sequence[Planned], prepared: dict[str, Prepared], known: Sequence[Record], root: Path, settings: Settings, console: Console
) -> None:
    """Score every kept adapter of these workloads that has no score yet, and the base itself; then drop what is not to be kept."""
    for workload_key, place in prepared.items():
        request = next(cell for cell in planned if cell.request.cell.workload.key == workload_key)
        mine = [record for record in known if record.cell.workload.key == workload_key]
        adapters = {_adapter(record) for record in mine} - {None}
        folders = {sha: adapter_folder(root, sha) for sha in adapters if sha and adapter_folder(root, sha).exists()}
        if folders and len(TokenFile.open(Path(place.tokens)).held_out):
            _score_workload(request, place, folders, root, console)
        if settings.keep == "none":
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)


def _adapter(record: Record) -> str | None:
    return record.measurement.artifacts.adapter_sha256 if record.measurement else None


def _score_workload(cell: Planned, place: Prepared, folders: dict[str, Path], root: Path, console: Console) -> None:
    tokens_sha256 = Path(place.tokens).stem
    wanted: list[tuple[str | None, Path | None]] = [(None, None), *folders.items()]
    work = root / "work" / "score"
    items = [
        ScoreItem(adapter=str(folder) if folder else None, adapter_sha256=sha, out=str(work / f"{sha or 'base'}.json"))
        for sha, folder in wanted
        if not score_path(root, place.base_sha256, tokens_sha256, sha).exists()
    ]
    if not items:
        return
    console.print(
        f"scoring {len(items)} set(s) of weights of {cell.request.cell.workload.label} on held-out rows", markup=False, highlight=False
    )
    request = ScoreRequest(workload=cell.request.cell.workload, prepared=place, items=tuple(items), device=cell.machine.device)
    run_door("harness.score", request, work / f"{cell.request.cell.workload.key}.json")
    for item in items:
        save_score(loads_score(Path(item.out).read_text(encoding="utf-8"), item.out), root)
        Path(item.out).unlink()


def _finish(planned: Sequence[Planned], records: Sequence[Record], earlier: Sequence[Record], root: Path, console: Console) -> Exit:
    keys = {(cell.machine.key, cell.request.cell.key) for cell in planned}
    latest: dict[tuple[str, str], Record] = {}
    for record in [*earlier, *records]:
        key = (record.machine.key, record.cell.key)
        if key in keys:
            latest[key] = record
    statuses = [record.status for record in latest.values()]
    ok = statuses.count("ok")
    results = load(root)
    if results.stored:
        path = report.write(results, root)
        workloads = {cell.request.cell.workload.key for cell in planned}
        mine = tuple(stored for stored in results.stored if stored.record.cell.workload.key in workloads)
        console.print(report.table(Results(mine, results.problems)), markup=False, highlight=False)
        console.print(f"report: {path}", markup=False, highlight=False)
    if ok == 0:
        console.print("nothing was measured: no cell ended ok", markup=False)
        return Exit.NOTHING_RAN
    failed = [status for status in statuses if status not in ("ok", "unsupported")]
    return Exit.CELLS_FAILED if failed else Exit.OK


def _show(planned: Sequence[Planned], console: Console) -> None:
    """``plan=only``: the cells, why some are impossible, and what the rest will take."""
    for cell in planned:
        reason = f"  ({cell.reason})" if cell.reason else ""
        console.print(f"{cell.action:<12} {label(cell)}{reason}", markup=False, highlight=False)
    waiting = [cell for cell in planned if cell.action == "run"]
    known = [cell.seconds for cell in waiting if cell.seconds is not None]
    time = str(timedelta(seconds=round(sum(known)))) if known else "not known"
    unknown = f", {len(waiting) - len(known)} without an earlier record to predict from" if len(known) < len(waiting) else ""
    console.print(f"{len(waiting)} of {len(planned)} cells to run; time (predicted): {time}{unknown}", markup=False, highlight=False)
    models = {cell.request.cell.workload.model.name: cell.request for cell in waiting}
    for name, request in models.items():
        disk, memory = weights_bytes(request), least_memory_bytes(request)
        console.print(f"{name}: weights on disk {_gib(disk)}, memory at least {_gib(memory)} (predicted)", markup=False, highlight=False)


def _gib(size: int | None) -> str:
    return "not known before loading" if size is None else f"{size / _GIB:.2f} GiB"
