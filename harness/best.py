"""``engine=best``: the engine and the knobs that tune found for this workload on this machine, composed anew from today's YAML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from harness.compose import compose_one, plain
from harness.errors import ConfigError
from harness.machine import detect
from harness.spec import Workload
from harness.tuned import Tuned, found, name_of

BEST = "engine=best"
_NOT_TUNES = ("machine.memory_cap_gib", "hydra.", "keep=", "plan=", "rerun=", "repeat=", "limits.")
RESULTS = Path(__file__).resolve().parent.parent / "results"


def without_best(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether ``overrides`` ask for the best engine, and the others. Raises ConfigError where they set its knobs too, or sweep over it."""
    if several := [line for line in overrides if line.startswith("engine=") and line != BEST and "best" in re.split(r"[=,()\s]", line)]:
        why = f"{BEST} cannot be one of several values; run it by itself: the same command with {BEST}"
        raise ConfigError("\n".join(f"{line}: {why}" for line in several))
    if BEST not in overrides:
        return False, list(overrides)
    others = [line for line in overrides if line != BEST]
    wrong = [line for line in others if line.lstrip("+~").startswith("engine")]
    if wrong:
        why = "engine=best brings its own engine and knobs; leave this out, or choose an engine"
        raise ConfigError("\n".join(f"{line}: {why}" for line in wrong))
    return True, others


def best_engine(
    overrides: Sequence[str], workload: Workload, device: Literal["cpu", "cuda"], memory_cap_gib: int | None, runs: Path
) -> tuple[dict[str, Any], Tuned]:
    """The engine's configuration, and what is known of it. Raises ConfigError with the command to run where nothing is tuned."""
    try:
        machine = detect(device, memory_cap_gib=memory_cap_gib)
    except LookupError as error:
        raise ConfigError(f"engine=best: {error}; choose machine=cpu or another machine") from error
    tuned = found([runs, RESULTS], machine, workload)
    if tuned is None:
        cap = f" memory_gib={memory_cap_gib}" if memory_cap_gib else ""
        words = [line for line in overrides if not line.startswith(_NOT_TUNES)]
        command = f"{shlex.join(['python', '-m', 'harness.tune', *words])} budget_minutes=20{cap}"
        raise ConfigError(f"engine=best: nothing is tuned for {name_of(workload)} on {machine.key}; run: {command}")
    about_machine = [line for line in overrides if line.startswith(("machine", "hydra.searchpath"))]
    engine: dict[str, Any] = plain(compose_one([*about_machine, f"engine={tuned.engine}"]))["engine"]
    unknown = sorted(set(tuned.knobs) - set(engine["knobs"]))
    if unknown:
        raise ConfigError(f"engine=best: {tuned.engine} no longer has the knobs {', '.join(unknown)}; run python -m harness.tune again")
    return {**engine, "processes": tuned.processes, "knobs": {**engine["knobs"], **tuned.knobs}}, tuned
