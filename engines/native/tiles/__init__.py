"""How kernels cut their work on this kind of GPU: tables that were measured on one, chosen from by size before anything is timed.

A table is a JSON file here, named after the GPU (``python -m engines.native.bench_kernels --tune --write`` makes it). It says for a kernel
which of its candidates was the fastest at some sizes. Where there is no table, no entry, or none within a factor of two of the size, a
kernel's own default is taken, whose reason stands beside it. A cut changes the order of sums, so the last bits, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from pydantic import JsonValue

from harness.errors import ConfigError
from harness.spec import Positive, Spec, parse

FOLDER = Path(__file__).resolve().parent
MARGIN = 0.02  # less than that is no reason to leave the default: figures of one kernel repeat within a per cent or two
_NEAR = 2.0  # a size that was measured speaks for others up to this factor
C = TypeVar("C", bound="Cut")


class Cut(Hashable, Protocol):
    """A frozen dataclass of numbers and words that a kernel is launched with."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Entry(Spec):
    """The best cut at one size. ``size``: elements that the kernel walks over. ``milliseconds``: of the cut and of the default, where they
    were kept; ``source``: the command or the document that they are from.
    """

    size: Positive
    cut: dict[str, JsonValue]
    milliseconds: float | None
    default_milliseconds: float | None
    source: str


class Table(Spec):
    """Of one kind of GPU. ``provenance``: when, with what, and what was not measured."""

    device: str
    provenance: str
    kernels: dict[str, tuple[Entry, ...]]


def path_of(device: str, folder: Path = FOLDER) -> Path:
    """Where the table of a GPU of this name lies, or would."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def table(device: str, folder: Path = FOLDER) -> Table | None:
    """The table of a GPU of this name, read once a process; None where there is none. Raises ConfigError when it is not one of ours."""
    path = path_of(device, folder)
    if not path.is_file():
        return None
    try:
        found = parse(Table, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path.name}: not a table of tiles; make it again with bench_kernels --tune --write: {error}") from error
    if found.device != device:
        raise ConfigError(f"{path.name}: is of '{found.device}', not of '{device}'; make it again with bench_kernels --tune --write")
    return found


def chosen(kernel: str, where: torch.device, size: int, default: C) -> C:
    """The cut of ``kernel`` for ``size`` elements on the GPU ``where``: the table's, or ``default``.

    On the meta device, where launches are rehearsed, that of the current GPU.
    """
    if where.type == "meta" and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    return default if where.type != "cuda" else _known(_name(where), kernel, size, default)


@functools.cache  # both are asked at every launch
def _name(gpu: torch.device) -> str:
    return torch.cuda.get_device_name(gpu)


@functools.cache
def _known(device: str, kernel: str, size: int, default: C) -> C:
    return best_of(table(device), kernel, size, default)


def best_of(known: Table | None, kernel: str, size: int, default: C) -> C:
    """As ``chosen``, from a given table: the entry of the nearest size, not further than a factor of two."""
    entries = known.kernels.get(kernel, ()) if known else ()
    near = [entry for entry in entries if _apart(entry.size, size) <= math.log(_NEAR)]
    if not near:
        return default
    cut: dict[str, Any] = min(near, key=lambda entry: _apart(entry.size, size)).cut
    if unknown := cut.keys() - {field.name for field in dataclasses.fields(default)}:
        raise ConfigError(f"tiles: {kernel} has no {', '.join(sorted(unknown))}; make the table again with bench_kernels --tune --write")
    return dataclasses.replace(default, **cut)


def _apart(one: int, other: int) -> float:
    return abs(math.log(one / other))


def fastest(timings: Mapping[C, float], default: C) -> C:
    """Of candidates and their milliseconds the fastest, if it beats ``default`` by more than noise. The default must be among them."""
    best = min(timings, key=lambda one: timings[one])
    return best if timings[best] < timings[default] * (1 - MARGIN) else default


def said(device: str | None, folder: Path = FOLDER) -> str:
    """In a line for the record: which table is used, or that there is none. ``device``: the name of the GPU, None on a CPU."""
    if device is None:
        return "none: on a CPU nothing is cut"
    known = table(device, folder)
    if known is None:
        return f"defaults: no table for {device}"
    return f"{path_of(device, folder).name}: {', '.join(sorted(known.kernels)) or 'defaults alone'}"


def write(made: Table, folder: Path = FOLDER) -> Path:
    """Leave the table where it is looked for. What an earlier one says of other kernels and sizes stays."""
    path, before = path_of(made.device, folder), table(made.device, folder)
    kept = {name: _merged(before.kernels.get(name, ()) if before else (), entries) for name, entries in made.kernels.items()}
    whole = made.model_copy(update={"kernels": {**(before.kernels if before else {}), **kept}})
    path.write_text(json.dumps(whole.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    table.cache_clear()
    _known.cache_clear()
    return path


def _merged(before: Iterable[Entry], entries: Sequence[Entry]) -> tuple[Entry, ...]:
    found = {entry.size: entry for entry in (*before, *entries)}
    return tuple(found[size] for size in sorted(found))
