"""What fits where: every line says whether it was measured or predicted, and what does not fit says what it needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from harness.fit import main
from harness.stats import tokens_per_second
from harness.store import load

RESULTS = Path(__file__).resolve().parents[2] / "results"


def table(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


def test_8b_on_every_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    head, _, *lines = table(capsys, "model=llama3_8b", "data=dense", "engines=fused", "gib=8,16,24,80", f"runs={tmp_path}")
    assert "speed as on NVIDIA" in head
    assert all(("does not fit: needs at least" in line) or ("measured" in line) or ("predicted" in line) for line in lines)
    by_size = {int(line.split()[0]): line for line in lines}
    assert "needs at least" in by_size[8]
    assert "predicted" in by_size[24]
    assert "measured" in by_size[80]  # committed records have it, with the rate that a report gives them
    runs = [stored.record for stored in load(RESULTS).stored if stored.record.status == "ok" and stored.record.measurement]
    rates = [tokens_per_second(run.measurement.steps) for run in runs if run.cell.engine.name == "fused" and run.measurement]
    assert by_size[80].split()[3] in [f"{rate:,.0f}" for rate in rates if rate]


def test_settings_that_a_smaller_card_would_change_are_not_called_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, _, *lines = table(capsys, "model=llama3_1b", "data=dense", "engines=fused", "gib=6,80", f"runs={tmp_path}")
    assert "predicted" in lines[0]
    assert "measured" in lines[1]
    peak = float(lines[0].split()[2])
    assert peak < 6


def test_a_base_that_eight_gpus_share_fits_where_none_has_room_for_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["model=llama3_8b", "data=dense", "train.samples_per_step=32", "engine.processes=8", "engines=fused,fused/sharded,hf", "gib=12"]
    head, _, replicated, sharded, unknown, *_ = table(capsys, *words, f"runs={tmp_path}")
    assert "32 a step of 8 GPUs, memory and tokens/s of one of them" in head
    assert "does not fit: needs at least" in replicated
    assert "predicted" in sharded
    assert float(sharded.split()[2]) < 11
    assert unknown == "not considered: hf: what it needs on 8 GPUs is not known"


def test_what_was_measured_is_preferred_to_what_is_only_predicted_to_be_as_fast(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["model=llama3_8b", "method=qlora", "data=dense", "gpu=H200", "engines=unsloth", "gib=80", f"runs={tmp_path}"]
    line = table(capsys, *words)[2]
    runs = [stored.record for stored in load(RESULTS).stored if stored.record.measurement and stored.record.cell.engine.name == "unsloth"]
    mine = [run for run in runs if run.cell.workload.method.name == "qlora" and run.cell.workload.model.name == "llama3_8b"]
    assert "measured, once" in line
    assert line.split()[3] in [f"{tokens_per_second(run.measurement.steps):,.0f}" for run in mine if run.measurement]


def test_of_two_settings_that_were_measured_the_faster_one_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """At 8B, 4 x 2,048 on an H100 Unsloth's CUDA graphs are 1 % slower than without them, which the model of time does not foresee."""
    words = [
        "model=llama3_8b",
        "data=dense",
        "data.sequence_length=2048",
        "train.samples_per_step=4",
        "gpu=H100",
        "engines=unsloth",
        "gib=80",
    ]
    line = table(capsys, *words, f"runs={tmp_path}")[2]
    assert "measured" in line
    assert "cuda_graphs=false" in line


def test_far_from_every_record_it_says_so_instead_of_a_deviation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["model=tiny_llama"], ["model=llama3_1b", "method=full"]):
        (line,) = table(capsys, *words, "data=dense", "engines=fused", "gib=48", f"runs={tmp_path}")[2:]
        assert "predicted, extrapolated" in line
        assert "±" not in line


def test_full_fine_tuning_is_known_by_its_optimizer_and_its_gradients(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """8B, 4 x 2,048: int8 was measured at 56.7 GiB, updated inside backward; docs/full-fine-tuning.md says by which command. With the norm
    limited it takes 83.8, or less where it offloads; float32 takes 131.2 and 158.3.
    """
    words = ["model=llama3_8b", "method=full", "data=dense", "engines=fused,fused/int8", f"runs={tmp_path}"]
    _, _, floats, ints, roomy, _ = table(capsys, *words, "train.max_grad_norm=null", "gib=80,140")
    assert "does not fit" in floats
    assert 100 < float(floats.split("at least ")[1].split()[0]) < 120
    assert float(ints.split()[2]) == pytest.approx(56.7, abs=1.0)
    assert float(ints.split()[3].replace(",", "")) == pytest.approx(11937, rel=0.1)
    assert float(roomy.split()[2]) == pytest.approx(131.2, abs=1.0)
    _, _, floats, ints, roomy, held = table(capsys, *words, "gib=80,170")
    assert "does not fit" in floats
    assert 60 < float(ints.split()[2]) < 76
    assert float(roomy.split()[2]) == pytest.approx(158.3, abs=1.5)
    assert float(held.split()[2]) == pytest.approx(83.8, abs=1.5)


def test_an_optimizer_whose_memory_nobody_knows_is_not_guessed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["model=llama3_8b", "method=full", "data=dense", "engines=hf,hf/liger+cudnn+compile+adamw8bit", "gib=80", f"runs={tmp_path}"]
    _, _, plain, *told = table(capsys, *words)
    assert plain.split()[1] == "hf"
    assert "not considered: hf/liger+cudnn+compile+adamw8bit: what its optimizer=adamw_8bit keeps of every weight is not known" in told


def test_what_was_measured_under_a_cap_or_within_a_budget_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A cap is the allocator's: the card has 1 GiB more. Within another budget it calibrates, and is not called measured."""
    words = ["data=dense", "gpu=H200", "method=qlora", f"runs={tmp_path}"]
    one = ["model=llama3_8b", "train.samples_per_step=1", "engines=fused", "gib=8,9,12,17"]
    _, _, less, eight, between, sixteen = table(capsys, *words, *one)
    assert less.split()[4] == "predicted"
    assert "±" in less
    assert between.split()[4] == "predicted", "with more memory than that run had, less is made again"
    assert 14179 < float(between.split()[3].replace(",", "")) <= 15752 * 1.02
    assert [" ".join(line.split()[3:6]) for line in (eight, sixteen)] == ["14,179 measured, once", "15,752 measured, once"]
    _, _, free, small = table(capsys, *words, "model=llama3_1b", "engines=fused,fused/within-2.31", "gib=5")
    assert "predicted ±" in free
    assert 74886 < float(free.split()[3].replace(",", "")) < 1.2 * 74886
    assert " ".join(small.split()[3:6]) == "74,886 measured, once"


def test_figures_are_those_of_reports_and_say_what_memory_they_mean(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As in the README: medians of 17,731, 17,714 and 17,721, beside which one run alone has 17,563; of 56,576 and 60,839."""
    words = ["data=dense", "train.samples_per_step=4", "gib=80", f"runs={tmp_path}"]
    _, head, line = table(capsys, *words, "model=llama3_8b", "gpu=H100", "engines=fused")
    assert "reserved GiB" in head
    assert " ".join(line.split()[2:8]) == "40.2 17,721 measured, median of 3"
    line = table(capsys, *words, "model=llama3_1b", "gpu=H200", "engines=axolotl")[2]
    assert " ".join(line.split()[3:8]) == "58,707 measured, median of 2"


def test_packages_that_only_this_machine_lacks_leave_nobody_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    missing = ("bitsandbytes", "liger_kernel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else there(name, *more))
    words = ["model=llama3_8b", "method=qlora", "data=dense", "gpu=H100", "engines=hf", "gib=24", f"runs={tmp_path}"]
    _, _, line, *notes = table(capsys, *words)
    assert line.split()[1] == "hf"
    assert "kernels=liger" in line
    assert "not installed here: hf: kernels=liger needs the package liger-kernel: pip install liger-kernel" in notes
    assert any(note.startswith("not installed here: hf: method=qlora in bfloat16 needs the package bitsandbytes") for note in notes)


def test_weights_of_other_architectures_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (line,) = table(capsys, "model=falcon_7b", "data=dense", "engines=hf", "gib=12", f"runs={tmp_path}")[2:]
    needs = float(line.split("at least ")[1].split()[0])
    assert 6_921_720_704 * 2 / 2**30 < needs < 16


def test_a_gpu_without_records_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    head, _, line = table(capsys, "model=llama3_1b", "gpu=abacus", "engines=fused", "gib=24", f"runs={tmp_path}")
    assert "no record of gpu='abacus', there are some of NVIDIA H100" in head
    assert line.split()[3] == "?"


def test_a_part_of_a_gpus_name_is_enough_where_it_is_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["model=llama3_8b", "data=dense", "data.sequence_length=2048", "engines=fused", "gib=80", f"runs={tmp_path}"]
    head, _, line = table(capsys, *words, "gpu=h100")
    assert "speed as on NVIDIA H100 80GB HBM3" in head
    assert "measured" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["model=llama3_1b", "data=dense", "gpu=nvidia"],
            "gpu=nvidia: that may be NVIDIA H100 80GB HBM3 or NVIDIA H200; say more of the name",
        ),
        (["gib=many"], "expected sizes of cards in GiB"),
        (["engine=hf"], "engine=hf: fit chooses engines and their knobs itself"),
        (["engine.knobs.micro_batch=4"], "engine.knobs.micro_batch=4: fit chooses"),
        (["gib=16,0"], "gib=16,0: expected sizes of cards in GiB"),
        (["engines=nobody"], "there is no engine 'nobody'"),
        (["engines=fussed"], "did you mean 'fused'?"),
        (["model=smollm2_135m", "data=dense"], "choose a model with model.config"),
    ],
)
def test_mistakes_are_answered(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err
