"""From a composed configuration to requests: a cell, where its sources lie, and how it is to be run; resolved by content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from harness.best import best_engine, without_best
from harness.compose import compose_all, compose_one, plain
from harness.engine import load, variant
from harness.epochs import num_steps, take_epochs
from harness.errors import ConfigError, HarnessError
from harness.interpreter import located
from harness.named import named_data, named_model
from harness.places import Nodes, Sources
from harness.record import Price
from harness.searched import PROCESSES, Searched
from harness.spec import Cell, Data, DType, EngineSpec, Method, Model, Name, Positive, Spec, Train, Workload, parse
from harness.weights.vocabulary import check_fits, num_entries, num_rows

Seconds = Annotated[float, Field(gt=0)]
Lane = Annotated[str, Field(pattern=r"^\d+/[1-9]\d*$")]
Folder = Annotated[str, Field(min_length=1)]  # an empty one would be where one happens to be: runs=$UNSET


class EngineConfig(Spec):
    """``conf/engine/<name>.yaml``. ``python``: the interpreter of the engine's environment, null for ours; a relative path starts at
    this tree. ``packages`` are those whose versions matter to its figures: a record made with other versions is stale. ``search`` is
    what tune may try of its knobs, and of ``processes``, see :class:`Searched`. ``forecast``: a module whose ``footprint`` tells what the
    engine's own leaves open; ``planned_knobs``: not searched, and what they change is in the footprint.
    """

    name: Name
    module: str
    python: str | None
    environment: dict[str, str]
    packages: tuple[str, ...]
    processes: Positive
    knobs: dict[str, JsonValue]
    search: dict[str, Searched]
    forecast: str | None = None
    planned_knobs: tuple[str, ...] = ()

    @property
    def searched_knobs(self) -> dict[str, Searched]:
        """Of ``search`` the knobs alone."""
        return {name: searched for name, searched in self.search.items() if name != PROCESSES}


class MachineConfig(Spec):
    """``conf/machine/<name>.yaml``: what of this machine is used, and what it costs where that is known."""

    device: Literal["cpu", "cuda"]
    compute_dtype: DType
    operations: Literal["reference", "fused"]
    replay: bool
    memory_cap_gib: Positive | None
    price: Price | None = None
    nodes: Nodes = Nodes()


class Limits(Spec):
    """When a cell is stopped; ``wall_seconds`` null: not for taking long."""

    wall_seconds: Seconds | None
    no_progress_seconds: Seconds


class Config(Spec):
    """Everything that ``conf/config.yaml`` composes to."""

    engine: EngineConfig
    model: Model
    data: Data
    method: Method
    train: Train
    machine: MachineConfig
    repeat: Annotated[int, Field(ge=0)]
    plan: Literal["run", "only"]
    rerun: Literal["missing", "stale", "all"]
    keep: Literal["none", "adapters"]
    score: Literal["now", "later"]
    runs: Folder
    cache: Folder
    lane: Lane | None
    save_every: Positive | None
    limits: Limits


class Settings(Spec):
    """What holds for a whole sweep."""

    plan: Literal["run", "only"]
    rerun: Literal["missing", "stale", "all"]
    keep: Literal["none", "adapters"]
    score: Literal["now", "later"]
    runs: Folder
    cache: Folder
    lane: Lane | None


class Request(Spec):
    """A cell and what is needed to run it here."""

    cell: Cell
    sources: Sources
    machine: MachineConfig
    limits: Limits
    python: str | None
    packages: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    save_every: Positive | None = None


Count = Callable[[Config, Request], int]
"""The number of samples of an epoch, which only a tokenised file tells: of a configuration and its request."""


def not_counted(_config: Config, _request: Request) -> int:
    """A ``Count`` of commands that tokenise nothing."""
    raise ConfigError("train.epochs: this command does not count samples; give train.steps")


Say = Callable[[str], None]


def _nobody(_line: str) -> None:
    """A ``Say`` that nobody hears."""


def requests(
    overrides: Sequence[str], *, multirun: bool | None, count: Count = not_counted, say: Say = _nobody
) -> tuple[Settings, list[Request]]:
    """The requests of ``python -m harness OVERRIDES``; ``say`` what was found out on the way. ``multirun``: see ``compose_all``.

    Raises ConfigError with every problem of every cell, each once.
    """
    tuned, overrides = without_best(overrides)
    asked: list[tuple[Config, Request, float | None]] = []
    problems: dict[str, None] = {}
    entries = functools.cache(num_entries)  # a sweep asks about few tokenizers often
    for own, composed in compose_all(overrides, multirun=multirun):
        try:
            config, epochs = _whole(plain(composed), [*overrides, *own], tuned, say)
            asked.append((config, request(config, own), epochs))
            _check_vocabulary(asked[-1][1], entries)
        except HarnessError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    settings = [Settings(**{name: getattr(config, name) for name in Settings.model_fields}) for config, _, _ in asked]
    if len(set(settings)) > 1:
        problems["plan, rerun, keep, score, runs, cache and lane hold for a whole sweep: give each one value"] = None
    if problems:
        raise ConfigError("\n".join(problems))
    return settings[0], in_lane(_in_steps(asked, count, say), settings[0].lane)


def _in_steps(asked: Sequence[tuple[Config, Request, float | None]], count: Count, say: Say) -> list[Request]:
    """The requests, with steps for epochs: counted when all else is known to be right, because it can take long."""
    found: list[Request] = []
    said: dict[str, None] = {}
    problems: dict[str, None] = {}
    for config, one, epochs in asked:
        try:
            counted = _counted(config, epochs, count)
        except HarnessError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
            continue
        found.append(one if epochs is None else request(counted, one.overrides))
        if epochs is not None:
            said[f"train.epochs={epochs:g}: {counted.train.steps:,} steps of {counted.train.samples_per_step} samples"] = None
    if problems:
        raise ConfigError("\n".join(problems))
    for line in said:
        say(line)
    return found


def single(overrides: Sequence[str], count: Count = not_counted) -> Config:
    """The configuration of one cell. Raises ConfigError with every problem."""
    raw = plain(compose_one(overrides))
    epochs = take_epochs(raw["train"], overrides)
    return _counted(_config(raw), epochs, count)


def _whole(raw: dict[str, Any], overrides: Sequence[str], tuned: bool, say: Say) -> tuple[Config, float | None]:
    """With what tune found in place of the engine, and the epochs that are yet to be counted. Either says that somebody trains to use what
    comes out.
    """
    epochs = take_epochs(raw["train"], overrides)
    config = _config(raw)
    config = _with_best(config, overrides, say) if tuned else config
    return (_in_earnest(config, overrides) if tuned or epochs is not None else config), epochs


def _in_earnest(config: Config, overrides: Sequence[str]) -> Config:
    """What is trained is kept, however long it takes, unless ``overrides`` say otherwise."""
    told = {line.lstrip("+").partition("=")[0] for line in overrides}
    keep = config.keep if "keep" in told else "adapters"
    limits = config.limits if "limits.wall_seconds" in told else config.limits.model_copy(update={"wall_seconds": None})
    return config.model_copy(update={"keep": keep, "limits": limits})


def _counted(config: Config, epochs: float | None, count: Count) -> Config:
    """``config`` with the steps of so many ``epochs``. Raises ConfigError where the schedule does not fit into them."""
    if epochs is None:
        return config
    samples, train = count(config, request(config)), config.train
    steps = num_steps(epochs, samples, train.samples_per_step)
    try:
        return config.model_copy(update={"train": parse(Train, {**train.model_dump(), "steps": steps}, at="train")})
    except ConfigError as error:
        raise ConfigError(f"{error} (train.epochs={epochs:g} of {samples:,} samples: {steps:,} step{'s' if steps > 1 else ''})") from error


def _with_best(config: Config, overrides: Sequence[str], say: Say) -> Config:
    """What tune found in place of the engine."""
    workload, machine = request(config).cell.workload, config.machine
    engine, found = best_engine(overrides, workload, machine.device, machine.memory_cap_gib, Path(config.runs).expanduser())
    say(f"engine=best: {found.sentence}")
    return config.model_copy(update={"engine": parse(EngineConfig, engine, at="engine")})


def in_lane(found: Sequence[Request], lane: str | None) -> list[Request]:
    """The cells of lane ``i/n``: every n-th by the order of their keys, which has nothing to do with their settings, so that no setting
    meets one lane's machine only. Raises ConfigError for a lane that does not exist.
    """
    if lane is None:
        return list(found)
    number, count = map(int, lane.split("/"))
    if number >= count:
        raise ConfigError(f"lane: got {lane}; of {count} lanes the first is 0/{count} and the last {count - 1}/{count}")
    keys = sorted({request.cell.key for request in found})[number::count]
    return [request for request in found if request.cell.key in keys]


def _config(raw: dict[str, Any]) -> Config:
    """Parse the whole and the engine's knobs, reporting the problems of both together."""
    problems = []
    config = None
    try:
        config = parse(Config, raw)
    except ConfigError as error:
        problems.append(str(error))
    try:
        engine = raw["engine"]
        spec = EngineSpec(name=engine["name"], module=engine["module"], processes=1, environment={}, knobs={})
        parse(load(spec).Knobs, engine["knobs"], at="engine.knobs")
    except ConfigError as error:
        problems.append(str(error))
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return config


def request(config: Config, overrides: tuple[str, ...] = ()) -> Request:
    """Name every source by its content, so that the cell is the same wherever the files lie."""
    cache = Path(config.cache).expanduser()
    data, data_path = named_data(config.data, cache)
    model, weights_path, tokenizer_path = named_model(config.model, cache)
    engine = config.engine
    cell = Cell(
        workload=Workload(model=model, data=data, method=config.method, train=config.train),
        engine=EngineSpec(
            name=engine.name,
            module=engine.module,
            processes=engine.processes,
            environment=engine.environment,
            knobs=engine.knobs,
            variant=_variant(engine),
        ),
        repeat=config.repeat,
    )
    return Request(
        cell=cell,
        sources=Sources(data=data_path, weights=weights_path, tokenizer=tokenizer_path),
        machine=config.machine,
        limits=config.limits,
        python=located(engine.python),
        packages=engine.packages,
        overrides=overrides,
        save_every=config.save_every,
    )


def _variant(engine: EngineConfig) -> str | None:
    spec = EngineSpec(name=engine.name, module=engine.module, processes=1, environment={}, knobs={})
    return variant(load(spec), engine.knobs)


def _check_vocabulary(asked: Request, entries: Callable[[Path], int | None]) -> None:
    """What cannot fit is refused before anything is prepared. Weights that bring their own tokenizer are left to prepare."""
    model, at = asked.cell.workload.model, asked.sources
    if at.tokenizer is None or at.tokenizer == at.weights:
        return
    weights = Path(at.weights) if at.weights else None
    check_fits(num_rows(model.config, weights), entries(Path(at.tokenizer)), model.tokenizer)
