"""What a workload needs, found in the cache, or made by prepare in a process of its own, which may import torch and use the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harness.config import Request
from harness.launch import run_door
from harness.places import Prepared, PrepareRequest
from harness.prepare import find
from harness.spec import parse


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
