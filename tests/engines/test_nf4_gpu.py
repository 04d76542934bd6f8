"""NF4 on a GPU: the kernel's bits are bitsandbytes' in bfloat16, at the size of real weights, and hf trains through bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engines.hf
from engines.native.kernels.nf4 import decode_nf4
from engines.native.nf4 import placed
from engines.native.nf4_linear import Nf4Linear, joined
from harness.nf4 import decode, from_tensors, quantise, to_tensors
from harness.spec import parse
from tests.engines.test_qlora import BF16, WHOLE_BLOCKS
from tests.engines.tiny import FAMILIES, QLORA, RecordingProbe, decoded, make_job, with_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(4096, 14336), (1024, 4096), (300, 72)], ids=str)
def test_the_kernel_decodes_the_bits_of_bitsandbytes(size: tuple[int, int], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    original = (0.02 * torch.randn(size, device=CUDA)).to(dtype)
    packed, state = functional.quantize_4bit(original, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    stored = {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}
    weight = placed(from_tensors("w", stored.__getitem__), CUDA)
    found = torch.empty(size[0] + 64, size[1] + 64, dtype=dtype, device=CUDA)
    decode_nf4(weight, found[: size[0], : size[1]])
    assert found[: size[0], : size[1]].equal(theirs)
    assert decode(weight).equal(theirs)


def test_bitsandbytes_decodes_our_bytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = quantise(0.02 * torch.randn(1024, 4096).bfloat16())
    tensors = {key.removeprefix("w."): value for key, value in to_tensors("w", weight).items() if key != "w"}
    theirs = functional.dequantize_4bit(weight.packed.unsqueeze(1).cuda(), functional.QuantState.from_dict(tensors, CUDA))
    assert theirs.cpu().equal(decode(weight))


def test_copies_between_tensors_of_packed_bytes_leave_every_byte() -> None:
    """As FSDP2 fills what it gathers. Random bytes hold NaNs of many kinds."""
    packed = joined(quantise(torch.randn(1024, 4096)))
    packed.data.view(torch.uint8).random_()
    given, into = packed.data.to(CUDA), torch.zeros_like(packed.data, device=CUDA)
    torch._foreach_copy_([into], [given])
    assert into.view(torch.uint8).equal(given.view(torch.uint8))
    assert into.cpu().view(torch.uint8).equal(packed.data.view(torch.uint8))


def test_a_packed_module_multiplies_by_its_decoded_values() -> None:
    weight = quantise(0.02 * torch.randn(1024, 4096).bfloat16())
    module = Nf4Linear(joined(weight), None, torch.bfloat16).to(CUDA)
    x = torch.randn(64, 4096, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    y, values = module(x), decode(weight).to(CUDA)
    assert module.weight.equal(values)
    torch.testing.assert_close(y, x @ values.t(), rtol=2e-2, atol=2e-2)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ values, rtol=2e-2, atol=2e-2)


def test_hf_through_bitsandbytes_is_lora_on_the_decoded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setitem(FAMILIES, "whole_blocks", WHOLE_BLOCKS)  # for rows of other sizes bitsandbytes warns that it is slow
    job = make_job(tmp_path, "whole_blocks", QLORA)
    losses = []
    for each in (with_train(job, "packed"), decoded(job)):
        probe = RecordingProbe()
        engines.hf.train(replace(each, device="cuda"), parse(engines.hf.Knobs, BF16), probe)
        losses.append(probe.losses)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
