"""The hardware key, from a fake NVML; a machine without a GPU says so instead of guessing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from harness import machine
from tests.fakes_nvml import nvml


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
