"""The command that makes a cell again: the options of conf/ that are nearest to it, and an override for all else."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel

from harness.engine import Machine
from harness.spec import Cell, Data, EngineSpec

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("engine", "model", "method", "data", "train")
# Content hashes, made when the cell is made, and a name that follows from the knobs.
FILLED_IN = ("model.fingerprint", "model.tokenizer_fingerprint", "data.sha256", "engine.variant")
MISSING = "???"  # Hydra's mark for a value that must be given
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is built in, takes a tenth of the time for the same values

Options = Mapping[str, Mapping[str, Mapping[str, Any]]]  # group -> option -> its values


def options(conf: Path = CONF) -> Options:
    """The values of every option of every group of ``conf``; nothing when there is no such folder.

    Of ``engine`` also the variants, whole: the values that they start from, and what they change.
    """
    found = {group: {path.stem: _read(path) for path in sorted((conf / group).glob("*.yaml"))} for group in GROUPS}
    variants = {(name := f"{path.parent.name}/{path.stem}"): _variant(conf, name) for path in sorted((conf / "engine").glob("*/*.yaml"))}
    return {**found, "engine": {**found["engine"], **variants}}


def _variant(conf: Path, name: str) -> dict[str, Any]:
    """The values of an engine or of a variant: those of what it starts from, another variant perhaps, and its own over them."""
    own = dict(_read(conf / "engine" / f"{name}.yaml"))
    starts = [line.removeprefix("/engine/").removesuffix("@_here_") for line in own.pop("defaults", ()) if line != "_self_"]
    below = _variant(conf, starts[0]) if starts else {}
    return {**below, **own, "knobs": {**below.get("knobs", {}), **own.get("knobs", {})}}


def command(cell: Cell, machine: Machine, repeats: Sequence[int], known: Options) -> str:
    """A shell command that runs ``cell`` (all of ``repeats``) on a machine like ``machine``.

    Of each group of ``known`` the option with the fewest differences is named, and every value that differs is overridden. An
    interpolated value counts as different: what it resolves to may change from machine to machine. Knobs that the engine has got since
    stay as its own YAML has them, which leaves it as it was (``newer_knobs``). A file of rows that lay where the run was made is told
    with its sha-256, by which it can be found, and without which the run would take any other of this name.
    """
    words: list[str] = []
    newer = newer_knobs(cell.engine, known)
    for group in GROUPS:
        wanted = _wanted(cell, group)
        all_of, mine = known.get(group, {}), wanted.get("name")
        named = {option: values for option, values in all_of.items() if values.get("name", mine) == mine}
        if not named and group in ("data", "model"):  # it was given a name of its own: data=jsonl data.name=mine
            named = {option: values for option, values in all_of.items() if MISSING in values.values()}
        choices = {
            name: _without(values, newer) if group == "engine" else values
            for name, values in named.items()
            if not (group == "engine" and _sets(values, newer, known[group].get(cell.engine.name, {})))
        }
        lists = {name: _overrides(wanted, values, group, _model(cell, group)) for name, values in choices.items()}
        if lists:
            best = min(lists, key=lambda name: (len(lists[name]), name))
            words += [f"{group}={best}", *(_of_content(word, cell.workload.data) for word in lists[best])]
        else:
            chosen = [f"{group}={wanted['name']}"] if "name" in wanted else []
            words += [*chosen, *_overrides(wanted, {}, group, _model(cell, group))]
    words.append(f"machine={machine.device}")
    if machine.memory_cap_gib:
        words.append(f"machine.memory_cap_gib={machine.memory_cap_gib}")
    words.append(f"repeat={','.join(map(str, repeats))}")
    start = ["python", "-m", "harness", *(["-m"] if len(repeats) > 1 else [])]
    return " ".join(shlex.quote(word) for word in [*start, *words])


def newer_knobs(engine: EngineSpec, known: Options) -> tuple[str, ...]:
    """Knobs that ``conf/engine/<name>.yaml`` has and the record's ``engine`` had not: they are younger than the record."""
    return tuple(name for name in known.get("engine", {}).get(engine.name, {}).get("knobs", {}) if name not in engine.knobs)


def _without(values: Mapping[str, Any], knobs: Sequence[str]) -> Mapping[str, Any]:
    """An engine's option as it was before it had ``knobs``."""
    return {**values, "knobs": {name: value for name, value in values.get("knobs", {}).items() if name not in knobs}}


def _of_content(word: str, data: Data) -> str:
    """``word``; where it names a single local file of rows, as an entry with its hash, which makes the same cell."""
    if data.sha256 is None or not isinstance(data.path, str) or word != f"data.path={hydra_value(data.path)}":
        return word
    return f"data.path={hydra_value([{'path': data.path, 'sha256': data.sha256}])}"


def _sets(values: Mapping[str, Any], knobs: Sequence[str], base: Mapping[str, Any]) -> bool:
    """Whether a variant gives one of ``knobs`` another value than its engine's own YAML (``base``)."""
    mine, plain = values.get("knobs", {}), base.get("knobs", {})
    return any(mine.get(name) != plain.get(name) for name in knobs)


def hydra_value(value: Any) -> str:
    """``value`` in the grammar of Hydra's overrides."""
    if isinstance(value, str):
        return value if re.fullmatch(r"(dir|hub|package):[A-Za-z_/][A-Za-z0-9_./-]*", value) else _hydra_string(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_hydra_string(str(key))}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    return json.dumps(value)


def _hydra_string(text: str) -> str:
    if re.fullmatch(r"(?=.*[a-df])[0-9a-f]{64}", text):  # a hash, and no number, which would need an e alone among digits
        return text
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    # Backslashes need doubling only before a quote, and at the end, where a quote follows.
    escaped = re.sub(r"(\\*)(')", r"\1\1\\'", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", r"\${")
    return f"'{escaped}'"


def _wanted(cell: Cell, group: str) -> dict[str, Any]:
    values: dict[str, Any] = _model(cell, group).model_dump(mode="json")
    return {key: value for key, value in values.items() if f"{group}.{key}" not in FILLED_IN}


def _model(cell: Cell, group: str) -> BaseModel:
    return cell.engine if group == "engine" else getattr(cell.workload, group)


def _overrides(wanted: Mapping[str, Any], known: Mapping[str, Any], at: str, spec: BaseModel | None) -> list[str]:
    """What must be said so that ``known`` becomes ``wanted``. ``spec`` knows the defaults of what an option leaves out."""
    said: list[str] = []
    for key, value in wanted.items():
        where, default = f"{at}.{key}", _default(spec, key)
        if key not in known:
            if "defaults" in known or value != default:
                said.append(f"++{where}={hydra_value(value)}")
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping) and value:
            said += _overrides(value, known[key], where, None)
        elif not _equal(value, known[key]):
            said.append(f"{where}={hydra_value(value)}")
    if spec is None:
        said += [f"~{at}.{key}" for key in known if key not in wanted]
    return said


def _default(spec: BaseModel | None, key: str) -> Any:
    field = type(spec).model_fields.get(key) if spec is not None else None
    return MISSING if field is None or field.is_required() else field.default


def _equal(value: Any, known: Any) -> bool:
    """A record keeps only the name of a local file: the option may know its folder."""
    if value == known and isinstance(value, bool) == isinstance(known, bool):
        return True
    if not (isinstance(value, str) and isinstance(known, str)) or known == MISSING or "${" in known:
        return False
    kind, _, rest = known.partition(":")
    local = f"dir:{PurePosixPath(rest).name}" if kind == "dir" else PurePosixPath(known).name
    return value == local and "/" in known


def _read(path: Path) -> Mapping[str, Any]:
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    return values if isinstance(values, dict) else {}
