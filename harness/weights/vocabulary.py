"""How many entries a tokenizer has and a model has room for, read off their files alone: planning refuses what cannot fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import WeightsError
from harness.weights.gguf_header import read_metadata


def num_entries(tokenizer: Path) -> int | None:
    """Entries of the tokenizer in a folder or .gguf file; None where only loading it can tell (no tokenizer.json)."""
    if tokenizer.suffix == ".gguf":
        names = read_metadata(tokenizer).get("tokenizer.ggml.tokens")
        return len(set(names)) if names else None
    try:
        found = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = found["model"]["vocab"]  # a map, or Unigram's list of (piece, score)
        pieces = vocabulary if isinstance(vocabulary, Mapping) else [piece for piece, _ in vocabulary]
        return len({*pieces, *(token["content"] for token in found.get("added_tokens", ()))})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever loads it says what is wrong with it


def num_rows(config: Mapping[str, Any] | None, weights: Path | None) -> int | None:
    """Rows of the embedding, by ``config`` or that of the folder ``weights``; None where only loading can tell."""
    found: Any = config
    if weights is not None:
        try:
            found = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    size = found.get("vocab_size") if isinstance(found, Mapping) else None
    return size if isinstance(size, int) else None


def check_fits(rows: int | None, entries: int | None, tokenizer: str) -> None:
    """Raises WeightsError when the model has fewer rows than the tokenizer has entries; what is not known is left to whoever loads it."""
    if rows is not None and entries is not None and entries > rows:
        raise WeightsError(
            f"vocabulary smaller than tokenizer: the model has {rows:,} entries, the tokenizer {tokenizer} has {entries:,}; "
            "choose a model.tokenizer that fits"
        )
