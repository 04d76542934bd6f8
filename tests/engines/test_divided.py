"""A frozen base divided among ranks: the bits of the whole one, a part of its bytes, and gathers in one order whatever the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import engines.fused
from engines.native.checkpoint import load_weights, read_config
from engines.native.decoder import Decoder
from engines.native.divided import Division, Gathered
from engines.native.loader import Placement
from engines.native.lora import read_adapter
from engines.native.nf4 import Decoded
from engines.native.ops import Ops
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL, Names, Plan
from engines.native.ranks import least
from engines.native.reference import REFERENCE
from engines.native.shape import read_shape
from engines.native.shares import IDLE
from engines.native.turns import Wait
from engines.native.weights import Linear
from harness.config import single
from harness.data.tokens import IGNORE, Batch, pack
from harness.engine import Checkpoints, Job, Machine, variant
from harness.errors import UnsupportedError, WeightsError
from harness.spec import parse
from tests.engines.conformance import SAME
from tests.engines.ranks import Ranks, started
from tests.engines.test_fsdp import trained
from tests.engines.test_fused import DEVICE, KNOBS, PLACE, decoder, packed
from tests.engines.tiny import CPU, FULL, GPU, LLAMA, LONGEST, LORA, QLORA, RecordingProbe, make_job, make_workload, with_train
from tests.fakes import agreeing

SHARDED = {**KNOBS, "base": "sharded"}
FEW = ("v_proj", "down_proj", "q_proj")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with started(engines.fused) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("family", "method", "knobs"),
    [
        ("llama", LORA, {"micro_batch": 1}),  # five samples: one rank computes a batch without a label
        ("llama_biases", {**LORA, "targets": FEW}, {"recompute": "full"}),
        ("qwen3", QLORA, {"micro_batch": 1}),
        ("llama", {**QLORA, "targets": FEW}, {"recompute": "fit", "memory_gib": 0.0011}),
    ],
    ids=["lora", "few-biases-recomputed", "qlora", "qlora-few-planned"],
)
def test_two_ranks_make_the_bits_of_replicas(
    two: Ranks, tmp_path: Path, family: str, method: dict[str, Any], knobs: dict[str, Any]
) -> None:
    """Losses, norms, tokens and the saved adapter; and the steps of one process."""
    job = make_job(tmp_path, family, method)
    whole, ours = trained(two, {**KNOBS, **knobs}, job), trained(two, {**SHARDED, **knobs}, with_train(job, "ours"))
    assert (ours.losses, ours.grad_norms) == (whole.losses, whole.grad_norms)
    assert [replace(one, processed=0) for one in ours.tokens] == [replace(one, processed=0) for one in whole.tokens]
    assert ours.chosen["plan"] == whole.chosen["plan"]
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "ours", job.out))
    assert all(saved[name].equal(value) for name, value in expected.items())
    one = trained(engines.fused, KNOBS, with_train(job, "one"))
    assert ours.losses == pytest.approx(one.losses, rel=SAME)


def test_the_rest_of_a_run_is_that_of_the_whole(two: Ranks, tmp_path: Path) -> None:
    job, places = make_job(tmp_path), Checkpoints(folder=tmp_path / "checkpoints", every=2)
    whole = trained(two, SHARDED, replace(job, checkpoints=places))
    rest = trained(two, SHARDED, replace(with_train(job, "rest"), checkpoints=replace(places, made=2)))
    assert (rest.losses, rest.grad_norms) == (whole.losses[2:], whole.grad_norms[2:])


@pytest.mark.parametrize(
    ("method", "knobs", "machine", "said"),
    [
        (FULL, {}, CPU, "base=sharded divides weights that stay as they are, method=full trains them"),
        ({**LORA, "name": "lora_fp8"}, {}, CPU, "base=sharded does not divide a base in 8 bits yet"),
        (LORA, {}, GPU, "base=sharded divides the base among processes, there is one"),
        (LORA, {"replay": True}, GPU.model_copy(update={"count": 2}), "set replay=false"),
        (QLORA, {}, GPU.model_copy(update={"count": 2}), None),
        (LORA, {}, CPU, None),
    ],
)
def test_says_what_it_does_not_do(method: dict[str, Any], knobs: dict[str, Any], machine: Machine, said: str | None) -> None:
    found = engines.fused.unsupported(make_workload(LLAMA, method), parse(engines.fused.Knobs, {**SHARDED, **knobs}), machine)
    assert found is None if said is None else said in str(found)


def test_ranks_plan_with_what_the_poorest_has(tmp_path: Path) -> None:
    probe = RecordingProbe()
    with started(agreeing) as ranks:
        ranks.train(make_job(tmp_path), None, probe)
    assert probe.losses == [0.5]
    assert least(7.0) == 7.0, "one process has no group"


def test_one_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"set engine\.processes or base=replicated"):
        trained(engines.fused, SHARDED, make_job(tmp_path))


def test_its_name_is_an_option() -> None:
    found = single(["engine=fused/sharded", "engine.processes=2", "machine=cuda", "model=llama3_8b"]).engine.knobs
    assert (found["base"], found["replay"]) == ("sharded", False)
    assert [variant(engines.fused, {**KNOBS, "base": base}) for base in ("sharded", "replicated")] == ["sharded", None]


@dataclass
class Everyone:
    """All ranks of a division in one process, ``place`` and ``ops`` as each one's; ``gathers``: which parts, in the order of launches."""

    count: int
    place: Placement = PLACE
    ops: Ops = REFERENCE
    loaded: list[list[Gathered]] = field(default_factory=list)
    gathers: list[int] = field(default_factory=list)

    def load(self, job: Job, plan: Plan) -> list[Decoder]:
        decoders = [self._decoder(job, plan, rank) for rank in range(self.count)]
        self.loaded = [list(gathered(one)) for one in decoders]
        return decoders

    def _decoder(self, job: Job, plan: Plan, rank: int) -> Decoder:
        assert job.adapter_init is not None
        shape = read_shape(read_config(job.base), LONGEST)
        placement = replace(self.place, division=Division(rank, self.count, self.gather))
        weights = load_weights(job.base, shape, placement, read_adapter(job.adapter_init))
        return Decoder(shape=shape, weights=weights, ops=self.ops, plans=(plan,) * shape.num_layers, loss_chunk=5)

    def gather(self, part: Tensor, whole: Tensor) -> None:
        (place,) = {index for one in self.loaded for index, source in enumerate(one) if source.part is part}
        self.gathers.append(place)
        whole.copy_(torch.cat([one[place].part for one in self.loaded]))


def gathered(native: Decoder) -> Iterator[Gathered]:
    for layer in native.weights.layers:
        for group in layer.groups:
            assert group.turn is not None
            yield from (source for source in group.turn.sources if isinstance(source, Gathered))


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_holds_its_part_and_computes_what_all_hold(tmp_path: Path, method: dict[str, Any], count: int) -> None:
    """Three do not divide the rows evenly: their last part is filled up."""
    job = make_job(tmp_path, method=method)
    whole, (*_, last) = decoder(job, KEEP_ALL), Everyone(count).load(job, KEEP_ALL)
    batch = job.tokens.step(job.workload.train, 0)
    assert last.accumulate(packed(last, batch), torch.tensor(1.0)).equal(whole.accumulate(packed(whole, batch), torch.tensor(1.0)))
    assert last.weights.arena.gradients.equal(whole.weights.arena.gradients)
    groups = [group for layer in whole.weights.layers for group in layer.groups]
    for source, group in zip(gathered(last), groups, strict=True):
        most = 4 * group.buffer.shape[1] if method is LORA else 16 * 9  # a row, or what bytes are aligned to, of three weights
        assert base_bytes(group) <= count * source.part.untyped_storage().nbytes() <= base_bytes(group) + count * most


def base_bytes(group: Linear) -> int:
    """Of the group where one rank has all of it: rows as products read them, or packed."""
    if group.turn is None:
        return 4 * group.num_outputs * group.buffer.shape[1]
    packed = [source.weight for source in group.turn.sources if isinstance(source, Decoded)]
    return sum(weight.packed.nbytes + weight.absmax.nbytes + weight.nested_absmax.nbytes for weight in packed)


def test_a_weight_of_another_size_is_named(tmp_path: Path) -> None:
    job, name = make_job(tmp_path), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(job.base / "model.safetensors")
    save_file({**tensors, name: tensors[name][:-1].clone()}, job.base / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{name}: has shape \[71, 32\], config.json says \[72, 32\]"):
        Everyone(2).load(job, KEEP_ALL)


def at_once(started: list[int]) -> Callable[[Callable[[], None]], Wait]:
    """Fills a buffer as early as it may be: what its last holder is still needed for would have to be gathered once more."""

    def start(work: Callable[[], None]) -> Wait:
        started.append(1)
        work()
        return lambda: None

    return start


UNITS: tuple[Names, ...] = (frozenset(("heads", "qkv")), frozenset(("attended",)), frozenset(("middle",)), frozenset(("gate_up",)))
PLANS = [
    Plan(KEEP_ALL.kept - frozenset().union(*(unit for unit, dropped in zip(UNITS, drop, strict=True) if dropped)), pieces=3)
    for drop in product((False, True), repeat=len(UNITS))
]


def test_ranks_gather_in_one_order_whatever_their_batches(tmp_path: Path) -> None:
    """Batches of fewer rows than pieces take fewer turns, and what is known of the order comes from passes of all kinds; else ranks would
    meet over different weights. Nor does gathering ahead ever gather twice.
    """
    job, everyone = make_job(tmp_path), Everyone(1)
    (native,) = everyone.load(job, KEEP_ALL)
    long = pack(job.tokens.step(job.workload.train, 0))
    single = Batch(np.zeros((1, 1), np.int64), np.full((1, 1), IGNORE, np.int64), ((1,),))
    for plan in PLANS:
        planned = replace(native, plans=(plan,) * native.shape.num_layers)
        natural = gathers_of(planned, everyone, [long], 0)
        assert len(natural) <= 2 * 8
        for ahead, history in product((1, 3), ([long, IDLE, long], [single, long, long])):
            assert gathers_of(planned, everyone, history, ahead) == natural * len(history), plan


def gathers_of(native: Decoder, everyone: Everyone, batches: list[Batch], ahead: int) -> list[int]:
    """In the order of their launches; ``ahead`` of their turns, so many at most. No pass before has been seen."""
    started = list[int]()
    everyone.gathers.clear()
    order = native.weights.shared._order
    order.__init__(ahead)  # type: ignore[misc]
    order.start = at_once(started) if ahead else None
    angles = Angles.of(native.shape, LONGEST, DEVICE)
    for batch in batches:
        native.accumulate(angles.pack(batch), torch.tensor(1.0))
    assert len(started) >= (len(batches) - 1) * 8 * bool(ahead)
    return list(everyone.gathers)
