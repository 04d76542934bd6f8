"""Write a token file: one safetensors file named by the sha-256 of its bytes, appearing at once or not at all, never held in memory."""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness.data.tokens import IGNORE, Sample

PIECE = 2**22  # bytes copied at a time


class _SpilledSplit:
    """The tokens of one split on disk, in files without a name (a killed process leaves none), and where each sample ends."""

    def __init__(self, folder: Path) -> None:
        self.offsets = array("q", [0])
        self.input_ids, self.labels = _nameless(folder), _nameless(folder)

    def __enter__(self) -> _SpilledSplit:
        return self

    def __exit__(self, *_: object) -> None:
        self.input_ids.close()
        self.labels.close()

    def add(self, sample: Sample) -> None:
        if not len(sample):
            raise ValueError("a sample has at least one token")
        self.input_ids.write(np.ascontiguousarray(sample.input_ids, dtype="<i4").tobytes())
        labels = np.array(sample.labels, dtype="<i4")
        labels[0] = IGNORE  # nothing stands before the first token to predict it from
        self.labels.write(labels.tobytes())
        self.offsets.append(self.offsets[-1] + len(sample))


class TokenFileWriter:
    """Takes samples one by one and keeps only their lengths; :meth:`finish` makes the file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open_files = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._train = self._open_files.enter_context(_SpilledSplit(folder))
        self._held_out = self._open_files.enter_context(_SpilledSplit(folder))

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def add_train(self, sample: Sample) -> None:
        """Append a sample to train on."""
        self._train.add(sample)

    def add_held_out(self, sample: Sample) -> None:
        """Append a sample to score."""
        self._held_out.add(sample)

    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of every training sample so far, int64."""
        return np.diff(np.array(self._train.offsets, dtype=np.int64))

    def finish(self, metadata: dict[str, Any]) -> Path:
        """Write the file; returns its path, ``<sha256>.safetensors``."""
        partial = self._folder / f".{secrets.token_hex(8)}.partial"
        try:
            digest = hashlib.sha256()
            with partial.open("wb") as file:
                for piece in self._pieces(metadata):
                    digest.update(piece)
                    file.write(piece)
            return partial.replace(self._folder / f"{digest.hexdigest()}.safetensors")
        finally:
            partial.unlink(missing_ok=True)

    def _pieces(self, metadata: dict[str, Any]) -> Iterator[bytes]:
        splits = {"train": self._train, "held_out": self._held_out}
        # The wide numbers first: then all are aligned.
        sizes = {f"{name}.offsets": ("I64", len(split.offsets), 8) for name, split in splits.items()}
        for name, split in splits.items():
            sizes |= {f"{name}.{part}": ("I32", split.offsets[-1], 4) for part in ("input_ids", "labels")}
        yield _header(sizes, metadata)
        for split in splits.values():
            yield np.array(split.offsets, dtype="<i8").tobytes()
        for split in splits.values():
            for spilled in (split.input_ids, split.labels):
                spilled.seek(0)
                while piece := spilled.read(PIECE):
                    yield piece


def write_token_file(folder: Path, train: Sequence[Sample], held_out: Iterable[Sample], metadata: dict[str, Any]) -> Path:
    """Write ``train`` and ``held_out`` samples to ``folder``; returns the path, ``<sha256>.safetensors``."""
    with TokenFileWriter(folder) as writer:
        for sample in train:
            writer.add_train(sample)
        for sample in held_out:
            writer.add_held_out(sample)
        return writer.finish(metadata)


def _nameless(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


def _header(sizes: dict[str, tuple[str, int, int]], metadata: dict[str, Any]) -> bytes:
    """The start of a safetensors file: the length of a JSON header, and the header, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"engine_room": json.dumps(metadata, sort_keys=True)}}
    start = 0
    for name, (dtype, count, width) in sizes.items():
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, start + count * width]}
        start += count * width
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
