"""Tensors copied by several threads in pieces arrive as they would in one: any size, type and stride of their place."""

from __future__ import annotations

import pytest
import torch

from engines.native.uploading import Uploads

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(37, 24), (1000,), (8, 3, 5), (1, 24), (3, 4096)])
def test_as_copied_at_once(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    there = torch.device(device)
    source = torch.randn(size).to(torch.bfloat16)
    wide = torch.full((size[0] + 2, *size[1:-1], size[-1] + 5) if len(size) > 1 else (size[0] + 2,), 7.0, dtype=dtype, device=there)
    place = wide[1:-1, ..., :-5] if len(size) > 1 else wide[1:-1]
    with Uploads(there, shared=True, staged_bytes=1000, small_bytes=1) as uploads:
        for _ in range(3):  # buffers are used again
            uploads.copy(place, source)
        alone = uploads.placed(source)
    assert torch.equal(place.cpu(), source.to(dtype))
    assert torch.equal(alone.cpu(), source)
    place.fill_(7.0)
    assert (wide == 7.0).all(), "something was written beside the place"


def test_what_is_small_or_not_for_a_gpu_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    source, place = torch.randn(64, 64), torch.zeros(64, 64)
    with Uploads(CPU, shared=False) as plain, Uploads(CPU, shared=True) as shared:
        monkeypatch.setattr(Uploads, "_copy", None)
        for uploads in (plain, shared):
            uploads.copy(place.zero_(), source)
            assert torch.equal(place, source)
            assert uploads.placed(source) is source


def test_what_fails_in_a_thread_is_told() -> None:
    with Uploads(CPU, shared=True, small_bytes=1) as uploads, pytest.raises(RuntimeError, match="must match"):
        uploads.copy(torch.zeros(8, 4), torch.zeros(8, 5))
