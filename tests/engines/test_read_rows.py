"""The top layer computes what is read of it: where few tokens are supervised, every gradient is still that of autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.native.bench import model_shape
from engines.native.buckets import shared_sizes
from engines.native.footprint import Load, MemoryModel, Ranks
from engines.native.host import Host
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL, KEEP_INPUT, Plan
from engines.native.read_rows import ReadRows
from harness.data.tokens import IGNORE, Sample, pack
from tests.engines import test_planner
from tests.engines.allocations import meta_decoder, transient_bytes
from tests.engines.test_fused import DEVICE, SUBSET, decoder, expect_gradients_of, gradients, packed
from tests.engines.tiny import FAMILIES, FULL, LONGEST, LORA, QLORA, decoded, make_job, plain_loss, plain_model


def few(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """The last quarter of each, at least one token, is supervised."""
    places = (np.arange(len(one)) >= min(len(one) - 1, 3 * len(one) // 4) for one in samples)
    return tuple(
        Sample(one.input_ids, np.where(there, one.input_ids, IGNORE).astype(np.int32)) for one, there in zip(samples, places, strict=True)
    )


@pytest.mark.parametrize("method", [LORA, SUBSET, QLORA, FULL], ids=["lora", "lora_subset", "qlora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_that_of_autograd(tmp_path: Path, family: str, method: dict[str, Any]) -> None:
    job = make_job(tmp_path, family, method)
    samples = few(job.tokens.step(job.workload.train, 0))
    num_labels = sum(sample.num_labels for sample in samples)
    model = plain_model(decoded(job) if method is QLORA else job)
    loss = plain_loss(model, samples)
    loss.backward()
    native = decoder(job, KEEP_ALL)
    row = packed(native, samples)
    assert ReadRows.supervised(row).chosen is not None
    losses = native.accumulate(row, torch.tensor(1.0 / num_labels))
    assert float(losses.sum()) / num_labels == pytest.approx(float(loss.detach()), rel=2e-6)
    expect_gradients_of(model, native)


PLANS = {
    "input": KEEP_INPUT,
    "without gate and up": Plan(KEEP_ALL.kept - {"gate_up"}),
    "in pieces": Plan(KEEP_ALL.kept - {"gate_up", "middle"}, pieces=3),
    "attention made again": Plan(KEEP_ALL.kept - {"attended", "heads"}),
    "on the host": Plan(frozenset({"input"}), offloaded=frozenset({"attended", "heads", "middle", "gate_up"})),
}


@pytest.mark.parametrize("name", PLANS)
def test_whatever_is_kept(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path)
    samples = few(job.tokens.step(job.workload.train, 0))
    found = []
    for plan in (KEEP_ALL, PLANS[name]):
        native = decoder(job, plan)
        native.accumulate(packed(native, samples), torch.tensor(0.1))
        found.append(gradients(native))
    kept, other = found
    for key, right in kept.items():
        torch.testing.assert_close(other[key], right, rtol=1e-5, atol=1e-7)


def test_rows_that_fill_up_have_no_gradient(tmp_path: Path) -> None:
    """They name the last token again and again."""
    job = make_job(tmp_path)
    batch = pack(few(job.tokens.step(job.workload.train, 0)))
    found = []
    for sizes in (None, shared_sizes(batch)):
        native = decoder(job, KEEP_ALL)
        row = Angles.of(native.shape, max(128, LONGEST), DEVICE).pack(batch, sizes)
        assert ReadRows.supervised(row).chosen is not None
        native.accumulate(row, torch.tensor(0.1))
        found.append((gradients(native), row))
    (plain, _), (more, filled) = found
    assert len(filled.rows) > len(filled.rows.unique())
    for key, right in plain.items():
        torch.testing.assert_close(more[key], right, rtol=1e-5, atol=1e-7)


def test_the_mlp_of_the_top_layer_alone_sees_fewer_rows(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    native = decoder(job, KEEP_ALL)
    samples = job.tokens.step(job.workload.train, 0)
    seen: list[int] = []
    swiglu = native.ops.swiglu
    noting = replace(
        native, ops=replace(native.ops, swiglu=lambda gate_up, linear: [seen.append(len(gate_up)), swiglu(gate_up, linear)][1])
    )
    row = packed(native, few(samples))
    noting.accumulate(row, torch.tensor(0.1))
    assert seen[: native.shape.num_layers] == [len(row.tokens)] * (native.shape.num_layers - 1) + [len(row.rows)]
    seen.clear()
    many = replace(row, rows=torch.arange(len(row.tokens) - 1), targets=row.tokens[1:])
    noting.accumulate(many, torch.tensor(0.1))
    assert set(seen) == {len(row.tokens)}, "choosing nearly all rows would copy for nothing"


@pytest.mark.parametrize("plan", test_planner.PLANS.values(), ids=test_planner.PLANS)
def test_the_memory_model_foretells_hardly_more_than_is_taken(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """It takes the top layer for a whole one (decision 0028); here half of the tokens are supervised, in 16 layers."""
    monkeypatch.setattr(Host, "_copy", lambda *_, **__: None)
    shape, load, padded = model_shape("llama3_1b", None), Load(8192, 2048, 4096, 2048), test_planner.PADDED
    model = MemoryModel(shape, Ranks(padded, padded, padded, padded), load, 0, 2)
    assert 0.99 <= model.peak([plan] * 16) / transient_bytes(meta_decoder(shape), load, [plan] * 16) <= 1.025


def test_spreading_is_the_transpose_of_choosing() -> None:
    rows = ReadRows(5, torch.tensor([1, 3]))
    x, dy = torch.randn(5, 2), torch.randn(2, 2)
    assert len(rows) == 2
    assert float((rows.of(x) * dy).sum()) == pytest.approx(float((x * rows.spread(dy)).sum()), rel=1e-5)
    everything = ReadRows(5)
    assert (len(everything), everything.of(x) is x, everything.spread(x) is x) == (5, True, True)
    for chosen in (rows, everything):
        assert chosen.spread(chosen.of(x), 3)[:, :2].equal(chosen.spread(chosen.of(x)))
        assert chosen.spread(chosen.of(x), 3).shape == (5, 5)
    assert rows.then(torch.tensor([1, 3])).chosen is None, "they have been chosen"
    assert everything.then(torch.tensor([1, 3])).of(x).equal(x[[1, 3]])
