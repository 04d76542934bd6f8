"""The memory-mapped token file, which samples each step consumes, and the batches an engine makes of them (numpy only)."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from harness.errors import DataError
from harness.spec import Train

VERSION = 2  # of what harness.data.tokenise does: raise when the same rows would become another token file
IGNORE = -100  # the label of a position that is not supervised, as in torch and transformers
Ints = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """One document: ``input_ids`` and ``labels`` of equal length, int32, aligned (the model shifts); labels[0] is IGNORE."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Supervised positions: labels that are not IGNORE, the first position never being one."""
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(frozen=True, slots=True)
class Split:
    """Samples stored end to end: flat int32 ``input_ids`` and ``labels``, and int64 ``offsets`` (one more than samples)."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return Sample(self.input_ids[start:stop], self.labels[start:stop])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A token file on disk, memory-mapped. ``metadata`` holds the counts that prepare made (truncated, dropped, …)."""

    train: Split
    held_out: Split
    metadata: dict[str, Any]
    sha256: str

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map ``path`` (a safetensors file named by its own sha-256). Raises DataError when it is not one of ours."""
        try:
            return cls._map(path)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise DataError(f"{path.name}: not a readable token file ({error}); delete it and run again") from error

    @classmethod
    def _map(cls, path: Path) -> TokenFile:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        kinds = {"I32": np.int32, "I64": np.int64}

        def array(name: str) -> npt.NDArray[Any]:
            entry = header[name]
            start, stop = entry["data_offsets"]
            dtype = np.dtype(kinds[entry["dtype"]])
            if start == stop:
                return np.zeros(0, dtype)
            return np.memmap(path, dtype=dtype, mode="r", offset=8 + size + start, shape=tuple(entry["shape"]))

        def split(name: str) -> Split:
            return Split(array(f"{name}.input_ids"), array(f"{name}.labels"), array(f"{name}.offsets"))

        metadata = json.loads(header["__metadata__"]["engine_room"])
        return cls(split("train"), split("held_out"), metadata, path.stem)

    def step(self, train: Train, index: int) -> tuple[Sample, ...]:
        """The samples of optimizer step ``index`` (0-based): the same for every engine, every sample once an epoch.

        Raises DataError when there is nothing to train on: no samples, or none with a supervised token (the step would have no loss).
        """
        first = index * train.samples_per_step
        wanted = range(first, first + train.samples_per_step)
        size = len(self.train)
        if size == 0:
            raise DataError("the token file has no training samples")
        places = [divmod(number, size) for number in wanted]
        samples = tuple(self.train[int(epoch_order(train.seed, epoch, size)[place])] for epoch, place in places)
        if not any(sample.num_labels for sample in samples):
            raise DataError(f"step {index + 1}: none of its {len(samples)} samples has a supervised token, so it has no loss")
        return samples


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> Ints:
    """A permutation of ``size`` samples by sorted hashes: independent of any library's random generator or its version."""
    keys = b"".join(hashlib.blake2b(f"{seed}:{epoch}:{i}".encode(), digest_size=8).digest() for i in range(size))
    return np.argsort(np.frombuffer(keys, dtype=">u8"), kind="stable").astype(np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees: ``input_ids`` and ``labels`` int64 [rows, positions], and each row's document lengths.

    Documents stand from the left of a row; what is left of it is padding (labels IGNORE).
    """

    input_ids: Ints
    labels: Ints
    lengths: tuple[tuple[int, ...], ...]

    @property
    def num_labels(self) -> int:
        """Supervised positions of all rows: labels that are not IGNORE."""
        return int((self.labels != IGNORE).sum())

    @property
    def attention_mask(self) -> Ints:
        """1 for real tokens, 0 for padding, int64 [rows, positions]."""
        mask = np.zeros_like(self.input_ids)
        for row, lengths in enumerate(self.lengths):
            mask[row, : sum(lengths)] = 1
        return mask

    @property
    def position_ids(self) -> Ints:
        """Positions that restart at 0 with every document, int64 [rows, positions]; 0 on padding."""
        positions = np.zeros_like(self.input_ids)
        for row, lengths in enumerate(self.lengths):
            start = 0
            for length in lengths:
                positions[row, start : start + length] = np.arange(length)
                start += length
        return positions

    def documents(self) -> Iterator[tuple[Ints, Ints]]:
        """The (input_ids, labels) of every document, as they lie in this batch."""
        for row, lengths in enumerate(self.lengths):
            start = 0
            for length in lengths:
                yield self.input_ids[row, start : start + length], self.labels[row, start : start + length]
                start += length


def pad(samples: Sequence[Sample], *, pad_id: int = 0, multiple_of: int = 1) -> Batch:
    """One row a sample, padded on the right to the longest, rounded up to ``multiple_of``."""
    width = -(-max(len(sample) for sample in samples) // multiple_of) * multiple_of
    input_ids = np.full((len(samples), width), pad_id, dtype=np.int64)
    labels = np.full((len(samples), width), IGNORE, dtype=np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample)] = sample.input_ids
        labels[row, : len(sample)] = sample.labels
    return Batch(input_ids, labels, tuple((len(sample),) for sample in samples))


def pack(samples: Sequence[Sample]) -> Batch:
    """All samples end to end in one row, no padding; attention must keep the documents apart (``Batch.lengths``)."""
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)[None]
    labels = np.concatenate([sample.labels for sample in samples]).astype(np.int64)[None]
    return Batch(input_ids, labels, (tuple(len(sample) for sample in samples),))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in runs of ``size``, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The tokens of one optimizer step, counted from the batches that an engine really built.

    ``input``: real tokens, prompt included. ``loss``: supervised labels after the causal shift. ``processed``: positions the
    kernels work on (padding included, dropped positions not). ``sha256``: hash of the step's documents, whatever their order and layout.
    """

    input: int
    loss: int
    processed: int
    sha256: str

    @classmethod
    def of(cls, batches: Sequence[Batch], *, processed: int | None = None) -> StepTokens:
        """Count and hash ``batches``; ``processed`` when the engine works on other than rows x positions."""
        hashes, tokens, labels = [], 0, 0
        for batch in batches:
            for ids, targets in batch.documents():
                # The first label of a document can never be predicted from within it, so it is no part of the stream.
                shifted = np.ascontiguousarray(targets[1:], dtype="<i8")
                hashes.append(hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes() + shifted.tobytes()).digest())
                tokens += len(ids)
                labels += int((shifted != IGNORE).sum())
        positions = sum(batch.input_ids.size for batch in batches)
        stream = hashlib.sha256(b"".join(sorted(hashes))).hexdigest()
        return cls(tokens, labels, positions if processed is None else processed, stream)

    @classmethod
    def expected(cls, samples: Sequence[Sample]) -> StepTokens:
        """What a faithful engine must report for ``samples`` (``processed`` counts no padding)."""
        return cls.of([pack(samples)])
