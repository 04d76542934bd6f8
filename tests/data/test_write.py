"""A token file is a safetensors file with the name of its bytes, and nothing else is left in its folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.data.write import write_token_file

SAMPLES = [Sample(np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)) for length in (3, 1, 5)]


def test_the_file_is_what_its_name_says_and_any_library_reads_it(tmp_path: Path) -> None:
    path = write_token_file(tmp_path / "new", SAMPLES[:2], SAMPLES[2:], {"made": "ü"})
    assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(path.parent.iterdir()) == [path]
    arrays = load_file(path)
    assert arrays["train.offsets"].tolist() == [0, 3, 4]
    assert arrays["train.input_ids"].tolist() == [0, 1, 2, 0]
    assert arrays["train.labels"].tolist() == [IGNORE, 1, 2, IGNORE], "nothing stands before a first token"
    made = TokenFile.open(path)
    assert made.metadata == {"made": "ü"}
    assert [sample.input_ids.tolist() for sample in made.held_out] == [[0, 1, 2, 3, 4]]
    assert SAMPLES[0].labels[0] == 0, "what was given is not changed"


def test_an_empty_split_is_a_split(tmp_path: Path) -> None:
    made = TokenFile.open(write_token_file(tmp_path, SAMPLES, [], {}))
    assert (len(made.train), len(made.held_out)) == (3, 0)


def test_what_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    empty = Sample(np.zeros(0, np.int32), np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="at least one token"):
        write_token_file(tmp_path, [SAMPLES[0], empty], [], {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_token_file(tmp_path, SAMPLES, [], {"not": object()})
    assert list(tmp_path.iterdir()) == []
