"""Frozen data: how it is declared, read, and named by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import ConfigError
from harness.problems import problem

DType = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]


class Spec(BaseModel):
    """Frozen, strict (no coercion) and closed (no unknown keys) data; read it with :func:`parse`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, except that a copy with changes keeps nothing that was derived from what it no longer holds."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


def content_key(spec: Spec) -> str:
    """The first 12 hex digits of the sha-256 of ``spec`` as canonical JSON, without defaults: a field added later, whose default means
    what was always done, leaves the keys of recorded cells as they are. The price: a default may never change (the YAML files say all).
    """
    canonical = json.dumps(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


S = TypeVar("S", bound=BaseModel)


def parse(spec: type[S], raw: Mapping[str, Any], at: str = "") -> S:
    """Build ``spec`` from plain data. Raises ConfigError that names every problem at once, each with its full key."""
    try:
        return spec.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = [problem(spec, raw, at, dict(item)) for item in error.errors(include_url=False)]
    raise ConfigError("\n".join(problems))
