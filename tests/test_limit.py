"""The floor: what is counted, that it can be measured here, stored, and held against a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness import limit
from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.data.write import write_token_file
from harness.errors import UnsupportedError
from harness.floor import Floor, shapes
from harness.promote import promote
from harness.store import load, save, save_floor
from tests import records, workloads
from tests.engines.tiny import FULL, LLAMA, LORA, make_workload

TINY = ("model=tiny_llama", "data=dense", "data.sequence_length=16", "data.num_samples=8", "train.steps=4", "train.samples_per_step=2")


def tokens(folder: Path) -> TokenFile:
    """Documents of 4 and 12 tokens, half of each supervised."""
    samples = []
    for length in (4, 12) * 5:
        ids = np.arange(length, dtype=np.int32)
        samples.append(Sample(ids, np.where(ids < length // 2, IGNORE, ids).astype(np.int32)))
    return TokenFile.open(write_token_file(folder, samples, [], {}))


def test_what_reads_the_same_input_is_one_product_and_the_head_sees_labels_only(tmp_path: Path) -> None:
    work = make_workload(LLAMA, LORA, samples_per_step=10, steps=2, warmup_steps=0)
    products, attention, mean = shapes(LLAMA, work, tokens(tmp_path))
    assert mean == 80
    assert {(one.out, one.width, one.count, one.rows, one.trained) for one in products} == {
        (32 + 16 + 16, 32, 2, 80, False), (32, 32, 2, 80, False), (2 * 72, 32, 2, 80, False), (32, 72, 2, 80, False),
        (512, 32, 1, 40, False),
    }  # fmt: skip
    assert (attention.length, attention.documents) == (10, 8), "5 x (16 + 144) squares over 80 tokens"
    assert (attention.heads, attention.key_heads, attention.size, attention.count) == (4, 2, 8, 2)
    full = make_workload(LLAMA, FULL, samples_per_step=10, steps=2, warmup_steps=0)
    assert all(one.trained for one in shapes(LLAMA, full, tokens(tmp_path / "again"))[0])


def test_a_floor_needs_all_its_parts() -> None:
    parts = {"forward_seconds": 0.1, "backward_seconds": 0.2, "attention_seconds": 0.1}
    named = {"machine": "m", "workload": "w", "compute_dtype": "bfloat16", "attention_by": None, "measured_utc": "", "torch": ""}
    assert Floor(**named, **parts, tokens_per_step=100).tokens_per_second == pytest.approx(250)
    assert Floor(**named, **{**parts, "attention_seconds": None}, tokens_per_step=100).tokens_per_second is None


def test_it_is_measured_printed_and_found_again(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    assert limit.main([*TINY, "machine=cpu", f"runs={runs}", f"cache={cache}"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    (floor,) = load(runs).floors.values()
    assert floor.tokens_per_step == 32
    assert floor.attention_by == "flash_attention"
    assert floor.step_seconds is not None
    assert 0 < floor.step_seconds < 1
    path = save_floor(floor, runs)
    path.write_text("{}", encoding="utf-8")
    again = load(runs)
    assert again.floors == {}
    assert "measure it again" in again.problems[0]


def test_a_floor_goes_with_its_records_when_they_are_promoted(tmp_path: Path) -> None:
    runs, to = tmp_path / "runs", tmp_path / "results"
    record = records.record()
    save(record, runs)
    mine = Floor(
        machine=record.machine.key, workload=record.cell.workload.key, compute_dtype="float32", tokens_per_step=1, forward_seconds=1,
        backward_seconds=1, attention_seconds=1, attention_by=None, measured_utc="", torch="",
    )  # fmt: skip
    for floor in (mine, mine.model_copy(update={"workload": "another"})):
        save_floor(floor, runs)
    promote(runs, to)
    assert list(load(to).floors.values()) == [mine]


def test_a_model_without_a_formula_is_a_clear_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="no formula for the operations of model_type 'mamba'"):
        shapes({"model_type": "mamba"}, workloads.workload(), tokens(tmp_path))
    assert limit.main(["model=tiny_llamma"]) == 2
    assert "tiny_llama" in capsys.readouterr().err
