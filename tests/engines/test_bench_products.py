"""The products of a step are noted with their sizes and strides; on a GPU cuBLASLt makes the same as torch in every way it offers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from engines.native.bench_products.__main__ import _extrapolated, main
from engines.native.bench_products.products import products
from engines.native.products import Product

WIDE = Product(6, 8, 4, (10, 1), (1, 16), 12, 0.5)


def test_every_product_is_noted_as_torch_is_asked_for_it() -> None:
    left, right, out = WIDE.operands(torch.device("cpu"))
    plain = torch.zeros(6, 8, dtype=torch.bfloat16)

    def step() -> None:
        for _ in range(3):
            WIDE.run(left, right, out)
        torch.mm(left, right, out=plain)
        _ = left.float() @ right.float()
        torch.addmm(out, left, right)

    found, others = products(step)
    assert found == {WIDE: 3, Product(6, 8, 4, (10, 1), (1, 16), 8): 1}
    assert dict(others) == {"aten.mm.default of torch.float32": 1, "aten.addmm.default": 1}


def test_a_step_of_the_whole_model_is_counted_from_two_cuts() -> None:
    head, layer = Product(6, 8, 4, (4, 1), (8, 1), 8), WIDE
    assert _extrapolated([Counter({head: 2, layer: 6}), Counter({head: 2, layer: 9})], 32) == {head: 2, layer: 96}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_on_a_gpu_every_product_of_a_step_is_made_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "llama3_1b", "--batch", "1x2048", "--ways", "4"])
    said = capsys.readouterr().out
    assert "products in bf16 a step" in said
    assert said.count(" of 4): ") >= 8
    assert "less with the fastest ways" in said
