"""Which runs speak for a setting: as reports count them; runs on another card or within another budget are told apart."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config, single
from harness.record import Record
from harness.report.__main__ import main as report
from harness.store import load
from harness.tune.learnt import Learnt, learnt
from harness.tune.lessons import usable

RESULTS = Path(__file__).resolve().parents[2] / "results"
ENGINES = ("fused", "hf", "unsloth", "axolotl", "fsdp", "deepspeed")


@functools.cache
def committed() -> tuple[Record, ...]:
    return tuple(stored.record for stored in load(RESULTS).stored)


def configs(*words: str) -> dict[str, Config]:
    return {name: single([f"engine={name}", "machine=cuda", *words]) for name in ENGINES}


def known(gpu: str, **given: Any) -> list[Learnt]:
    found = usable(committed(), gpu)
    assert found is not None
    return learnt(configs(), found.records, **given)


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_rates_and_memory_are_those_of_reports(gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting that was measured: the same median over the same repeats, and what was reserved."""
    assert report([str(RESULTS), "--out", str(tmp_path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = known(gpu)
    assert len(found) >= 20
    for one in found:
        run = one.record
        beside = [row for row in rows if (row["machine"], row["workload"]) == (run.machine.key, run.cell.workload.key)]
        rates = [row for row in beside if row["tokens_per_second"] == pytest.approx(one.tokens_per_second, rel=1e-9)]
        assert rates, f"{one.candidate.title}, {one.candidate.work}: {one.tokens_per_second}, {len(one.runs)} runs"
        assert any(
            len(row["repeats"]) == len(one.runs) and row["peak_reserved_gib"] == pytest.approx((one.peak_bytes or 0.0) / 2**30)
            for row in rates
        )


def test_another_cap_is_another_setting_and_a_budget_is_learnt_only_where_it_is_foretold() -> None:
    capped = [one for one in known("H200") if "cap" in one.candidate.setting]
    assert len(capped) == 2
    assert {one.candidate.values["micro_batch"] for one in capped} == {1}, "four of one sample are one"
    smaller, larger = sorted(capped, key=lambda one: one.tokens_per_second or 0.0)
    assert smaller.candidate.facts.own_seconds > 1.05 * larger.candidate.facts.own_seconds
    assert not [one for one in known("H200") if "memory_gib" in one.candidate.setting]
    within = [one for one in known("H200", planned=True) if "memory_gib=2.31" in one.candidate.setting]
    assert [round(one.tokens_per_second or 0.0) for one in within] == [74886]
    assert not within[0].same


def test_a_variant_learns_from_the_runs_of_its_engine() -> None:
    records = usable(committed(), "H200")
    assert records is not None
    name = "fused/within-2.31"
    mine = {name: single([f"engine={name}", "machine=cuda", "model=llama3_1b", "method=qlora", "data=dense"])}
    found = [one for one in learnt(mine, records.records, planned=True) if one.same]
    assert [(one.candidate.engine, round(one.tokens_per_second or 0.0)) for one in found] == [(name, 74886)]


def test_other_adapters_are_another_setting() -> None:
    records = usable(committed(), "H100")
    assert records is not None
    for words, same in (((), True), (("method.rank=64",), False)):
        found = learnt({"fused": single(["engine=fused", "machine=cuda", "model=llama3_8b", *words])}, records.records)
        assert any(one.same for one in found) is same
