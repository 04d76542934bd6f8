"""A tokenizer's files in the base folder, checked to load and to fit the model's vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from harness.errors import WeightsError
from harness.weights.sources import TOKENIZER_FILES
from harness.weights.vocabulary import check_fits


def write_tokenizer(source: Path, folder: Path, *, vocab_size: int | None) -> None:
    """Copy the tokenizer of ``source`` (a folder or a .gguf file) into ``folder``, which holds config.json already."""
    if source.suffix == ".gguf":
        from harness.weights.gguf_file import write_gguf_tokenizer

        write_gguf_tokenizer(source, folder)
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    tokenizer = load_tokenizer(folder, source.name)
    check_fits(vocab_size, len(tokenizer), source.name)


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in ``folder``, from its files alone. Raises WeightsError that calls it ``name``."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise WeightsError(f"{name}: no tokenizer here that transformers can load ({error}); expected at least tokenizer.json") from error
