"""Several processes in the report: tokens/s of each, against which record, and who keeps the others waiting."""

from __future__ import annotations

from typing import Any

import pytest

from harness.record import RankSteps, Record
from harness.report import markdown, rows, table
from harness.store import Results
from tests import records


def several(rate: float, processes: int = 2, *, exchanging: bool = False, **changed: Any) -> Record:
    """Rank 1 waits for nobody, the others for it."""
    one = records.record(records.engine("fsdp", processes=processes), rate=rate, **changed)
    assert one.measurement is not None
    seconds = one.measurement.steps.seconds
    ranks = tuple(
        RankSteps(
            rank=rank,
            seconds=seconds,
            waiting_seconds=tuple(0.0 if rank == 1 else 0.25 * value for value in seconds),
            exchanging_seconds=tuple(0.125 * value for value in seconds) if exchanging else None,
        )
        for rank in range(processes)
    )
    measured = one.measurement.model_copy(
        update={"ranks": ranks, "memory": tuple(m.model_copy(update={"rank": r}) for r in range(2) for m in one.measurement.memory)}
    )
    return one.model_copy(update={"measurement": measured})


def together(*found: Record) -> Results:
    return records.results([records.stored(one) for one in found])


def row(found: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    (one,) = [one for one in found if one["processes"] == processes]
    return one


def test_two_processes_are_measured_against_one_on_the_same_steps() -> None:
    results = together(records.record(records.engine("fsdp"), rate=1000.0), several(1800.0))
    found = row(rows(results), 2)
    assert found["tokens_per_second_per_process"] == pytest.approx(900.0)
    assert found["scaling_efficiency"] == pytest.approx(0.9)
    assert found["scaling_against"].startswith("the same steps in one process: ")
    assert [(one["rank"], one["peak_gib"]) for one in found["ranks"]] == [(0, 1.5), (1, 1.5)]
    assert found["ranks"][0]["busy_seconds"] == pytest.approx(0.75 * found["ranks"][1]["busy_seconds"])
    assert row(rows(results), 1)["scaling_efficiency"] is None
    shown = table(results)
    assert "900.0 tokens/s a process; 90.0 % of the same steps in one process" in shown
    assert "rank 1 is busy" in shown
    assert "### Several processes" in markdown(results)


def test_what_ranks_spend_in_exchanges_is_a_share_of_their_steps() -> None:
    silent, telling = together(several(1800.0)), together(several(1800.0, exchanging=True))
    (found,) = rows(telling)
    assert [(one["waiting_share"], one["exchanging_share"]) for one in found["ranks"]] == [(0.25, 0.125), (0.0, 0.125)]
    assert [one["exchanging_share"] for one in rows(silent)[0]["ranks"]] == [None, None]
    assert "of a step in exchanges by rank" in markdown(telling)
    assert "0: 12.5 %, 1: 12.5 %" in markdown(telling)
    assert "in exchanges" not in markdown(silent)
    assert "0: 25.0 %, 1: 0.0 %" in markdown(silent)


def test_on_gpus_one_process_is_another_machine_and_may_have_a_share_of_the_samples() -> None:
    eight = records.GPU.model_copy(update={"count": 8})
    alone = records.record(records.engine("fsdp"), rate=1000.0, machine=records.GPU, work=records.workload(samples_per_step=2))
    results = together(alone, several(7600.0, 8, machine=eight))
    found = row(rows(results), 8)
    assert found["scaling_efficiency"] == pytest.approx(0.95)
    assert found["scaling_against"].startswith("a share of the samples in one process: ")
    assert "950.0 tokens/s a GPU" in table(results)


@pytest.mark.parametrize(
    "other",
    [
        records.record(records.engine("fsdp", micro_batch=2), rate=1000.0),
        records.record(records.engine("hf"), rate=1000.0),
        records.record(records.engine("fsdp"), rate=1000.0, work=records.workload(samples_per_step=4)),
        records.record(records.engine("fsdp"), machine=records.GPU, rate=1000.0),
        records.record(records.engine("fsdp"), status="oom", reason="no"),
    ],
    ids=["other knobs", "another engine", "other samples", "another machine", "failed"],
)
def test_without_its_like_in_one_process_there_is_no_efficiency(other: Record) -> None:
    found = row([one for one in rows(together(other, several(1800.0))) if one["engine"] == "fsdp" and one["processes"] == 2], 2)
    assert found["tokens_per_second_per_process"] == pytest.approx(900.0)
    assert found["scaling_efficiency"] is None
    assert found["scaling_against"] is None
