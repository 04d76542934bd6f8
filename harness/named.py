"""Sources named by their content, so that a cell is the same wherever its files lie."""

from __future__ import annotations

from pathlib import Path

from harness.data.files import find_files
from harness.errors import ConfigError, HarnessError
from harness.spec import Data, DataFile, Model
from harness.weights import fingerprint, resolve_source
from harness.weights.sources import tokenizer_fingerprint


def named_data(data: Data, cache: Path) -> tuple[Data, tuple[str, ...]]:
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


def named_model(model: Model, cache: Path) -> tuple[Model, str | None, str | None]:
    """``model`` with the content hashes of its sources, and where weights and tokenizer lie, if here."""
    weights, tokenizer = _located("model.weights", model.weights), _located("model.tokenizer", model.tokenizer)
    foreign = tokenizer if model.tokenizer.startswith("dir:") and model.tokenizer != model.weights else None
    update = {
        "weights": _without_path(model.weights),
        "tokenizer": _without_path(model.tokenizer),
        "fingerprint": fingerprint(weights, cache) if weights else None,
        "tokenizer_fingerprint": tokenizer_fingerprint(foreign, cache) if foreign else None,
    }
    return model.model_copy(update=update), str(weights) if weights else None, str(tokenizer) if tokenizer else None


def _files(source: str) -> list[Path]:
    package = _located("data.path", source) if source.startswith("package:") else None
    return find_files(str(package) if package else source)


def _named(entry: DataFile, path: Path, cache: Path) -> DataFile:
    content = fingerprint(path, cache)
    if entry.sha256 not in (None, content):
        raise ConfigError(f"data.path: '{path.name}' is not the file that was asked for: its sha-256 is {content}, not {entry.sha256}")
    name = entry.path if entry.path.startswith("package:") else path.name
    return entry.model_copy(update={"path": name, "sha256": content})


def _located(key: str, source: str) -> Path | None:
    """The local path of ``source``; errors name the ``key`` that holds it."""
    try:
        return resolve_source(source)
    except HarnessError as error:
        raise ConfigError(f"{key}: {error}") from error


def _without_path(source: str) -> str:
    kind, _, rest = source.partition(":")
    return f"dir:{Path(rest).name}" if kind == "dir" else source
