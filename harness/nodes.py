"""A host that takes part in cells whose records another one makes: it runs its ranks of each, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from harness import preparing
from harness.config import Request, Settings
from harness.launch import follow
from harness.plan import plan
from harness.turns import turn


def node(requests: Sequence[Request]) -> int:
    """Which of the hosts that run ``requests`` together this is; 0 makes the records."""
    return max((request.machine.nodes.rank for request in requests), default=0)


def take_part(settings: Settings, requests: Sequence[Request], say: Callable[[str], None]) -> bool:
    """Run this host's ranks of every cell; whether all of them ended well.

    Its files lie in a folder of its own below ``runs``, which hosts may share: the lock there is held by the host that makes the records.
    """
    number = node(requests)
    root = Path(settings.runs).expanduser().resolve() / "work" / f"node-{number}"
    ended = []
    for cell in plan(requests, [], settings.rerun):
        request, title = cell.request, f"{cell.request.cell.engine.title} {cell.request.cell.workload.label}"
        if cell.action != "run":
            say(f"  {cell.action:<12} {title}: {cell.reason}")
            continue
        place = f"node {number} of {request.machine.nodes.count}"
        with turn(root, lambda: say("waiting: another sweep is measuring here")) as held:
            prepared = preparing.prepared(request, settings.cache, root / "work" / "prepare", held=held, say=say)
            say(f"  {place}: {title}: its ranks meet the others at {request.machine.nodes.endpoint} …")
            problem = follow(request, cell.machine, prepared, root, held=held)
        say(f"  {place}: {title}: {problem or 'ended well'}")
        ended.append(problem is None)
    return bool(ended) and all(ended)
