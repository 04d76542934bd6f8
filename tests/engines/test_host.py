"""What leaves for the host comes back bit by bit, and nothing may read or free it before its copy is over."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engines.native.host
from engines.native.host import Host
from engines.native.ops import Attended, Heads, Input
from engines.native.plan import KEEP_ALL, MOVABLE, Plan
from tests.engines.test_fused import decoder, gradients, packed
from tests.engines.tiny import make_job


def test_views_come_back_as_views_of_one_buffer() -> None:
    qkv = torch.randn(64, 40).bfloat16()
    heads = Heads(*(part.view(64, -1, 4) for part in qkv.split([24, 8, 8], dim=1)))
    wide, seed = torch.randn(64, 12), torch.tensor([7, 8])
    attended = Attended(Input(wide, wide[:, 8:]), (torch.randn(3, 100), seed))
    host = Host(slab_bytes=1024)
    stored = host.store({"heads": heads, "attended": attended, "qkv": qkv, "nothing": None})
    host.settle()
    found = host.fetch(stored).taken()
    for name in ("queries", "keys", "values"):
        mine, theirs = getattr(found["heads"], name), getattr(heads, name)
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
        assert mine.untyped_storage().data_ptr() == found["qkv"].untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
    assert torch.equal(found["attended"].input.low, wide[:, 8:])
    assert torch.equal(found["attended"].statistics[0], attended.statistics[0])
    assert found["attended"].statistics[1] is seed, "what is tiny stays where it is"
    assert found["nothing"] is None
    assert host.num_bytes == 10 * 1024  # 5,120 + 3,072 + 1,200 bytes


def test_what_leaves_is_held_until_its_copy_is_over() -> None:
    host = Host()
    tensor = torch.ones(1000)
    storage = weakref.ref(tensor.untyped_storage())
    host.store({"tensor": tensor})
    del tensor
    assert storage() is not None
    host.settle()
    assert storage() is None


def test_a_new_pass_uses_the_same_memory() -> None:
    host = Host(slab_bytes=4096)
    for _ in range(3):
        host.begin()
        stored = [host.store({"x": torch.full((700,), float(value))}) for value in range(4)]
        assert [float(host.fetch(each).taken()["x"].sum()) for each in stored] == [0, 700, 1400, 2100]
    assert host.num_bytes == 3 * 4096


class LateCopies:
    """Streams at their worst: a copy is made at the last moment, when somebody waits for it, and until then its place holds no number."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.num_waited = 0

    def copy(self, pairs: list[tuple[Tensor, Tensor]], device: torch.device, *, outward: bool) -> Any:
        for into, _ in pairs:
            into.fill_(255)

        def make() -> None:
            for into, source in pairs:
                into.copy_(source)

        self.waiting.append(make)
        return make

    def wait(self, event: Any) -> None:
        assert event in self.waiting, "waited for twice: what was copied first is gone by then"
        self.waiting.remove(event)
        self.num_waited += 1
        event()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(KEEP_ALL.kept - MOVABLE, MOVABLE),
        Plan(frozenset(("inverse", "low_down")), frozenset(("input", "heads", "qkv", "attended"))),
        Plan(frozenset(("low_qkv", "attended")), frozenset(("input", "middle"))),
    ],
    ids=["all", "attention", "ends"],
)
def test_nothing_is_read_before_it_is_there_nor_written_before_it_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, plan: Plan
) -> None:
    job = make_job(tmp_path, family)
    samples = job.tokens.step(job.workload.train, 0)
    kept = decoder(job, KEEP_ALL)
    expected = kept.accumulate(packed(kept, samples), torch.tensor(0.125))
    late = LateCopies()
    monkeypatch.setattr(Host, "_copy", lambda self, pairs, device, *, outward: late.copy(pairs, device, outward=outward))
    monkeypatch.setattr(engines.native.host, "_wait", late.wait)
    native = decoder(job, plan)
    assert torch.equal(native.accumulate(packed(native, samples), torch.tensor(0.125)), expected)
    assert all(torch.equal(found, gradients(kept)[name]) for name, found in gradients(native).items())
    assert late.num_waited >= 4
    assert not late.waiting, "a copy that nobody waited for: a captured stream would not be joined"
