"""The four tunes of docs/tune.md, as far as they go without a GPU: they compose, find candidates on an H100, and a first look that fits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.config import request
from harness.engine import Machine
from harness.interpreter import lack
from harness.tune.__main__ import asked
from harness.tune.__main__ import main as tune
from harness.tune.entrants import Layouts, candidates, entrants
from harness.tune.memory_model import LIKELY
from harness.tune.scale import capacity_bytes, scale_of
from harness.tune.search import Rules, Search
from harness.tune.show import needs
from tests.tune.spaces import GIB

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")
TUNES = re.findall(r"^python -m harness\.tune .*$", PAGE.split("## Four tunes")[1].split("```")[1], re.MULTILINE)


def test_there_are_four_of_at_most_eight_minutes() -> None:
    found = [asked(shlex.split(line)[3:]) for line in TUNES]
    assert [(next(word for word in one.overrides if word.startswith("model=")), one.budget_seconds) for one in found] == [
        ("model=llama3_1b", 480), ("model=llama3_8b", 480), ("model=llama3_8b", 480), ("model=llama3_8b", 480),
    ]  # fmt: skip
    caps = [[word.partition("=")[2] for word in one.overrides if "memory_cap_gib" in word] for one in found]
    assert caps == [[], [], ["24"], ["16"]]


def policy_of(line: str, cap: int | None = None) -> Search:
    """The search of a command on an H100, at its start."""
    words = asked(shlex.split(line)[3:])
    found = entrants([*words.overrides, "machine=cuda"], ["fused", "hf"])
    workload = request(found.first).cell.workload
    machine = Machine(
        device="cuda", name="NVIDIA H100 80GB HBM3", count=1, memory_gib=80, memory_cap_gib=cap or found.first.machine.memory_cap_gib
    )
    model = cast("dict[str, Any]", workload.model.config)
    space, _ = candidates(found, Layouts(workload, cast("Any", None)), machine, model)  # even samples: no token file is read
    return Search(space, scale_of(model, workload), capacity_bytes(machine), Rules(planned_steps=workload.train.num_steps))


@pytest.mark.parametrize("line", TUNES, ids=lambda line: line.partition("runs=runs/")[2])
def test_each_composes_and_begins_with_a_look_that_fits_by_prediction(line: str) -> None:
    policy = policy_of(line)
    able = {"fused"} if "qlora" in line and lack(None, ["bitsandbytes"]) else {"fused", "hf"}
    assert {one.engine for one in policy.space.candidates} == able
    view = policy.view([])
    assert view.next is not None, needs(view, policy.capacity_bytes)
    first, capacity = view.next.candidate, policy.capacity_bytes
    assert capacity is not None
    if first.facts.own_bytes is None:
        assert view.forecasts[first].memory.high(LIKELY) <= capacity
    else:
        assert first.facts.own_bytes <= capacity


def test_what_does_not_fit_is_answered_by_what_it_needs() -> None:
    policy = policy_of(TUNES[3], cap=4)
    view = policy.view([])
    assert view.next is None
    said = needs(view, policy.capacity_bytes)
    gib = float(re.findall(r"at least ([0-9.]+) GiB", said)[0])
    assert " are needed, by prediction, by " in said
    assert said.endswith("4.0 GiB are there")
    assert gib > 5, "NF4 weights of 8B alone are more"
    assert gib == pytest.approx(min(forecast.memory.middle for forecast in view.forecasts.values()) / GIB, abs=0.06)


def test_the_command_says_what_the_least_needs_and_ends_with_6(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Machine(device="cuda", name="NVIDIA H100 80GB HBM3", count=1, memory_gib=80, memory_cap_gib=4)
    monkeypatch.setattr("harness.tune.runner.detect", lambda *_, **__: card)
    monkeypatch.setattr("harness.tune.runner.prepare_workload", lambda *_: SimpleNamespace(tokens="", base=str(tmp_path)))
    monkeypatch.setattr("harness.tune.runner.TokenFile", SimpleNamespace(open=lambda _: None))  # even samples: it is not read
    words = [*shlex.split(TUNES[3])[3:], "machine=cuda", "engines=fused", "memory_gib=4", f"runs={tmp_path}"]
    assert tune([word for word in words if word != "memory_gib=16"]) == 6
    out = capsys.readouterr().out
    assert "nothing was found: nothing that it may try is left" in out
    assert re.search(r"at least [0-9.]+ GiB are needed, by prediction, by fused ", out)
    assert "4.0 GiB are there" in out
    assert "begins with paces from " in out
    assert not list((tmp_path / "tuned").rglob("*.yaml"))
