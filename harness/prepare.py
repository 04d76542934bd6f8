"""Make what a workload needs once, in our own interpreter: base weights, token file, initial adapter; all in one cache."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.data.counts import DataCounts
from harness.data.tokens import VERSION, TokenFile
from harness.errors import ConfigError, DataError, HarnessError, StoreError
from harness.places import Prepared, PrepareRequest
from harness.spec import Data, Lora, LoraFp8, Model, QLora, Workload, parse
from harness.weights.adapter import Adapter, find_adapter, prepare_adapter
from harness.weights.base_model import Base, as_fp8, find_base, prepare_base, tokenizing
from harness.weights.nf4_base import find_nf4, prepare_nf4
from harness.weights.sources import fingerprint, resolve_source, write_atomically

if TYPE_CHECKING:
    from harness.data.build import Built  # imported where something is tokenised: a parent that only looks need not wait for it

SHOWN = 3  # reasons of skipped rows
FEW = 32  # held-out samples that are worth a line: of fewer the loss says little
T = TypeVar("T")


def main(arguments: Sequence[str]) -> int:
    """``python -m harness.prepare REQUEST.json``. Exit code 0, or 2 with the reason on stderr."""
    if len(arguments) != 1:
        print("usage: python -m harness.prepare REQUEST.json", file=sys.stderr)
        return 2
    try:
        request = read_request(Path(arguments[0]))
        made = count(request) if request.only_count else prepare(request)
        write_atomically(Path(request.out), made.model_dump_json(indent=1) + "\n")
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
    tokens = _tokens(request)  # rows that cannot be used are told before gigabytes of weights are made
    base = prepare_base(workload.model, request.sources, cache)
    adapter = prepare_adapter(workload, base, cache)
    base = prepare_nf4(base, workload.model.dtype, cache) if isinstance(workload.method, QLora) else base
    made = _prepared(workload, base, adapter, tokens)
    print(*about_data(workload.data, made.data), sep="\n", flush=True)
    return made


def count(request: PrepareRequest) -> DataCounts:
    """What becomes of the rows, for which they are tokenised; no weights are made."""
    return _counts(_tokens(request))


def find_count(request: PrepareRequest) -> DataCounts | None:
    """What ``count`` would return where base and tokens are in the cache, after the same checks."""
    cache, data = Path(request.cache).expanduser(), request.workload.data
    base = find_base(request.workload.model, request.sources, cache)
    tokens = _find_tokens(_entry(data, _data_paths(data, request.sources.data), base, cache)) if base else None
    return _counts(tokens) if tokens else None


def find(request: PrepareRequest) -> Prepared | None:
    """What ``prepare`` would return where all of it is in the cache, after the same checks; None where anything must be made or fetched."""
    cache, workload = Path(request.cache).expanduser(), request.workload
    base = find_base(workload.model, request.sources, cache)
    if base is None:
        return None
    adapter = find_adapter(workload, base, cache)
    tokens = _find_tokens(_entry(workload.data, _data_paths(workload.data, request.sources.data), base, cache))
    quantised = find_nf4(base, cache) if isinstance(workload.method, QLora) else base
    if tokens is None or quantised is None or (adapter is None and isinstance(workload.method, Lora)):
        return None
    return _prepared(workload, quantised, adapter, tokens)


def _prepared(workload: Workload, base: Base, adapter: Adapter | None, tokens: Path) -> Prepared:
    base = as_fp8(base) if isinstance(workload.method, LoraFp8) else base
    counts = _counts(tokens)
    return Prepared(
        tokens=str(tokens),
        base=str(base.path),
        adapter_init=str(adapter.path) if adapter else None,
        base_sha256=base.sha256,
        adapter_init_sha256=adapter.sha256 if adapter else None,
        data=counts,
        notes=(f"base weights: {base.description}", *_tokenizer_note(workload.model), *about_data(workload.data, counts)),
    )


def about_data(data: Data, counts: DataCounts | None) -> tuple[str, ...]:
    """What became of the rows, where that is known, and in a line of its own where so few are held out that their loss says little."""
    if counts is None:
        return ()
    said = f"data ({_layouts(data, counts)}): {counts.sentence()}"
    if not data.held_out_fraction or counts.samples_held_out >= min(FEW, data.held_out_samples):
        return (said,)
    few = f"held out: {counts.samples_held_out:,}, where data.held_out_samples allows {data.held_out_samples:,}"
    least = "" if counts.samples_held_out else ", so that nothing that is trained on this data can be scored"
    why = f"data.held_out_fraction={data.held_out_fraction:g} of {counts.rows:,} rows, those of one content all or none, is no more"
    return said, f"{few}{least}: {why}; raise it to hold out more"


def _counts(tokens: Path) -> DataCounts:
    return parse(DataCounts, TokenFile.open(tokens).metadata["counts"])


def _layouts(data: Data, counts: DataCounts) -> str:
    """What the rows were read as, and who said so."""
    found = data.source == "jsonl" and data.layout == "auto" and data.fields is None
    return f"{counts.layouts}, found by itself" if found else counts.layouts


def _tokenizer_note(model: Model) -> tuple[str, ...]:
    if model.tokenizer == model.weights:
        return ()
    return (f"tokenizer: {model.tokenizer}, not the weights' own",)


def _tokens(request: PrepareRequest) -> Path:
    cache, data = Path(request.cache).expanduser(), request.workload.data
    paths = _data_paths(data, request.sources.data)
    with tokenizing(request.workload.model, request.sources, cache) as base:
        entry = _entry(data, paths, base, cache)
        found = _find_tokens(entry)
        if found is not None:
            return found
        made = _build(data, paths, base, cache / "tokens")
    write_atomically(entry, json.dumps({"sha256": made.stem}))
    return made


def _entry(data: Data, paths: Sequence[Path], base: Base, cache: Path) -> Path:
    """Where the cache says which token file is made of just this. Raises DataError when a file is not the one that was planned with."""
    contents = [fingerprint(path, cache) for path in paths]
    for file, content in zip(data.files, contents, strict=True):
        if file.sha256 not in (None, content):
            raise DataError(f"{file.path}: the file changed since the run was planned; run again")
    key = {
        "version": VERSION,
        "content": [(content, file.weight) for content, file in zip(contents, data.files, strict=True)],
        "data": data.model_dump(mode="json", exclude={"name", "path", "sha256"}),
        "tokenizer": base.tokenizer_sha256 if paths else None,
        "vocab_size": base.vocab_size,
    }
    return cache / "tokens" / "index" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


def _find_tokens(entry: Path) -> Path | None:
    """The token file that ``entry`` names; None where it is not made yet, or only half an entry is there."""
    try:
        found = entry.parent.parent / f"{json.loads(entry.read_text())['sha256']}.safetensors"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.is_file() else None


def _build(data: Data, paths: Sequence[Path], base: Base, folder: Path) -> Path:
    from harness.data.build import build_dense

    try:
        built = _tokenise(data, paths, base, folder) if paths else build_dense(data, base.vocab_size, folder)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write the token file ({error.strerror}); free space there or choose another cache=…") from error
    if built.problems:
        print("bad rows are skipped (data.on_bad_row=skip), the first of them:", *built.problems[:SHOWN], sep="\n  ", flush=True)
    return built.path


def _tokenise(data: Data, paths: Sequence[Path], base: Base, folder: Path) -> Built:
    from harness.data.build import build_jsonl, unwatched
    from harness.weights.tokenizer_files import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # launch turns it off for workers, which fork; this process does not
    watch = _bar if sys.stdout.isatty() else unwatched
    return build_jsonl(data, paths, load_tokenizer(base.path, "the model's tokenizer"), folder, watch)


def _data_paths(data: Data, sources: Sequence[str]) -> list[Path]:
    """Where the files of ``data`` lie: as ``sources`` say, else as their names do."""
    texts = sources or [entry.path for entry in data.files]
    paths = [resolve_source(text) if text.startswith("package:") else Path(text).expanduser() for text in texts]
    missing = [text for text, path in zip(texts, paths, strict=True) if path is None or not path.is_file()]
    if missing:
        raise DataError("\n".join(f"data.path: there is no file '{text}'; give the path of a JSONL file" for text in missing))
    return [path for path in paths if path is not None]


def _bar(items: Iterable[T], doing: str, total: int | None) -> Iterator[T]:
    """Items as they are, with a progress bar on stdout: whoever launched this process keeps stderr for the reason of a failure."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        yield from progress.track(items, total=total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
