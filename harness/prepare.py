"""Make what a workload needs once, in our own interpreter: base weights, token file, initial adapter; all in one cache."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.data.build import build_dense, build_jsonl, one_by_one
from harness.data.rows import Row
from harness.data.tokenise import VERSION
from harness.data.tokens import TokenFile
from harness.errors import ConfigError, DataError, HarnessError
from harness.places import Prepared, PrepareRequest
from harness.spec import Data, Workload, parse
from harness.weights.adapter import prepare_adapter
from harness.weights.base_model import Base, prepare_base
from harness.weights.sources import fingerprint, resolve_source, write_atomically


def main(arguments: Sequence[str]) -> int:
    """``python -m harness.prepare REQUEST.json``. Exit code 0, or 2 with the reason on stderr."""
    if len(arguments) != 1:
        print("usage: python -m harness.prepare REQUEST.json", file=sys.stderr)
        return 2
    try:
        request = read_request(Path(arguments[0]))
        write_atomically(Path(request.out), prepare(request).model_dump_json(indent=1) + "\n")
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read_request(path: Path) -> PrepareRequest:
    """The request in ``path``. Raises ConfigError when there is none, or it is not one."""
    try:
        return parse(PrepareRequest, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable request: {error}") from error


def prepare(request: PrepareRequest) -> Prepared:
    """Make (or find in ``request.cache``) base, tokens and initial adapter. Imports torch only when something has to be made."""
    cache, workload = Path(request.cache).expanduser(), request.workload
    base = prepare_base(workload.model, request.sources, cache)
    adapter = prepare_adapter(workload, base, cache)
    tokens = _tokens(workload, request.sources.data, base, cache)
    return Prepared(
        tokens=str(tokens),
        base=str(base.path),
        adapter_init=str(adapter.path) if adapter else None,
        base_sha256=base.sha256,
        adapter_init_sha256=adapter.sha256 if adapter else None,
        notes=(f"base weights: {base.description}", _data_note(TokenFile.open(tokens).metadata)),
    )


def _data_note(metadata: dict[str, Any]) -> str:
    """What became of the rows, in a line of the record."""
    counts = ("rows", "train", "held_out", "held_out_unused", "samples_truncated", "tokens_truncated", "samples_dropped")
    words = [f"{metadata[name]:,} {name.replace('_', ' ')}" for name in counts if name in metadata]
    return f"data ({metadata.get('layout', metadata['source'])}): {', '.join(words)}"


def _tokens(workload: Workload, source: str | None, base: Base, cache: Path) -> Path:
    data = workload.data
    path = _data_path(data, source) if data.source == "jsonl" else None
    content = fingerprint(path, cache) if path else None
    if content is not None and data.sha256 not in (None, content):
        raise DataError(f"{data.path}: the file changed since the run was planned; run again")
    key = {
        "version": VERSION,
        "content": content,
        "data": data.model_dump(mode="json", exclude={"name", "path", "sha256"}),
        "tokenizer": base.tokenizer_sha256 if path else None,
        "vocab_size": base.vocab_size,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    entry, folder = cache / "tokens" / "index" / f"{digest}.json", cache / "tokens"
    try:
        found = folder / f"{json.loads(entry.read_text())['sha256']}.safetensors"
        if found.is_file():
            return found
    except (OSError, ValueError, KeyError):
        pass  # not made yet, or only half an entry: make it
    made = build_dense(data, base.vocab_size, folder) if path is None else _tokenise(data, path, base, folder)
    write_atomically(entry, json.dumps({"sha256": made.stem}))
    return made


def _tokenise(data: Data, path: Path, base: Base, folder: Path) -> Path:
    from harness.weights.tokenizer_files import load_tokenizer

    watch = _bar if sys.stdout.isatty() else one_by_one
    return build_jsonl(data, path, load_tokenizer(base.path, "the model's tokenizer"), folder, watch)


def _data_path(data: Data, source: str | None) -> Path:
    text = source or data.path or ""
    path = resolve_source(text) if text.startswith("package:") else Path(text).expanduser()
    if path is None or not path.is_file():
        raise DataError(f"data.path: there is no file '{text}'; give the path of a JSONL file")
    return path


def _bar(rows: Iterable[Row], total: int) -> Iterator[Row]:
    """Rows as they are, with a progress bar on stdout: whoever launched this process keeps stderr for the reason of a failure."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        yield from progress.track(rows, total=total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
