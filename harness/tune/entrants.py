"""Who takes part: every engine that can start here, its configuration, and the candidates that it can run on this workload."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.compose import CONF
from harness.config import Config, Count, Request, not_counted, request, single
from harness.data.tokens import TokenFile
from harness.engine import Machine, load, requires, resumes
from harness.errors import ConfigError
from harness.interpreter import lack, located
from harness.searched import PROCESSES, Searched
from harness.spec import EngineSpec, Workload, parse
from harness.tune.scale import capacity_bytes, dense_facts, token_facts, with_footprint
from harness.tune.space import Candidate, Facts, Space, enumerate_space


@dataclass(frozen=True)
class Entrants:
    """The engines of a search by name, and why others are left out."""

    configs: Mapping[str, Config]
    left_out: tuple[str, ...]

    @property
    def first(self) -> Config:
        """All agree but for the engine."""
        return next(iter(self.configs.values()))

    def request(self, candidate: Candidate, steps: int, repeat: int) -> Request:
        """The cell that looks at ``candidate`` for so many of the planned steps, on the planned schedule."""
        config = self.configs[candidate.engine]
        stop = steps if steps < config.train.steps else None
        changed = {
            "engine": config.engine.model_copy(
                update={"processes": candidate.processes, "knobs": {**config.engine.knobs, **candidate.knobs}}
            ),
            "train": config.train.model_copy(update={"stop_after": stop}),
            "repeat": repeat,
            "save_every": None,
        }
        return request(config.model_copy(update=changed))


def entrants(overrides: Sequence[str], names: Sequence[str] = (), count: Count = not_counted) -> Entrants:
    """Of ``names``, or of all engines, those that can take part. Raises ConfigError when none is, or when one is not an engine."""
    every = sorted(path.stem for path in (CONF / "engine").glob("*.yaml"))
    configs, left_out = {}, []
    for name in names or every:
        config = single([*overrides, f"engine={name}"], count)
        missing = _lack(config)
        if missing and name in names:
            raise ConfigError(f"engines: {name} cannot start: {missing}")
        if missing:
            left_out.append(f"{name}: {missing}")
        else:
            configs[name] = config
    if not configs:
        raise ConfigError("\n".join(["there is no engine to search:", *left_out]))
    return Entrants(configs, tuple(left_out))


@dataclass(frozen=True)
class Layouts:
    """What micro-batches and layouts make of the samples of the planned run. An engine without the knob ``layout`` is taken not to pad."""

    workload: Workload
    tokens: TokenFile
    known: dict[tuple[int, str], tuple[Facts, tuple[float, ...]]] = field(default_factory=dict)

    def facts(self, knobs: Mapping[str, Any]) -> Facts:
        """Of these knobs."""
        if self.workload.data.source == "dense":
            return dense_facts(self.workload, int(knobs["micro_batch"]))
        return self._known(int(knobs["micro_batch"]), str(knobs.get("layout", "packed")))[0]

    def positions(self, knobs: Mapping[str, Any]) -> tuple[float, ...]:
        """Of every planned step; none where all are alike."""
        if self.workload.data.source == "dense":
            return ()
        return self._known(int(knobs["micro_batch"]), str(knobs.get("layout", "packed")))[1]

    def _known(self, micro_batch: int, layout: str) -> tuple[Facts, tuple[float, ...]]:
        if (micro_batch, layout) not in self.known:
            self.known[micro_batch, layout] = token_facts(self.workload, self.tokens, micro_batch, layout)
        return self.known[micro_batch, layout]


def candidates(found: Entrants, layouts: Layouts, machine: Machine, model: Mapping[str, Any]) -> tuple[Space, tuple[str, ...]]:
    """Every candidate that can run, and for each engine without one, why. ``model``: its configuration."""
    workload, capacity = layouts.workload, capacity_bytes(machine)
    why: dict[str, str] = {}

    def facts(name: str, values: Mapping[str, Any]) -> Facts | None:
        config = found.configs[name]
        engine, knobs = load(_spec(config)), {**config.engine.knobs, **values}
        if int(knobs["micro_batch"]) > -(-workload.train.samples_per_step // int(knobs.pop(PROCESSES, 1))):
            return None  # the same as all samples of a process at once
        reason = engine.unsupported(workload, parse(engine.Knobs, knobs, at="engine.knobs"), machine)
        if reason is None:
            return with_footprint(layouts.facts(knobs), engine, workload, model, knobs, capacity, forecast=config.engine.forecast)
        why.setdefault(name, reason)
        return None

    expected = {name: _searched(config, machine) for name, config in found.configs.items()}
    space = enumerate_space(expected, facts)
    present = {one.engine for one in space.candidates}
    kept = Space(space.candidates, {name: knobs for name, knobs in expected.items() if name in present})
    return kept, tuple(f"{name}: {reason}" for name, reason in why.items() if name not in present)


def _searched(config: Config, machine: Machine) -> dict[str, Searched]:
    """What may be tried of an engine here. Processes share the cores of a CPU, at most one a core, and a sample of every step for each. Of
    GPUs one is searched: what a process needs where several share a model is not in the model of memory.
    """
    ranks = config.engine.search.get(PROCESSES)
    most = min(machine.count, config.train.samples_per_step) if machine.device == "cpu" else 1
    able = [value for value in ranks.values if int(str(value)) <= most] if ranks else []
    tried = {PROCESSES: ranks.among(able)} if ranks and len(able) > 1 else {}
    return {**tried, **config.engine.searched_knobs}


def config_of_model(workload: Workload, base: Path) -> dict[str, Any]:
    """The transformers configuration of the base, from the workload or from the prepared weights."""
    return dict(workload.model.config or json.loads((base / "config.json").read_text(encoding="utf-8")))


def _lack(config: Config) -> str | None:
    """Why this engine cannot take part: a package that is not there, or checkpoints that are wanted and it does not write."""
    engine = load(_spec(config))
    if config.save_every is not None and not resumes(engine):
        return f"it writes no checkpoints, and save_every={config.save_every} asks for them"
    missing = lack(located(config.engine.python), requires(engine))
    return str(missing) if missing else None


def _spec(config: Config) -> EngineSpec:
    return EngineSpec(name=config.engine.name, module=config.engine.module, processes=1, environment={}, knobs={})
