"""The metadata of a .gguf file (GGUF 2 and 3, little endian): names and plain values, without reading its tensors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import WeightsError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the header. Raises WeightsError when ``path`` is no GGUF file, or a part of one.

    Written out here because gguf.GGUFReader takes two seconds for a vocabulary of 49,152 (2 cores, gguf 0.19).
    """
    try:
        with path.open("rb") as file:
            magic, version = file.read(4), _scalar(file, 4)
            if magic != b"GGUF" or version not in (2, 3):
                raise WeightsError(
                    f"{path.name}: not a readable GGUF file (starts with {magic!r}, version {version}); expected GGUF 2 or 3"
                )
            _scalar(file, 10)  # how many tensors follow the metadata
            return dict(_pair(file) for _ in range(_scalar(file, 10)))
    except (OSError, struct.error, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise WeightsError(f"{path.name}: not a readable GGUF file ({error!r}); download it again") from error


def _pair(file: BinaryIO) -> tuple[str, Any]:
    return _string(file), _value(file, _scalar(file, 4))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        item, count = _scalar(file, 4), _scalar(file, 10)
        if item in SCALARS:
            form = f"<{count}{SCALARS[item][1]}"
            return list(struct.unpack(form, file.read(struct.calcsize(form))))
        return [_value(file, item) for _ in range(count)]
    return _scalar(file, kind)


def _scalar(file: BinaryIO, kind: int) -> Any:
    form = SCALARS[kind]
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    size = _scalar(file, 10)
    content = file.read(size)
    if len(content) < size:
        raise struct.error(f"the file ends within a text of {size} bytes")
    return content.decode("utf-8")
