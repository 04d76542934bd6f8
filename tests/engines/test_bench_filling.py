"""The count of filling and captures agrees with one by hand, and follows what it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.native.bench_filling import Cost, batches_of, cost, main
from engines.native.buckets import Policy
from harness.data.tokens import IGNORE, Sample, TokenFile, pack
from harness.data.write import write_token_file

NEVER, AT_ONCE = Policy(worth_a_capture=10**9), Policy(worth_a_capture=1)
SUPERVISED = 40


def tokens_of(folder: Path, lengths: list[int]) -> TokenFile:
    return TokenFile.open(written(folder, lengths))


def written(folder: Path, lengths: list[int]) -> Path:
    """Samples of these lengths, whose last tokens are supervised."""
    ids = [np.ones(length, np.int32) for length in lengths]
    labels = [np.where(np.arange(length) < length - SUPERVISED, IGNORE, 1).astype(np.int32) for length in lengths]
    return write_token_file(folder, [Sample(*each) for each in zip(ids, labels, strict=True)], [], {})


def test_by_hand(tmp_path: Path) -> None:
    """Two samples a row: one row of 300 and one of 700 tokens with 80 supervised rows, that fill up to 320 and 704 with 128."""
    tokens = tokens_of(tmp_path, [100, 200, 300, 400]).train
    small, large = pack([tokens[0], tokens[1]]), pack([tokens[2], tokens[3]])
    alone = 2 * (300 + 700 + 0.5 * 4 * SUPERVISED)
    found = cost([large, small, large, small], NEVER, row=0.5)
    assert found.captures == 0
    assert found.filling == found.whole == pytest.approx(4 * (704 + 0.5 * 128) / alone - 1)
    found = cost([large, small, large, small], AT_ONCE, capture=100, row=0.5)
    assert found.captures == 1
    assert found.filling == pytest.approx(2 * (704 + 320 + 0.5 * 256) / alone - 1)
    assert found.whole == pytest.approx(found.filling + 100 / alone)


def test_rows_that_are_alike_cost_nothing_more(tmp_path: Path) -> None:
    rows = [*batches_of(tokens_of(tmp_path, [100] * 4), seed=0, steps=3, samples=2, micro_batch=2)]
    assert cost(rows, NEVER) == cost(rows, AT_ONCE) == Cost(0, 0.0, 0.0)


def test_a_run_takes_each_sample_once_an_epoch(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, [*range(50, 62)])
    rows = [*batches_of(tokens, seed=1, steps=4, samples=6, micro_batch=4)]
    assert [len(row.lengths[0]) for row in rows] == [4, 2] * 4
    lengths = [length for row in rows for length in row.lengths[0]]
    assert sorted(lengths[:12]) == sorted(lengths[12:]) == [*range(50, 62)]
    assert lengths[:12] != lengths[12:]


def test_a_line_for_each_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [*range(60, 90)])
    policies = ["--steps-an-octave", "16", "32", "--worth-a-capture", "1", "9999999"]
    main([str(path), "--steps", "3", "--samples", "8", "--micro-batch", "2", "8", "--seeds", "2", *policies])
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split(":")[0].split()) for line in lines[:5]] == [
        "3 steps of 8 samples, micro-batches of 2",
        "16 an octave, 1",
        "16 an octave, 9999999",
        "32 an octave, 1",
        "32 an octave, 9999999",
    ]
    assert len(lines) == 10
    assert lines[2].split()[-3] == "0.0"
    assert float(lines[1].split()[-3]) > 0
