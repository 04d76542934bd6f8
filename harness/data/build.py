"""A workload's data made into one token file, with the counts of everything that was shortened, dropped, skipped or held out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from harness.data.counts import DataCounts, FileCounts
from harness.data.dense import dense_samples
from harness.data.rows import MAX_PROBLEMS, BadRow, Row, RowFile, open_rows
from harness.data.split import HeldOut, is_held_out, times
from harness.data.tokenise import Tokenised, tokenise
from harness.data.tokens import VERSION, Ints
from harness.data.write import TokenFileWriter, write_token_file
from harness.errors import DataError
from harness.spec import Data

REMEDY = "mend these rows, or set data.on_bad_row=skip: it leaves bad rows out, and counts them"
T = TypeVar("T")
Watch = Callable[[Iterable[T], str, int | None], Iterable[T]]  # (items, what is done with them, their number) -> the same items


@dataclass(frozen=True, slots=True)
class Built:
    """The token file, and the first problems of the rows that were skipped."""

    path: Path
    problems: tuple[str, ...] = ()


def build_jsonl(data: Data, paths: Sequence[Path], tokenizer: Any, folder: Path, watch: Watch[Any]) -> Built:
    """Tokenise the rows of ``paths`` (those of ``data.files``) into a token file in ``folder``; memory does not grow with the rows.

    Every line is checked before the first one is tokenised. Raises DataError naming files and lines, or what is left of them.
    """
    files = _open(data, paths)
    problems = _Problems([file.name for file in files], stops=data.on_bad_row == "error")
    num_rows = _check(files, problems, watch)
    rows = (row for row in itertools.chain.from_iterable(files) if isinstance(row, Row))
    with TokenFileWriter(folder) as writer:
        tally = _Tally(data, writer, HeldOut(data.held_out_samples))
        for item in tokenise(
            watch(rows, "tokenising", num_rows.total() - problems.num_bad.total()),
            tokenizer,
            sequence_length=data.sequence_length,
            supervise=data.supervise,
            system_prompt=data.system_prompt,
        ):
            tally.add(item, problems)
        problems.end(num_rows)
        for sample in tally.held_out.samples():
            writer.add_held_out(sample)
        counts = tally.counts(files, num_rows, problems.num_bad)
        if not counts.samples_train:
            raise DataError(
                f"{', '.join(problems.names)}: no sample is left to train on ({counts.sentence()}); "
                "raise data.sequence_length, or lower data.held_out_fraction"
            )
        path = writer.finish(_metadata(data, counts, writer.lengths(), chat_template=bool(tokenizer.chat_template)))
    return Built(path, tuple(problems.first))


def build_dense(data: Data, vocab_size: int, folder: Path) -> Built:
    """Draw dense samples into a token file in ``folder``. Raises DataError when the split leaves none to train on."""
    train, held_out = dense_samples(data.num_samples or 0, data.sequence_length, vocab_size, data.held_out_fraction)
    if not train or data.sequence_length < 2:
        raise DataError("dense data: nothing to train on; raise data.num_samples, or data.sequence_length to at least 2")
    kept = held_out[: data.held_out_samples]
    counts = DataCounts(
        rows=len(train) + len(held_out),
        rows_bad=0,
        samples_train=len(train),
        samples_repeated=0,
        samples_left_out=0,
        samples_held_out=len(kept),
        samples_unused=len(held_out) - len(kept),
        samples_dropped=0,
        samples_truncated=0,
        tokens_truncated=0,
        tokens_input=sum(map(len, train)),
        tokens_loss=sum(sample.num_labels for sample in train),
        files=(),
    )
    metadata = _metadata(data, counts, np.array([len(sample) for sample in train]), vocab_size=vocab_size)
    return Built(write_token_file(folder, train, kept, metadata))


def unwatched(items: Iterable[T], _doing: str, _total: int | None) -> Iterator[T]:
    """A ``Watch`` that shows nothing."""
    return iter(items)


class _Problems:
    """What is wrong with the rows: the first of it in words, all of it counted by file."""

    def __init__(self, names: Sequence[str], *, stops: bool) -> None:
        self.names = names
        self.first: list[str] = []
        self.num_bad: Counter[int] = Counter()
        self._first_of_file: dict[int, str] = {}
        self._stops = stops

    def add(self, bad: BadRow) -> None:
        """Count ``bad``. Raises DataError as soon as there is more than can be said at once, if bad rows are not skipped."""
        text = f"{self.names[bad.file]}:{bad.line}: {bad.problem}"
        self._first_of_file.setdefault(bad.file, text)
        self.num_bad[bad.file] += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(text)
        elif self._stops:
            self._fail()

    def end(self, num_rows: Counter[int]) -> None:
        """Raise DataError if bad rows are not skipped and there is one, or if a file has no other."""
        if self._stops and self.first:
            self._fail()
        useless = [number for number in range(len(self.names)) if num_rows[number] == self.num_bad[number]]
        if useless:
            raise DataError("\n".join(self._nothing_in(number, num_rows[number]) for number in useless))

    def _nothing_in(self, number: int, num_rows: int) -> str:
        return f"{self.names[number]}: none of its {num_rows:,} rows can be used; the first: {self._first_of_file[number]}"

    def _fail(self) -> NoReturn:
        more = [f"(the first {MAX_PROBLEMS} problems; there are more)"] if self.num_bad.total() > MAX_PROBLEMS else []
        raise DataError("\n".join([*self.first, *more, REMEDY]))


def _open(data: Data, paths: Sequence[Path]) -> list[RowFile]:
    files, problems = [], []
    for number, path in enumerate(paths):
        try:
            files.append(open_rows(path, layout=data.layout, fields=data.fields, number=number))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join("\n".join(problems).splitlines()[:MAX_PROBLEMS]))
    return files


def _check(files: Sequence[RowFile], problems: _Problems, watch: Watch[Any]) -> Counter[int]:
    """The number of rows of every file, the bad ones among them. Raises DataError when the data cannot be used."""
    num_rows: Counter[int] = Counter()
    for item in watch(itertools.chain.from_iterable(files), "checking", None):
        num_rows[item.file] += 1
        if isinstance(item, BadRow):
            problems.add(item)
    problems.end(num_rows)
    return num_rows


@dataclass(slots=True)
class _Tally:
    """Sends every sample where it belongs, and counts."""

    data: Data
    writer: TokenFileWriter
    held_out: HeldOut
    num: Counter[str] = field(default_factory=Counter)
    samples_train: Counter[int] = field(default_factory=Counter)

    def add(self, item: Tokenised | BadRow, problems: _Problems) -> None:
        if isinstance(item, BadRow):
            problems.add(item)
            return
        self.num["samples_truncated"] += item.tokens_truncated > 0
        self.num["tokens_truncated"] += item.tokens_truncated
        num_labels, digest = item.sample.num_labels, item.row.digest()
        if num_labels == 0:
            self.num["samples_dropped"] += 1
        elif is_held_out(digest, self.data.held_out_fraction):
            self.held_out.add(digest, item.sample)
        else:
            self._train(item, num_labels, times(digest, self.data.files[item.row.file].weight))

    def _train(self, item: Tokenised, num_labels: int, count: int) -> None:
        for _ in range(count):
            self.writer.add_train(item.sample)
        self.samples_train[item.row.file] += count
        self.num["samples_left_out"] += count == 0
        self.num["samples_repeated"] += max(0, count - 1)
        self.num["tokens_input"] += count * len(item.sample)
        self.num["tokens_loss"] += count * num_labels

    def counts(self, files: Sequence[RowFile], num_rows: Counter[int], num_bad: Counter[int]) -> DataCounts:
        counted = (
            "samples_repeated",
            "samples_left_out",
            "samples_dropped",
            "samples_truncated",
            "tokens_truncated",
            "tokens_input",
            "tokens_loss",
        )
        return DataCounts(
            rows=num_rows.total(),
            rows_bad=num_bad.total(),
            samples_train=self.samples_train.total(),
            samples_held_out=len(self.held_out),
            samples_unused=self.held_out.num_unused,
            files=tuple(
                FileCounts(layout=file.layout, rows=num_rows[number], rows_bad=num_bad[number], samples_train=self.samples_train[number])
                for number, file in enumerate(files)
            ),
            **{name: self.num[name] for name in counted},
        )


def _metadata(data: Data, counts: DataCounts, lengths: Ints, **facts: Any) -> dict[str, Any]:
    return {
        "source": data.source,
        "tokenisation_version": VERSION,
        **facts,
        "counts": counts.model_dump(mode="json"),
        "loss_fraction": round(counts.tokens_loss / counts.tokens_input, 4),
        "median_length": int(np.sort(lengths)[len(lengths) // 2]),
        "longest": int(lengths.max()),
    }
