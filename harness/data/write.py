"""Write a token file: one safetensors file named by the sha-256 of its bytes, appearing at once or not at all."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from harness.data.tokens import IGNORE, Sample


def write_token_file(folder: Path, train: Sequence[Sample], held_out: Sequence[Sample], metadata: dict[str, Any]) -> Path:
    """Write ``train`` and ``held_out`` samples to ``folder``; returns the path, ``<sha256>.safetensors``."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, samples in (("train", train), ("held_out", held_out)):
        arrays[f"{name}.input_ids"] = _flat([sample.input_ids for sample in samples])
        arrays[f"{name}.labels"] = _flat([_first_ignored(sample.labels) for sample in samples])
        arrays[f"{name}.offsets"] = np.cumsum([0, *(len(sample) for sample in samples)], dtype=np.int64)
    content = save(arrays, metadata={"engine_room": json.dumps(metadata, sort_keys=True)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def _flat(parts: list[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def _first_ignored(labels: Any) -> np.ndarray[Any, Any]:
    ignored: np.ndarray[Any, Any] = np.array(labels, dtype=np.int32)
    ignored[:1] = IGNORE
    return ignored
