"""Compilations are counted where they happen, beside whoever else listens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.knobs

from harness.compiles import CompileCounter


def test_graphs_count_once_each_and_a_new_shape_of_code_again() -> None:
    counter = CompileCounter()
    before = counter.count
    twice: Any = torch.compile(lambda x: x * 2, backend="eager")
    for _ in range(3):
        twice(torch.ones(3))
    assert counter.count == before + 1
    twice(torch.ones(3, dtype=torch.int32))
    assert counter.count == before + 2


def test_triton_kernels_count_and_an_earlier_listener_still_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: heard.append(told))
    counter = CompileCounter()
    before = counter.count
    triton.knobs.compilation.listener(src=None, cache_hit=True)
    assert counter.count == before + 1
    assert heard == [{"src": None, "cache_hit": True}]
