"""From a composed configuration to requests: a cell, where its sources lie, and how it is to be run; resolved by content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from harness.best import best_engine, without_best
from harness.compose import compose_all, compose_one, plain
from harness.data.files import find_files
from harness.engine import load, variant
from harness.errors import ConfigError, HarnessError
from harness.interpreter import located
from harness.places import Nodes, Sources
from harness.record import Price
from harness.searched import Searched
from harness.spec import Cell, Data, DataFile, DType, EngineSpec, Method, Model, Name, Positive, Spec, Train, Workload, parse
from harness.weights import fingerprint, resolve_source
from harness.weights.sources import tokenizer_fingerprint
from harness.weights.vocabulary import check_fits, num_entries, num_rows

Seconds = Annotated[float, Field(gt=0)]
Lane = Annotated[str, Field(pattern=r"^\d+/[1-9]\d*$")]


class EngineConfig(Spec):
    """``conf/engine/<name>.yaml``. ``python``: the interpreter of the engine's environment, null for ours; a relative path starts at
    this tree. ``packages`` are those whose versions matter to its figures: a record made with other versions is stale. ``search`` is
    what tune may try, see :class:`Searched`.
    """

    name: Name
    module: str
    python: str | None
    environment: dict[str, str]
    packages: tuple[str, ...]
    processes: Positive
    knobs: dict[str, JsonValue]
    search: dict[str, Searched]


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
    """When a cell is stopped."""

    wall_seconds: Seconds
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
    runs: str
    cache: str
    lane: Lane | None
    save_every: Positive | None
    limits: Limits


class Settings(Spec):
    """What holds for a whole sweep."""

    plan: Literal["run", "only"]
    rerun: Literal["missing", "stale", "all"]
    keep: Literal["none", "adapters"]
    runs: str
    cache: str
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


def requests(overrides: Sequence[str], *, multirun: bool) -> tuple[Settings, list[Request]]:
    """The requests of ``python -m harness OVERRIDES``. Raises ConfigError with every problem of every cell, each once."""
    tuned, overrides = without_best(overrides)
    found: list[Request] = []
    settings: list[Settings] = []
    problems: dict[str, None] = {}
    entries = functools.cache(num_entries)  # a sweep asks about few tokenizers often
    for own, composed in compose_all(overrides, multirun=multirun):
        try:
            config = _config(plain(composed))
            config = _with_best(config, [*overrides, *own]) if tuned else config
            found.append(request(config, own))
            _check_vocabulary(found[-1], entries)
            settings.append(Settings(**{name: getattr(config, name) for name in Settings.model_fields}))
        except HarnessError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    if len(set(settings)) > 1:
        problems["plan, rerun, keep, runs, cache and lane hold for a whole sweep: give each one value"] = None
    if problems:
        raise ConfigError("\n".join(problems))
    return settings[0], in_lane(found, settings[0].lane)


def single(overrides: Sequence[str]) -> Config:
    """The configuration of one cell. Raises ConfigError with every problem."""
    return _config(plain(compose_one(overrides)))


def _with_best(config: Config, overrides: Sequence[str]) -> Config:
    """What tune found in place of the engine; a person who trains with it wants the adapter, so it is kept unless told otherwise."""
    workload, machine = request(config).cell.workload, config.machine
    engine, _ = best_engine(overrides, workload, machine.device, machine.memory_cap_gib, Path(config.runs).expanduser())
    keep = config.keep if any(line.startswith("keep=") for line in overrides) else "adapters"
    return config.model_copy(update={"engine": parse(EngineConfig, engine, at="engine"), "keep": keep})


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
    data, data_path = _data(config.data, cache)
    model, weights_path, tokenizer_path = _model(config.model, cache)
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


def _data(data: Data, cache: Path) -> tuple[Data, tuple[str, ...]]:
    """``data`` with the names and content hashes of its files, and where they lie."""
    if data.source != "jsonl":
        return data, ()
    files: dict[Path, DataFile] = {}
    for entry in data.files:
        for path in _files(entry.path):
            if path in files:
                raise ConfigError(f"data.path: '{path.name}' is named twice; say once how often it counts, with a weight")
            files[path] = _named(entry, path, cache)
    paths = tuple(map(str, files))
    first, *others = files.values()
    if not others and first.weight == 1:
        return data.model_copy(update={"path": first.path, "sha256": first.sha256}), paths
    return data.model_copy(update={"path": (first, *others), "sha256": None}), paths


def _files(source: str) -> list[Path]:
    package = _located("data.path", source) if source.startswith("package:") else None
    return find_files(str(package) if package else source)


def _named(entry: DataFile, path: Path, cache: Path) -> DataFile:
    content = fingerprint(path, cache)
    if entry.sha256 not in (None, content):
        raise ConfigError(f"data.path: '{path.name}' is not the file that was asked for: its sha-256 is {content}, not {entry.sha256}")
    name = entry.path if entry.path.startswith("package:") else path.name
    return entry.model_copy(update={"path": name, "sha256": content})


def _model(model: Model, cache: Path) -> tuple[Model, str | None, str | None]:
    weights, tokenizer = _located("model.weights", model.weights), _located("model.tokenizer", model.tokenizer)
    foreign = tokenizer if model.tokenizer.startswith("dir:") and model.tokenizer != model.weights else None
    update = {
        "weights": _without_path(model.weights),
        "tokenizer": _without_path(model.tokenizer),
        "fingerprint": fingerprint(weights, cache) if weights else None,
        "tokenizer_fingerprint": tokenizer_fingerprint(foreign, cache) if foreign else None,
    }
    return model.model_copy(update=update), str(weights) if weights else None, str(tokenizer) if tokenizer else None


def _check_vocabulary(asked: Request, entries: Callable[[Path], int | None]) -> None:
    """What cannot fit is refused before anything is prepared. Weights that bring their own tokenizer are left to prepare."""
    model, at = asked.cell.workload.model, asked.sources
    if at.tokenizer is None or at.tokenizer == at.weights:
        return
    weights = Path(at.weights) if at.weights else None
    check_fits(num_rows(model.config, weights), entries(Path(at.tokenizer)), model.tokenizer)


def _located(key: str, source: str) -> Path | None:
    """The local path of ``source``; errors name the ``key`` that holds it."""
    try:
        return resolve_source(source)
    except HarnessError as error:
        raise ConfigError(f"{key}: {error}") from error


def _without_path(source: str) -> str:
    kind, _, rest = source.partition(":")
    return f"dir:{Path(rest).name}" if kind == "dir" else source
