"""NF4 in bitsandbytes' bytes: golden bytes, what bitsandbytes itself makes and reads, damaged checkpoints, the prepared base."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import prepare
from harness.errors import WeightsError
from harness.nf4 import STATE, decode, decoded_tensors, dynamic_levels, from_tensors, is_nf4, load_decoded, quantise, scales, to_tensors
from tests.real_files import conf, request, workload

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
SHAPES = [(192, 128), (1024, 192), (3, 70), (64, 72)]  # whole blocks, several nested ones, blocks across rows and broken ones
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(5))).to(dtype)


def test_golden_bytes() -> None:
    """Noted from bitsandbytes 0.50.2 on a CPU."""
    row = [-8.0, -5.5, -4.0, -3.0, -2.0, -1.5, -0.7, 0.0, 0.6, 1.3, 2.0, 2.7, 3.5, 4.5, 5.8, 8.0]
    values = torch.tensor([row * 4, [0.5] * 64, [0.0] * 64])
    made = quantise(values)
    assert bytes(made.packed.tolist()) == bytes.fromhex("0123456789abcdef" * 4 + "ff" * 32 + "77" * 32)
    assert (made.offset, made.nested_absmax.tolist(), made.absmax.tolist()) == (2.8333332538604736, [5.1666669845581055], [255, 38, 32])
    assert scales(made).tolist() == [8.0, 0.4639322757720947, 0.027994632720947266]
    assert decode(made).flatten()[[0, 1, 8, 14, 15, 64, 128]].tolist() == [
        -8.0, -5.569542407989502, 0.6366423964500427, 5.783654689788818, 8.0, 0.4639322757720947, 0.0
    ]  # fmt: skip


def test_blocks_of_zeros_stay_zeros_up_to_the_second_level() -> None:
    made = quantise(torch.zeros(2, 96))
    assert set(made.packed.tolist()) == {0x77}
    assert not decode(made).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantising_is_near_and_repeatable(shape: tuple[int, int], dtype: torch.dtype) -> None:
    original = weight(shape, dtype)
    made = decode(quantise(original))
    assert made.dtype == dtype
    error = (made - original).float().norm() / original.float().norm()
    assert 0.05 < error < 0.12  # about 9 % on normal values
    assert decode(from_tensors("w", to_tensors("w", quantise(original)).__getitem__)).equal(made)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitsandbytes_makes_and_decodes_the_same(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    original, ours = weight(shape, dtype), quantise(weight(shape, dtype))
    packed, state = functional.quantize_4bit(original, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert packed.flatten().equal(ours.packed)
    assert state.code.equal(ours.code)
    assert state.state2.code.equal(ours.levels)
    # Its mean is summed in another order, and on a CPU it searches 8-bit levels by another rule: a neighbour here and there.
    assert (state.absmax.int() - ours.absmax.int()).abs().max() <= 1
    assert (state.absmax != ours.absmax).float().mean() < 0.02
    assert state.offset.item() == pytest.approx(ours.offset, rel=1e-6)
    theirs = functional.dequantize_4bit(packed, state)
    read = from_tensors("w", {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}.__getitem__)
    assert decode(read).equal(theirs)
    again = {key.removeprefix("w."): value for key, value in to_tensors("w", ours).items() if key != "w"}
    loaded = functional.QuantState.from_dict(again, torch.device("cpu"))
    assert functional.dequantize_4bit(ours.packed.unsqueeze(1), loaded).equal(decode(ours))


def test_the_levels_are_sorted_and_distinct() -> None:
    levels = dynamic_levels()
    assert len(levels.unique()) == 256
    assert levels.equal(levels.sort().values)
    assert (levels[0], levels[127], levels[255]) == (pytest.approx(-0.99296875), 0, 1)


def changed(tensors: dict[str, torch.Tensor], **state: Any) -> dict[str, torch.Tensor]:
    old = json.loads(bytes(tensors[f"w{STATE}"].tolist()))
    return {**tensors, f"w{STATE}": torch.tensor(list(json.dumps({**old, **state}).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda found: changed(found, blocksize=128), "in blocks of 128"),
        (lambda found: changed(found, quant_type="fp4"), "quantised as fp4"),
        (lambda found: changed(found, nested_blocksize=None), "double quantisation"),
        (lambda found: changed(found, shape=[8, 64]), "128 packed bytes, expected 256"),
        (lambda found: {name: tensor for name, tensor in found.items() if name != "w.absmax"}, "not a readable 4-bit weight"),
        (lambda found: {**found, f"w{STATE}": torch.tensor([1], dtype=torch.uint8)}, "not a readable 4-bit weight"),
    ],
)
def test_what_is_not_such_a_weight_is_refused(damage: Any, says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        from_tensors("w", damage(to_tensors("w", quantise(weight((4, 64))))).__getitem__)


METHOD = conf("method", "qlora", rank=4, alpha=8)


def test_prepare_makes_an_nf4_base_beside_the_plain_one(tmp_path: Path, cache: Path) -> None:
    plain = prepare.prepare(request(workload(), cache, tmp_path / "x"))
    assert prepare.find(request(workload(method=METHOD), cache, tmp_path / "x")) is None
    made = prepare.prepare(request(workload(method=METHOD), cache, tmp_path / "x"))
    assert prepare.find(request(workload(method=METHOD), cache, tmp_path / "x")) == made
    assert made == prepare.prepare(request(workload(method=METHOD), cache, tmp_path / "x"))
    assert made.base != plain.base
    assert made.base_sha256 != plain.base_sha256
    assert made.adapter_init_sha256 == plain.adapter_init_sha256
    assert made.tokens == plain.tokens
    assert made.notes[0] == "base weights: random, seed 0; linear layers in NF4"
    other = prepare.prepare(request(workload(method=METHOD), tmp_path / "other", tmp_path / "x"))
    assert other.base_sha256 == made.base_sha256
    assert is_nf4(Path(made.base))
    assert not is_nf4(Path(plain.base))
    before, after, stored = (load_file(Path(plain.base) / "model.safetensors"), decoded_tensors(Path(made.base)), _stored(Path(made.base)))
    assert set(before) == set(after)
    for name, tensor in before.items():
        is_linear = "proj" in name
        assert after[name].equal(decode(quantise(tensor)) if is_linear else tensor), name
        assert (f"{name}{STATE}" in stored) is is_linear, name
        assert (stored[name].dtype == torch.uint8) is is_linear, name


def test_a_base_larger_than_a_file_is_sharded(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare.prepare(request(workload(method=METHOD), cache, tmp_path / "x"))
    monkeypatch.setattr("harness.weights.nf4_base.SHARD_BYTES", 20_000)
    made = prepare.prepare(request(workload(method=METHOD), tmp_path / "other", tmp_path / "x"))
    index = json.loads((Path(made.base) / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(_stored(Path(whole.base)))
    assert made.base_sha256 == whole.base_sha256


def test_a_decoded_base_has_plain_linear_modules(tmp_path: Path, cache: Path) -> None:
    made = prepare.prepare(request(workload(method=METHOD), cache, tmp_path / "x"))
    model, right = load_decoded(Path(made.base), torch.float32), decoded_tensors(Path(made.base))
    state = model.state_dict()
    assert set(right) <= set(state)
    for name, tensor in right.items():
        assert state[name].dtype == torch.float32
        assert state[name].equal(tensor.float()), name


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
