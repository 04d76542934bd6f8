"""What variants of engines are called beside each other: an engine's name, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.spec import EngineSpec


def labels(engines: Sequence[EngineSpec]) -> tuple[str, ...]:
    """A name for each engine: its own, plus whatever differs between the variants of that engine; what is null goes without saying."""
    names = {engine.title for engine in engines}
    differ = {name: _differing([_settings(engine) for engine in engines if engine.title == name]) for name in names}
    whole = [_label(engine, differ[engine.title], nulls=True) for engine in engines]
    brief = [_label(engine, differ[engine.title], nulls=False) for engine in engines]
    return tuple(whole[place] if brief.count(name) > 1 else name for place, name in enumerate(brief))


def _differing(family: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all of ``family``."""
    keys = sorted({key for one in family for key in one})
    return [key for key in keys if len({_canonical(one.get(key, "unset")) for one in family}) > 1]


def _label(engine: EngineSpec, differ: Sequence[str], *, nulls: bool) -> str:
    mine = _settings(engine)
    values = {key: mine.get(key, "unset") for key in differ}
    return " ".join([engine.title, *(f"{key}={_plain(value)}" for key, value in values.items() if nulls or value is not None)])


def _settings(engine: EngineSpec) -> dict[str, Any]:
    environment = {f"environment.{key}": value for key, value in engine.environment.items()}
    return dict(_flat({"processes": engine.processes, "module": engine.module, **environment, **engine.knobs}))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _canonical(value)


def _flat(tree: Mapping[str, Any], at: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves += _flat(value, f"{at}{key}.")
        else:
            leaves.append((f"{at}{key}", value))
    return leaves


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
