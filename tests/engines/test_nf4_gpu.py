"""NF4 on a GPU: the kernel's bits are bitsandbytes' in bfloat16, at the size of real weights, and hf trains through bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engines.hf
from engines.native.kernels.nf4 import decode_nf4
from engines.native.nf4 import placed
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
