"""A workload's data made into one token file, with the counts of everything that was shortened, dropped or held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.data.dense import dense_samples
from harness.data.rows import Row, open_rows
from harness.data.split import split_samples
from harness.data.tokenise import VERSION, tokenise
from harness.data.tokens import Sample
from harness.data.write import write_token_file
from harness.errors import DataError
from harness.spec import Data

Watch = Callable[[Iterable[Row], int], Iterable[Row]]  # (rows, their number) -> the same rows, shown as progress


def build_jsonl(data: Data, path: Path, tokenizer: Any, folder: Path, watch: Watch) -> Path:
    """Tokenise the rows of ``path`` into a token file in ``folder``. Raises DataError naming lines, or what is left of the file."""
    rows = open_rows(path, data.fields)
    total = sum(1 for _ in rows)  # every line is checked before the first one is tokenised
    samples = tokenise(watch(rows, total), tokenizer, sequence_length=data.sequence_length, mask_prompt=data.mask_prompt, source=path)
    split = split_samples(samples, fraction=data.held_out_fraction, most_held_out=data.held_out_samples)
    if not split.train:
        raise DataError(
            f"{path.name}: no sample is left to train on, of {total} rows ({_words(split.counts)}); "
            "raise data.sequence_length, or lower data.held_out_fraction"
        )
    facts = {"layout": rows.layout, "chat_template": bool(tokenizer.chat_template), **split.counts}
    return write_token_file(folder, split.train, split.held_out, _metadata(data, facts, split.train))


def build_dense(data: Data, vocab_size: int, folder: Path) -> Path:
    """Draw dense samples into a token file in ``folder``. Raises DataError when the split leaves none to train on."""
    train, held_out = dense_samples(data.num_samples or 0, data.sequence_length, vocab_size, data.held_out_fraction)
    if not train or data.sequence_length < 2:
        raise DataError("dense data: nothing to train on; raise data.num_samples, or data.sequence_length to at least 2")
    kept = held_out[: data.held_out_samples]
    facts = {"rows": len(train) + len(held_out), "train": len(train), "held_out": len(kept), "vocab_size": vocab_size}
    return write_token_file(folder, train, kept, _metadata(data, facts, train))


def one_by_one(rows: Iterable[Row], _total: int) -> Iterator[Row]:
    """A ``Watch`` that shows nothing."""
    return iter(rows)


def _metadata(data: Data, facts: dict[str, Any], train: list[Sample]) -> dict[str, Any]:
    lengths = sorted(len(sample) for sample in train)
    tokens_input, tokens_loss = sum(lengths), sum(sample.num_labels for sample in train)
    return {
        "source": data.source,
        "tokenisation_version": VERSION,
        **facts,
        "tokens_input": tokens_input,
        "tokens_loss": tokens_loss,
        "loss_fraction": round(tokens_loss / tokens_input, 4),
        "median_length": lengths[len(lengths) // 2],
        "longest": lengths[-1],
    }


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "rows")
