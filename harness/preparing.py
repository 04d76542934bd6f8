"""What a workload needs, found in the cache, or made by prepare in a process of its own, which may import torch and use the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harness.config import Config, Count, Request
from harness.data.counts import DataCounts
from harness.errors import HarnessError
from harness.launch import run_door
from harness.places import Prepared, PrepareRequest
from harness.prepare import about_data, find, find_count
from harness.spec import content_key, parse
from harness.turns import turn


def prepared(request: Request, cache: str, folder: Path, *, held: int | None, say: Callable[[str], None]) -> Prepared:
    """Tokens, base and initial adapter of ``request``; what has to be made is asked for under ``folder``. ``say`` what the data is.

    ``held``: the descriptor of our turn. Raises HarnessError when something is wrong with a source.
    """
    job = folder / f"{request.cell.workload.key}.json"
    out = job.with_suffix(".prepared.json")
    place = str(Path(cache).expanduser().resolve())
    wanted = PrepareRequest(workload=request.cell.workload, sources=request.sources, cache=place, out=str(out))
    found = find(wanted)
    if found is not None:
        for line in about_data(request.cell.workload.data, found.data):
            say(line)
        return found
    run_door("harness.prepare", wanted, job, held=held, network=True)
    return parse(Prepared, json.loads(out.read_text(encoding="utf-8")))


def counting(say: Callable[[str], None]) -> Count:
    """Counts the samples of an epoch by tokenising the data; once, however many engines and schedules ask about the same."""
    known: dict[tuple[str, str], DataCounts | HarnessError] = {}

    def count(config: Config, asked: Request) -> int:
        key = content_key(asked.cell.workload.model), content_key(asked.cell.workload.data)
        if key not in known:
            try:
                known[key] = _counts(config, asked, say)
            except HarnessError as error:  # of the data: every cell has it, and it is found out once
                known[key] = error
        counts = known[key]
        if isinstance(counts, HarnessError):
            raise counts
        return counts.samples_train

    return count


def _counts(config: Config, asked: Request, say: Callable[[str], None]) -> DataCounts:
    workload, root = asked.cell.workload, Path(config.runs).expanduser().resolve()
    job = root / "work" / "prepare" / f"{workload.key}.count.json"
    out, cache = str(job.with_name(f"{workload.key}.counted.json")), str(Path(config.cache).expanduser().resolve())
    wanted = PrepareRequest(workload=workload, sources=asked.sources, cache=cache, out=out, only_count=True)
    found = find_count(wanted)
    if found is None:
        say(f"train.epochs: tokenising {workload.data.name} to count its samples")  # what they are is said when the run prepares
        with turn(root, lambda: say("waiting: another sweep is measuring here")) as held:
            run_door("harness.prepare", wanted, job, held=held, network=True)
        found = parse(DataCounts, json.loads(Path(out).read_text(encoding="utf-8")))
    return found
