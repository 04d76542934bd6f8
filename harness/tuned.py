"""What tune found: one YAML file for each machine and kind of work, written by tune, read by ``engine=best``, the report and people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import JsonValue

from harness.engine import Machine
from harness.errors import ConfigError
from harness.spec import Spec, Workload, content_key, parse
from harness.weights.sources import write_atomically

FOLDER = "tuned"  # <root>/tuned/<machine>/<model>-<method>-<data>-<key>.yaml


class Trial(Spec):
    """A candidate that was measured: for how long a look, what came out, and what had been predicted. Null: nothing came of it.

    ``total_seconds``: of the planned run. ``cell``: the key of its record.
    """

    title: str
    engine: str
    processes: int = 1
    knobs: dict[str, JsonValue]
    steps: int
    status: str
    reason: str | None
    total_seconds: float | None
    step_seconds: float | None
    startup_seconds: float | None
    peak_bytes: float | None
    predicted_seconds: float
    predicted_bytes: float
    cell: str


class Predicted(Spec):
    """A candidate that was not measured: what is predicted of it, and why it was not tried."""

    title: str
    total_seconds: float
    least_seconds: float
    peak_bytes: float
    why: str

    @property
    def engine(self) -> str:
        """The first word of the title."""
        return self.title.partition(" ")[0]


class Tuned(Spec):
    """The best that was found for a planned run. ``engine``, ``processes`` and ``knobs``: what ``engine=best`` runs; ``parity``: of its
    longest look.

    ``bound_seconds``: less than that nothing left could take, by its optimistic bound; null where nothing was left. ``stopped``: why the
    search ended. ``left_out``: engines that could not be searched, and why. ``experience``: what it began with, null in a file that is
    older than that. ``predicted``: the most promising of what was not measured.
    """

    schema_version: Literal[1] = 1
    machine: str
    memory_cap_gib: int | None
    workload: str
    planned_steps: int
    samples_per_step: int
    engine: str
    processes: int = 1
    knobs: dict[str, JsonValue]
    total_seconds: float
    step_seconds: float
    startup_seconds: float
    peak_bytes: float | None
    parity: str
    bound_seconds: float | None
    stopped: str
    spent_seconds: float
    budget_seconds: float | None
    num_candidates: int
    ruled_out: dict[str, int]
    left_out: tuple[str, ...]
    experience: str | None = None
    tuned_utc: str
    commit: str
    trials: tuple[Trial, ...]
    predicted: tuple[Predicted, ...]

    @property
    def setting(self) -> str:
        """Processes, where there are several, and knobs, as one types them."""
        words = (f"{knob}={value if isinstance(value, str) else json.dumps(value)}" for knob, value in self.knobs.items())
        return " ".join([*([f"processes={self.processes}"] if self.processes > 1 else []), *words])

    @property
    def sentence(self) -> str:
        """What was found, in a line."""
        took = f"{self.step_seconds:.3g} s a step, {self.startup_seconds:.0f} s of start-up"
        return f"{self.engine} {self.setting} (tuned {self.tuned_utc[:10]} for {self.planned_steps:,} steps: {took})"


def name_of(workload: Workload) -> str:
    """Of the kind of work that one search answers: a readable name and a hash of model, data, method and samples of a step. The number of
    steps, the rate and the seed may differ: they change no speed.
    """
    key = content_key(workload.model_copy(update={"train": _like(workload)}))
    return f"{workload.model.name}-{workload.method.name}-{workload.data.name}-{key[:8]}"


def _like(workload: Workload) -> object:
    """The same schedule for all: what stays is the number of samples of a step."""
    fixed = {"steps": 1, "stop_after": None, "warmup_steps": 0, "learning_rate": 1e-4, "schedule": "constant", "seed": 0}
    return workload.train.model_copy(update={**fixed, "weight_decay": 0.0, "max_grad_norm": None, "beta1": 0.9, "beta2": 0.999})


def path_of(root: Path, machine: Machine, workload: Workload) -> Path:
    """Where the answer lies under ``root``."""
    return root / FOLDER / machine.key / f"{name_of(workload)}.yaml"


def save(tuned: Tuned, path: Path) -> None:
    """Write it, at once or not at all."""
    head = f"# What python -m harness.tune found on {tuned.tuned_utc[:10]}; engine=best runs it. Under predicted nothing was measured.\n"
    write_atomically(path, head + yaml.safe_dump(tuned.model_dump(mode="json"), sort_keys=False, width=140))


def read(path: Path) -> Tuned:
    """The answer in ``path``. Raises ConfigError when it is none."""
    try:
        return parse(Tuned, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path.name}: not what tune writes; run python -m harness.tune again: {error}") from error


def found(roots: Sequence[Path], machine: Machine, workload: Workload) -> Tuned | None:
    """The first answer among ``roots``; None when nothing is tuned for this machine and work."""
    paths = (path_of(root, machine, workload) for root in roots)
    return next((read(path) for path in paths if path.is_file()), None)
