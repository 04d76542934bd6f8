"""What runs, in which order, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import Request
from harness.launch import run_cell, unsupported
from harness.machine import detect
from harness.plan import least_memory_bytes, num_parameters, plan, weights_bytes
from harness.record import Record
from harness.spec import QLora
from tests import records, workloads
from tests.workloads import Made

HERE = detect("cpu")


def recorded(made: Made, root: Path, **knobs: object) -> tuple[Request, Record]:
    request = workloads.request(made.workload, **knobs)
    return request, run_cell(request, HERE, made.prepared, root, lambda event: None)


def test_blocks_are_interleaved_and_reversed() -> None:
    work = workloads.workload()
    fast = [workloads.request(work, repeat=repeat) for repeat in range(3)]
    slow = [workloads.request(work, repeat=repeat, step_seconds=1.0) for repeat in range(3)]
    order = plan([*fast, *slow], [], "stale")
    assert [(cell.request.cell.repeat, cell.request.cell.engine.knobs["step_seconds"]) for cell in order] == [
        (0, 0.0), (0, 1.0), (1, 1.0), (1, 0.0), (2, 0.0), (2, 1.0),
    ]  # fmt: skip


def test_the_same_cell_twice_is_one_cell() -> None:
    request = workloads.request(workloads.workload())
    assert len(plan([request, request], [], "stale")) == 1


def test_a_cell_under_two_caps_is_two_cells() -> None:
    request = workloads.request(workloads.workload())
    machines = (request.machine.model_copy(update={"memory_cap_gib": cap}) for cap in (8, 16))
    capped = [request.model_copy(update={"machine": machine}) for machine in machines]
    found = plan([*capped, request], [], "stale")
    assert [cell.request.machine.memory_cap_gib for cell in found] == [8, 16, None]
    assert [cell.action for cell in found] == ["unsupported", "unsupported", "run"], "this is a CPU, which has no allocator to cap"
    assert found[0].reason == "machine.memory_cap_gib caps the allocator of a GPU; on a CPU set it to null"


def test_a_recorded_cell_is_done_unless_asked_again(prepared: Made, tmp_path: Path) -> None:
    request, record = recorded(prepared, tmp_path)
    for rerun, action in (("missing", "done"), ("stale", "done"), ("all", "run")):
        (cell,) = plan([request], [record], rerun)  # type: ignore[arg-type]
        assert cell.action == action


def test_a_stale_record_is_run_again_only_under_stale(prepared: Made, tmp_path: Path) -> None:
    request, record = recorded(prepared, tmp_path)
    old = record.model_copy(update={"provenance": record.provenance.model_copy(update={"engine_fingerprint": "other"})})
    assert plan([request], [old], "missing")[0].action == "done"
    assert plan([request], [old], "stale")[0].action == "run"


def test_an_engine_is_read_once_a_plan_and_again_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("harness.plan.engine_fingerprint", lambda module, python, packages: read.append(module) or "f" * 12)
    work = workloads.workload()
    both = [workloads.request(work, engine=name, repeat=repeat) for name in ("faulty", "trivial") for repeat in range(5)]
    both = [one if one.cell.engine.name == "faulty" else with_knobs(one, {"micro_batch": 2}) for one in both]
    known = [records.record(one.cell.engine, work=work, machine=HERE, repeat=one.cell.repeat) for one in both]
    for plans in (1, 2):
        assert {cell.action for cell in plan(both, known, "stale")} == {"done"}
        assert sorted(read) == ["tests.fakes.faulty"] * plans + ["tests.fakes.trivial"] * plans


def with_knobs(request: Request, knobs: dict[str, Any]) -> Request:
    engine = request.cell.engine.model_copy(update={"knobs": knobs})
    return request.model_copy(update={"cell": request.cell.model_copy(update={"engine": engine})})


@pytest.mark.parametrize(("behaviour", "action"), [("raise", "run"), ("oom", "done")])
def test_accidents_are_tried_again_and_answers_are_not(prepared: Made, tmp_path: Path, behaviour: str, action: str) -> None:
    request, record = recorded(prepared, tmp_path, behaviour=behaviour)
    assert plan([request], [record], "missing")[0].action == action


def test_another_machine_has_not_run_it(prepared: Made, tmp_path: Path) -> None:
    request = workloads.request(prepared.workload)
    elsewhere = run_cell(request, workloads.MACHINE, prepared.prepared, tmp_path, lambda event: None)
    assert plan([request], [elsewhere], "missing")[0].action == "run"


def test_an_impossible_cell_gets_its_reason_before_any_process_starts() -> None:
    (cell,) = plan([workloads.request(workloads.workload(), behaviour="unsupported")], [], "stale")
    assert (cell.action, cell.reason) == ("unsupported", "this fake cannot do that")


def test_a_gpu_that_is_not_there_is_a_reason() -> None:
    request = workloads.request(workloads.workload())
    many = request.cell.engine.model_copy(update={"processes": 99})
    cuda = request.machine.model_copy(update={"device": "cuda"})
    absent = request.model_copy(update={"machine": cuda, "cell": request.cell.model_copy(update={"engine": many})})
    (cell,) = plan([absent], [], "stale")
    assert cell.action == "unsupported"
    assert "99 NVIDIA GPU(s)" in str(cell.reason)
    assert "set engine.processes to what is there, or choose machine=cpu" in str(cell.reason)


def test_time_is_predicted_from_an_earlier_record(prepared: Made, tmp_path: Path) -> None:
    request, record = recorded(prepared, tmp_path, step_seconds=0.05)
    assert plan([request], [], "all")[0].seconds is None
    predicted = plan([request], [record], "all")[0].seconds
    assert predicted == pytest.approx(record.provenance.wall_seconds, rel=0.05)


def test_parameters_of_the_public_shapes() -> None:
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert num_parameters({**llama, "vocab_size": 128256, "tie_word_embeddings": False}) == 8_030_261_248
    assert num_parameters({"model_type": "mamba", "hidden_size": 8}) is None


def test_unsupported_records_carry_no_measurement() -> None:
    record = unsupported(workloads.request(workloads.workload()), workloads.MACHINE, "no")
    assert (record.status, record.measurement) == ("unsupported", None)


def test_the_weights_of_qlora_are_stored_twice_and_held_packed() -> None:
    """16,384 values of linear layers; 8,192 of the embedding and the head, and 192 of norms, in float32."""
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 0, "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }  # fmt: skip
    plain = workloads.workload()
    model = plain.model.model_copy(update={"config": config})
    method = QLora(name="qlora", rank=2, alpha=4.0, targets=("q_proj",))
    asked = workloads.request(plain.model_copy(update={"model": model, "method": method}))
    packed = 16384 // 2 + 256 + 4
    assert least_memory_bytes(asked) == packed + 4 * (8192 + 192)
    assert weights_bytes(asked) == 4 * (16384 + 8192 + 192) + packed + 4 * (8192 + 192)
