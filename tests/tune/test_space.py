"""What may be tried, and which candidates surely need more memory than others."""

from __future__ import annotations

from typing import Any, cast

import pytest

from harness.config import request
from harness.engine import Machine
from harness.errors import ConfigError
from harness.searched import Searched
from harness.spec import parse
from harness.tune.entrants import Layouts, candidates, entrants
from harness.tune.space import Candidate
from tests.tune.spaces import space

TOY = ("model=tiny_llama", "data=dense", "data.sequence_length=32", "data.num_samples=8", "train.steps=6", "train.warmup_steps=1")


def find(engine: str, **values: object) -> Candidate:
    (one,) = [one for one in space([engine]).candidates if values.items() <= one.values.items()]
    return one


HF = {"layout": "padded", "attention": "sdpa", "kernels": "none", "compile": False}


@pytest.mark.parametrize(
    ("more", "less", "sure"),
    [
        ({"micro_batch": 4, "recompute": "none"}, {"micro_batch": 2, "recompute": "none"}, True),
        ({"micro_batch": 2, "recompute": "none"}, {"micro_batch": 2, "recompute": "full"}, True),
        ({"micro_batch": 2, "recompute": "none"}, {"micro_batch": 4, "recompute": "full"}, False),  # more of one, less of the other
        ({"micro_batch": 4, "recompute": "none", "kernels": "none"}, {"micro_batch": 4, "recompute": "none", "kernels": "liger"}, True),
        ({"micro_batch": 4, "recompute": "none", "attention": "cudnn"}, {"micro_batch": 4, "recompute": "none"}, False),  # nobody knows
        ({"micro_batch": 4, "recompute": "none"}, {"micro_batch": 4, "recompute": "none"}, True),
    ],
)
def test_what_surely_needs_as_much(more: dict[str, object], less: dict[str, object], sure: bool) -> None:
    one, other = find("hf", **{**HF, **more}), find("hf", **{**HF, **less})
    assert space(["hf"]).needs_at_least(one, other) is sure


def test_what_fills_memory_needs_as_much_only_as_itself_with_fewer_tokens() -> None:
    whole = space(["fused"])
    fit, full = find("fused", micro_batch=4, recompute="fit"), find("fused", micro_batch=4, recompute="full")
    assert whole.fills_memory(fit)
    assert not whole.fills_memory(full)
    assert whole.needs_at_least(find("fused", micro_batch=8, recompute="fit"), fit)
    assert not whole.needs_at_least(fit, full)
    assert whole.needs_at_least(full, fit)  # where not even making do was enough


def test_engines_say_nothing_of_each_other() -> None:
    whole = space()
    fused = next(one for one in whole.candidates if one.engine == "fused")
    assert not any(whole.needs_at_least(one, fused) for one in whole.candidates if one.engine != "fused")


def test_short_forms_of_the_yaml() -> None:
    alone = parse(Searched, {"values": [1, 2], "logits": 0.03})
    assert [alone.factor("logits", value) for value in (1, 2)] == [0.03, 0.03]
    some = parse(Searched, {"values": ["a", "b", "c"], "seconds": [1.0, 2.0, 3.0]}).among(["c", "new"])
    assert (some.values, some.seconds) == (("c", "new"), (3.0, 1.0))
    with pytest.raises(ConfigError, match="seconds has 1 numbers for 2 values"):
        parse(Searched, {"values": [1, 2], "seconds": [1.0]})


@pytest.mark.parametrize(
    ("device", "cores", "samples", "tried"),
    [("cpu", 2, 4, [1, 2]), ("cpu", 16, 4, [1, 2, 4]), ("cpu", 16, 3, [1, 2]), ("cpu", 1, 4, [1]), ("cuda", 1, 4, [1])],
)
def test_processes_share_the_cores_of_a_cpu_and_never_change_a_step(device: str, cores: int, samples: int, tried: list[int]) -> None:
    found = entrants([*TOY, f"machine={device}", f"train.samples_per_step={samples}"], ["fsdp"])
    workload = request(found.first).cell.workload
    machine = Machine(device=cast("Any", device), name="any", count=cores, memory_gib=24)
    whole, unable = candidates(found, Layouts(workload, cast("Any", None)), machine, cast("dict[str, Any]", workload.model.config))
    assert not unable
    assert sorted({one.processes for one in whole.candidates}) == tried
    for one in whole.candidates:
        cell = found.request(one, steps=2, repeat=0).cell
        assert one.processes * one.knobs["micro_batch"] < samples + one.processes, "no process holds more than its part"
        assert cell.engine.processes == one.processes
        assert set(cell.engine.knobs) == set(found.first.engine.knobs)
        assert cell.workload == workload.model_copy(update={"train": workload.train.model_copy(update={"stop_after": 2})})
