"""What variants of engines are called beside each other: an engine's name, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.spec import EngineSpec


def labels(engines: Sequence[EngineSpec]) -> tuple[str, ...]:
    """A name for each engine: its own, plus whatever differs between the variants of that engine.

    What is null goes without saying, and so does a setting that some have and others, made by older code, do not; unless two would then
    have the same name.
    """
    families: dict[str, list[Mapping[str, Any]]] = {}
    for engine in engines:
        families.setdefault(engine.title, []).append(_settings(engine))
    told = {title: _differing(family, unset=False) for title, family in families.items()}
    all_told = {title: _differing(family, unset=True) for title, family in families.items()}
    names = [
        [_label(engine, told[engine.title], nulls=False) for engine in engines],
        [_label(engine, told[engine.title], nulls=True) for engine in engines],
        [_label(engine, all_told[engine.title], nulls=True) for engine in engines],
    ]
    return tuple(
        next((name for name, all_names in zip(own, names, strict=True) if all_names.count(name) == 1), own[-1])
        for own in zip(*names, strict=True)
    )


def _differing(family: Sequence[Mapping[str, Any]], *, unset: bool) -> list[str]:
    """The settings that are not the same in all of ``family``; ``unset``: also those that only some have."""
    keys = sorted({key for one in family for key in one})
    values = {key: {_canonical(one[key]) for one in family if key in one} for key in keys}
    return [key for key in keys if len(values[key]) > 1 or (unset and any(key not in one for one in family))]


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
