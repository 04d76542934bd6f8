"""Linear modules of packed weights: the products of the decoded values, from bytes that anything may move and nothing rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from engines.native.nf4_linear import Nf4Linear, decoded, joined, load_packed, pack_linears, parted
from harness.errors import UnsupportedError
from harness.nf4 import decode, load_decoded, quantise, to_tensors
from tests.engines.tiny import QLORA, make_job

SIZES = [(48, 64), (30, 72), (3, 5), (257, 300)]  # whole blocks; blocks across rows; a last byte half full; scales of two blocks


def module(rows: int, columns: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[Nf4Linear, nn.Linear]:
    """One of a random weight, and a plain one of its decoded values."""
    weight = quantise(torch.randn(rows, columns, dtype=dtype))
    plain = nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(decode(weight))
    return Nf4Linear(joined(weight), plain.bias, dtype), plain


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bytes_are_all_there(size: tuple[int, int], stored: torch.dtype) -> None:
    weight = quantise(torch.randn(size).to(stored))
    packed = joined(weight)
    found = parted(packed)
    for name in ("packed", "absmax", "nested_absmax", "code", "levels"):
        assert getattr(found, name).equal(getattr(weight, name)), name
    assert (found.offset, found.shape, found.dtype) == (weight.offset, weight.shape, stored)
    for dtype in (torch.float32, torch.bfloat16):  # by way of the stored type
        assert decoded(packed, dtype).equal(decode(weight).to(dtype))
    assert len({start % 16 for start, _ in packed.form.spans}) == 1


def test_a_value_takes_hardly_more_than_half_a_byte() -> None:
    packed = joined(quantise(torch.randn(512, 512)))
    assert packed.data.dtype == torch.float32  # what every FSDP2 shards
    assert packed.data.nbytes == 512 * 512 // 2 + 512 * 512 // 64 + 4 * 16 + 4 * (256 + 16)


def test_bytes_that_look_like_a_nan_pass_through_the_type_of_arithmetic() -> None:
    """As on a GPU, where ``_foreach_copy_``, by which FSDP2 fills what it gathers, reads and writes each value by way of float32."""
    weight = quantise(torch.randn(48, 64))
    every = torch.arange(len(weight.packed) // 2).repeat_interleave(2).reshape(-1, 2)
    codes = torch.stack([0x80 + every[:, 0] % 0x80, 0x7F + 0x80 * (every[:, 1] % 2)], 1).to(torch.uint8)  # NaNs of many kinds, in 16 bits
    before = joined(replace(weight, packed=codes.reshape(weight.packed.shape))).data
    assert before.view(torch.bfloat16).isnan().sum() > 100
    after = before.to(torch.float32).to(before.dtype)
    assert after.view(torch.uint8).equal(before.view(torch.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_it_makes_the_bits_of_a_plain_module(size: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    ours, plain = module(*size, dtype, bias=bias)
    x, dy = torch.randn(2, 7, size[1], dtype=dtype, requires_grad=True), torch.randn(2, 7, size[0], dtype=dtype)
    y, expected = ours(x), plain(x)
    assert y.equal(expected)
    assert torch.autograd.grad(y, x, dy)[0].equal(torch.autograd.grad(expected, x, dy)[0])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in ours.parameters())
    assert ours.weight.equal(plain.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_says_the_type_of_its_products(dtype: torch.dtype) -> None:
    ours, plain = module(48, 64, dtype)
    x = torch.randn(5, 64, requires_grad=True)
    found = []
    for each in (ours, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        found.append((y, gradient))
    assert all(one.equal(other) and one.dtype == other.dtype for one, other in zip(*found, strict=True))


def test_backward_reads_the_bytes_that_are_there_then() -> None:
    """Shards are freed after forward and gathered again. Whoever kept values, or bytes, would not see others."""
    weight = quantise(torch.randn(48, 64))
    other = replace(weight, packed=weight.packed.flip(0))
    ours, x = Nf4Linear(joined(weight), None, torch.float32), torch.randn(5, 64, requires_grad=True)
    y = ours(x)
    ours.packed.data = torch.empty(0, dtype=torch.float32)
    ours.packed.data = joined(other).data
    (found,) = torch.autograd.grad(y.sum(), x)
    assert found.equal(torch.ones(5, 48) @ decode(other))


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    ours, _ = module(48, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(torch.randn(5, 64, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [ours.packed.data_ptr()]


def test_compilers_see_one_product() -> None:
    ours, _ = module(48, 64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, requires_grad=True)
    (found,), (right,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (compiled, ours))
    assert found.equal(right)
    form = ours.form
    given = (x, ours.packed, ours.bias, form.rows, form.columns, form.offset, form.stored)
    torch.library.opcheck(
        torch.ops.engine_room.nf4_linear.default, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    torch.library.opcheck(
        torch.ops.engine_room.nf4_input_gradient.default,
        (torch.randn(5, 48), ours.packed, *given[3:]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("family", ["llama_biases", "qwen3"])
def test_a_model_is_loaded_without_its_values(tmp_path: Path, family: str) -> None:
    job = make_job(tmp_path, family, QLORA)
    model, weights = load_packed(job.base, AutoConfig.from_pretrained(job.base), torch.float32)
    assert len(weights) == 2 * 7
    assert {each.weight.untyped_storage().nbytes() for each in weights} == {4}
    pack_linears(model, weights, torch.float32)
    assert sum(isinstance(each, Nf4Linear) for each in model.modules()) == 2 * 7
    ids = torch.arange(9)[None]
    assert model(input_ids=ids).logits.equal(load_decoded(job.base, torch.float32)(input_ids=ids).logits)


def test_what_is_no_linear_module_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, method=QLORA)
    name = "model.embed_tokens.weight"
    tensors = load_file(job.base / "model.safetensors")
    save_file({**tensors, **to_tensors(name, quantise(tensors[name]))}, job.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="stores weights of Embedding in NF4"):
        load_packed(job.base, AutoConfig.from_pretrained(job.base), torch.float32)
