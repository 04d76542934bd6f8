"""What a workload needs, found in the cache, or made by prepare in a process of its own, which may import torch and use the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harness.config import Config, Count, Request
from harness.launch import run_door
from harness.places import Prepared, PrepareRequest
from harness.prepare import find
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
        say(found.notes[-1])
        return found
    run_door("harness.prepare", wanted, job, held=held, network=True)
    return parse(Prepared, json.loads(out.read_text(encoding="utf-8")))


def counting(say: Callable[[str], None]) -> Count:
    """Counts the samples of an epoch by preparing the data; once, however many engines and schedules ask about the same."""
    known: dict[tuple[str, str], int] = {}

    def count(config: Config, asked: Request) -> int:
        workload, root = asked.cell.workload, Path(config.runs).expanduser().resolve()
        key = content_key(workload.model), content_key(workload.data)
        if key not in known:
            say(f"train.epochs: preparing {workload.data.name} to count its samples")  # what they are is said when the run prepares
            with turn(root, lambda: say("waiting: another sweep is measuring here")) as held:
                made = prepared(asked, config.cache, root / "work" / "prepare", held=held, say=lambda _: None)
            assert made.data is not None  # of what is prepared by this version
            known[key] = made.data.samples_train
        return known[key]

    return count
