"""The contract between the harness and an engine, which is a module; the only place where the two meet."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, get_args

from harness.data.tokens import StepTokens, TokenFile
from harness.errors import ConfigError
from harness.spec import EngineSpec, Spec, Workload, parse

if TYPE_CHECKING:
    from torch import Tensor


LossNorm = Literal["token_global", "rank_token_mean", "micro_mean"]
"""What the loss of a step is a mean of: all its labels, which the workload asks for; each rank's, then over ranks; each micro-batch's,
then over these."""


class Machine(Spec):
    """The hardware key: only what makes figures incomparable. Drivers, clocks and versions are recorded beside it.

    ``memory_gib`` is that of one accelerator (of the host on a CPU); ``memory_cap_gib`` an emulated smaller one. ``count``: of all
    ``nodes`` together.
    """

    device: Literal["cpu", "cuda"]
    name: str
    count: int
    memory_gib: int
    memory_cap_gib: int | None = None
    interconnect: str | None = None
    power_limit_watts: int | None = None
    nodes: int = 1

    @functools.cached_property
    def key(self) -> str:
        """A readable folder name, for example ``nvidia-h100-80gb-hbm3-x1-80gib-700w``."""
        words = "".join(c if c.isalnum() else "-" for c in self.name.lower())
        parts = ["-".join(word for word in words.split("-") if word), f"x{self.count}", f"{self.memory_gib}gib"]
        if self.interconnect:
            parts.append(self.interconnect)
        if self.power_limit_watts:
            parts.append(f"{self.power_limit_watts}w")
        if self.nodes > 1:
            parts.append(f"{self.nodes}nodes")
        if self.memory_cap_gib:
            parts.append(f"cap{self.memory_cap_gib}gib")
        return "-".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where an engine that ``resumes`` leaves its state, after every ``every`` steps; ``made``: steps whose state is there to go on from, 0
    when the run starts. A state that is there is whole: write it beside its place, then rename it.
    """

    folder: Path
    every: int
    made: int = 0

    def at(self, steps: int) -> Path:
        """The place of the state after so many steps."""
        return self.folder / f"step-{steps:08d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What an engine is given. All paths exist; ``out`` is an empty folder for the adapter (or the full weights).

    ``base``: folder with config.json, *.safetensors and, where there is one, the tokenizer. ``adapter_init``: folder with the
    shared initial adapter in PEFT format, None for ``method=full``. ``device``: where to train. ``checkpoints``: None when none are wanted.
    """

    workload: Workload
    tokens: TokenFile
    base: Path
    adapter_init: Path | None
    out: Path
    device: Literal["cpu", "cuda"]
    processes: int = 1
    checkpoints: Checkpoints | None = None


Chosen = str | int | float


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an engine expects of its own plan for one forward and backward pass. ``peak_bytes``: of the allocator, or what would be needed
    at least where it does not fit; ``seconds``: of the pass on the machine the engine knows, ``unhurried``: if memory were no limit.
    """

    peak_bytes: int
    seconds: float
    unhurried: float


class Probe(Protocol):
    """The harness's stopwatch. Engines report; the harness measures."""

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        """Set-up is over; the next thing is step 1. ``chosen``: what the engine decided by itself, for the record."""

    def step(self, *, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens) -> None:
        """One optimizer step has been issued. Copies the tensors on the current stream and never synchronises.

        ``loss``: token-weighted mean over the step. ``grad_norm``: global norm before clipping.
        """

    def waits(self) -> AbstractContextManager[None]:
        """Around what one of several ranks does where it waits for the slowest, once a step. It never synchronises either."""

    def exchanges(self) -> AbstractContextManager[None]:
        """Around what else it exchanges with the others while its computing stands still, as often as it does; not inside ``waits``."""


K = TypeVar("K")


class Engine(Protocol[K]):
    """What a module must have to be an engine. It may also say ``loss_norm``, a :data:`LossNorm` or a function of the number of
    processes that gives one, which is recorded and shown;
    ``recomputed_fraction(workload, knobs)``: of the layers' forward pass, what backward does again; None when it cannot tell beforehand;
    ``resumes``: True when it heeds ``Job.checkpoints``;
    ``requires``: packages without which it cannot start; ``variant(knobs)``: the name that its users have for these knobs;
    ``footprint(workload, config, knobs, capacity_bytes, tokens, longest, processes)``: where it plans its memory itself, a
    :class:`Footprint` of a pass over so many tokens, the longest document of them so long, by one of so many processes, or None; ``config``
    is the model's. Imports nothing heavy.
    """

    @property
    def Knobs(self) -> type[K]:
        """A frozen ``Spec``: how, never what."""

    def unsupported(self, workload: Workload, knobs: K, machine: Machine) -> str | None:
        """Why this cannot run, in a sentence for people, or None. Imports nothing heavy."""

    def train(self, job: Job, knobs: K, probe: Probe) -> None:
        """Train ``job.workload`` and leave a PEFT-format adapter (full: Hugging Face layout) in ``job.out``."""


def load(spec: EngineSpec) -> Engine[Any]:
    """Import the engine's module. Raises ConfigError when there is none, or when it is no engine."""
    try:
        module = importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name is None or not spec.module.startswith(error.name):
            raise
        where = f"conf/engine/{spec.name}.yaml names it; if it lies elsewhere, put its folder, as an absolute path, on PYTHONPATH"
        raise ConfigError(f"engine.module: there is no module '{spec.module}'; {where}") from error
    missing = [name for name in ("Knobs", "unsupported", "train") if not hasattr(module, name)]
    if missing:
        raise ConfigError(f"engine.module: '{spec.module}' is no engine, it lacks {', '.join(missing)}; see docs/adding-an-engine.md")
    if loss_norm(module) not in (None, *get_args(LossNorm)):
        raise ConfigError(f"engine.module: '{spec.module}' has loss_norm={loss_norm(module)!r}; expected {', '.join(get_args(LossNorm))}")
    return cast("Engine[Any]", module)


def loss_norm(engine: object, processes: int = 1) -> LossNorm | None:
    """What ``engine`` says its loss is a mean of on ``processes``; None when it does not say."""
    said = getattr(engine, "loss_norm", None)
    return cast("LossNorm | None", said(processes) if callable(said) else said)


def resumes(engine: object) -> bool:
    """Whether ``engine`` saves its state and goes on from it."""
    return bool(getattr(engine, "resumes", False))


def footprint(
    engine: Engine[Any],
    workload: Workload,
    config: Mapping[str, Any],
    knobs: Mapping[str, Any],
    capacity_bytes: float | None,
    tokens: int,
    longest: int,
    processes: int = 1,
    forecast: str | None = None,
) -> Footprint | None:
    """What ``engine`` expects of itself; None when it does not plan its memory, or cannot tell before it has loaded the model. ``knobs``
    may be those of an old record: None too where the engine has others today. ``forecast``: of the engine's YAML, asked where it is silent.
    """
    if set(knobs) != set(getattr(engine.Knobs, "model_fields", {})):
        return None
    parsed = parse(engine.Knobs, knobs, at="engine.knobs")
    for tell in tellers(engine, forecast):
        if (told := tell(workload, config, parsed, capacity_bytes, tokens, longest, processes)) is not None:
            return cast("Footprint", told)
    return None


def tellers(engine: object, forecast: str | None) -> list[Callable[..., Any]]:
    """The functions ``footprint`` of an engine: its own, and that of its module ``forecast``. Raises ConfigError where that has none."""
    own = getattr(engine, "footprint", None)
    found = [] if own is None else [own]
    if forecast is None:
        return found
    try:
        return [*found, importlib.import_module(forecast).footprint]
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"engine.forecast: expected a module with a function footprint, got '{forecast}' ({error})") from error


def requires(engine: object) -> tuple[str, ...]:
    """The packages that must be installed in the interpreter of ``engine``."""
    return cast("tuple[str, ...]", getattr(engine, "requires", ()))


def variant(engine: Engine[Any], knobs: Mapping[str, Any]) -> str | None:
    """What ``engine`` calls ``knobs``; None when it has no name for them. It follows from the knobs, so it is never wrong about them."""
    name = getattr(engine, "variant", None)
    said = None if name is None else name(parse(engine.Knobs, knobs, at="engine.knobs"))
    return None if said is None else str(said)


def declared_loss_norm(spec: EngineSpec) -> LossNorm | None:
    """:func:`loss_norm` of the engine that ``spec`` names. What cannot be loaded says nothing; its record's status says why."""
    try:
        return loss_norm(load(spec), spec.processes)
    except ConfigError:
        return None
