"""Safetensors files without torch: read tensors, hash them by content, write a model's shards in parallel and in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import WeightsError
from harness.spec import DType

Floats = npt.NDArray[np.float32]
Values = Callable[[str, int, int], Floats]  # (name, first element, one past the last) -> the flat tensor's values
CODES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
CHUNK = 2**22  # elements made at a time: part of the definition of random weights, do not change
SHARD_BYTES = 4 * 10**9
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in a file: its safetensors type code (F32, BF16, …), shape, first byte and one past the last."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    def raw(self) -> npt.NDArray[np.uint8]:
        """The stored bytes, memory-mapped."""
        if self.start == self.stop:
            return np.zeros(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.start, (self.stop - self.start,))

    def values(self, start: int = 0, stop: int | None = None) -> Floats:
        """Elements ``start`` to ``stop`` of the flat tensor as float32. Raises WeightsError for other than plain float types."""
        bits = self.raw()
        if self.code == "F32":
            return np.asarray(bits.view(np.float32)[start:stop])
        if self.code == "F16":
            return bits.view(np.float16)[start:stop].astype(np.float32)
        if self.code == "BF16":
            return (bits.view(np.uint16)[start:stop].astype(np.uint32) << 16).view(np.float32)
        raise WeightsError(f"{self.file.name}: '{self.name}' is stored as {self.code}; expected F32, BF16 or F16 (not quantised)")


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the adapter in ``folder``, or else of all its *.safetensors. Raises WeightsError when there is none."""
    adapter = folder / ADAPTER_FILE
    files = [adapter] if adapter.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no *.safetensors here; an adapter is {ADAPTER_FILE}, full weights are model*.safetensors")
    return {stored.name: stored for file in files for stored in _header(file)}


def adapter_sha256(folder: Path) -> str:
    """Content hash of trained weights (adapter or full): names, types, shapes and bytes, whatever the sharding or the metadata."""
    stored = read_tensors(folder)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        digests = dict(zip(stored, pool.map(_digest, stored.values()), strict=True))
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def write_model(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: DType, values: Values) -> None:
    """Write ``shapes`` as model*.safetensors with an index, at most ``SHARD_BYTES`` a file, filled by ``values`` in parallel.

    ``values`` is called from threads, for at most ``CHUNK`` elements at a time, at multiples of ``CHUNK``.
    """
    shards = _shards(shapes, ITEM_BYTES[dtype])
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(_count(shape) for shape in shapes.values()) * ITEM_BYTES[dtype]
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, {name: shapes[name] for name in shard}, dtype, values)


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: DType, values: Values) -> None:
    """Write one safetensors file of ``dtype``. Raises WeightsError for values that ``dtype`` cannot hold."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size, position = ITEM_BYTES[dtype], 0
    for name, shape in shapes.items():
        stop = position + _count(shape) * size
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)

    def fill(chunk: tuple[str, int, int]) -> None:
        name, start, stop = chunk
        content = _cast(name, values(name, start, stop), dtype)
        _write_at(descriptor, content, first + header[name]["data_offsets"][0] + start * size)

    descriptor = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        _write_at(descriptor, memoryview(struct.pack("<Q", len(text)) + text), 0)
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(fill, list(_chunks(shapes))):
                pass
    finally:
        os.close(descriptor)


def _header(file: Path) -> list[Stored]:
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        found = [
            Stored(name, entry["dtype"], tuple(entry["shape"]), file, *(8 + size + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, MemoryError, OverflowError) as error:
        raise WeightsError(f"{file.name}: not a readable safetensors file ({error}); restore it") from error
    if max((stored.stop for stored in found), default=0) > file.stat().st_size:
        raise WeightsError(f"{file.name}: the file is shorter than its header says (an interrupted copy?); restore it")
    return found


def _digest(stored: Stored) -> str:
    return f"{stored.name} {stored.code} {list(stored.shape)} {hashlib.sha256(stored.raw().data).hexdigest()}"


def _shards(shapes: Mapping[str, tuple[int, ...]], item_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = _count(shape) * item_bytes
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _chunks(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    for name, shape in shapes.items():
        count = _count(shape)
        for start in range(0, count, CHUNK):
            yield name, start, min(start + CHUNK, count)


def _cast(name: str, values: Floats, dtype: DType) -> memoryview:
    """``values`` rounded to nearest even in ``dtype``, as bytes."""
    finite = bool(np.isfinite(values).all())
    stored: npt.NDArray[Any] = values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
        finite = finite and bool(np.isfinite(stored).all())
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        finite = finite and not bool(((stored & 0x7F80) == 0x7F80).any())
    if not finite:
        raise WeightsError(f"'{name}' holds NaN, infinity or values too large for {dtype}; widen model.dtype or fix the weights")
    return np.ascontiguousarray(stored).view(np.uint8).data


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
