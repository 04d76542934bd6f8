"""The hardware key, from a fake NVML; a machine without a GPU says so instead of guessing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import machine
from harness.machine import arithmetic
from harness.store import load
from tests.fakes_nvml import nvml

RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_a_gpu_is_keyed_by_what_makes_figures_incomparable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(8))
    assert machine.has_cuda()
    assert machine.detect("cuda").key == "nvidia-h100-80gb-hbm3-x1-80gib-700w"
    assert machine.detect("cuda", count=8, memory_cap_gib=24).key == "nvidia-h100-80gb-hbm3-x8-80gib-700w-cap24gib"
    assert machine.driver_version() == "580.159.04"


@pytest.mark.parametrize("fake", [nvml(0), nvml(0, fails=True)], ids=["no device", "no driver"])
def test_no_gpu_is_said_not_guessed(monkeypatch: pytest.MonkeyPatch, fake: SimpleNamespace) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert not machine.has_cuda()
    with pytest.raises(LookupError, match="asked for 1 NVIDIA GPU"):
        machine.detect("cuda")


def test_this_cpu_has_a_key_that_is_a_folder_name() -> None:
    key = machine.detect("cpu").key
    assert key == key.lower()
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert machine.detect("cpu", memory_cap_gib=4).key == f"{key}-cap4gib"


def test_hosts_are_told_apart_without_being_named() -> None:
    import platform

    assert machine.host_id() == machine.host_id()
    assert platform.node() not in machine.host_id()


def test_cards_of_one_chip_compute_the_same_first_loss() -> None:
    """Of all that was measured on several of them with the same code, to the bit: what lets one vouch for the other."""
    found: dict[tuple[str, ...], dict[str, set[float]]] = {}
    for stored in load(RESULTS).stored:
        record = stored.record
        if record.measurement is not None and record.measurement.steps.losses:
            code = (arithmetic(record.machine), record.cell.workload.key, record.cell.engine.key, record.provenance.engine_fingerprint)
            found.setdefault(code, {}).setdefault(record.machine.name, set()).add(record.measurement.steps.losses[0])
    compared = [by_card for by_card in found.values() if len(by_card) > 1]
    assert compared
    assert all(len(set.union(*by_card.values())) == 1 for by_card in compared), compared
