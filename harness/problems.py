"""What is wrong with data that fits no spec, in words: where, what arrived, what was expected, what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from harness.errors import nearest


def problem(spec: type[BaseModel], raw: Mapping[str, Any], at: str, item: dict[str, Any]) -> str:
    """``item`` (one of pydantic's errors about ``raw``) as ``train.learnin_rate: unknown key; did you mean 'train.learning_rate'?``."""
    path = [part for part in item["loc"] if not _is_union_tag(part, raw, item)]
    where = ".".join(str(part) for part in ([at] if at else []) + path) or spec.__name__
    if item["type"] == "extra_forbidden":
        known = _known_keys(spec, raw, path[:-1])
        return f"{where}: unknown key; {nearest(str(path[-1]), known)}"
    if item["type"] == "missing":
        return f"{where}: required, but not set"
    if item["type"] == "value_error":
        return f"{where}: {item['msg'].removeprefix('Value error, ')}"
    if item["type"] == "union_tag_invalid":
        return f"{where}: {item['msg']}"
    return f"{where}: got {json.dumps(item['input'])}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _is_union_tag(part: Any, raw: Mapping[str, Any], item: dict[str, Any]) -> bool:
    """Pydantic puts a union's tag into the location (method.lora.rank, data.path.several.0.weight); the user never typed it."""
    position = item["loc"].index(part)
    parent: Any = raw
    for step in item["loc"][:position]:
        if (isinstance(parent, Mapping) and step in parent) or (isinstance(parent, list) and isinstance(step, int)):
            parent = parent[step]
    if isinstance(parent, Mapping):
        return part not in parent and parent.get("name") == part
    return isinstance(part, str)  # below a list or a plain value stands no key that anyone typed


def _known_keys(spec: type[BaseModel], raw: Mapping[str, Any], path: list[Any]) -> list[str]:
    model: Any = spec
    value: Any = raw
    for part in path:
        value = value[part]
        model = _field_model(model, part, value)
        if model is None:
            return []
    return list(model.model_fields)


def _field_model(model: type[BaseModel], part: Any, value: Any) -> type[BaseModel] | None:
    field = model.model_fields.get(str(part))
    if field is None:
        return None
    options = [field.annotation, *getattr(field.annotation, "__args__", ())]
    models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    for option in models:
        tag = option.model_fields.get("name")
        tags = getattr(tag.annotation, "__args__", ()) if tag else ()
        if isinstance(value, Mapping) and value.get("name") in tags:
            return option
    return models[0] if models else None
