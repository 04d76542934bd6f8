"""The products of a step are noted with their sizes and strides; on a GPU cuBLASLt makes the same as torch in every way it offers."""

from __future__ import annotations

import ctypes
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.native.bench_products import cublaslt
from engines.native.bench_products.__main__ import _extrapolated, main
from engines.native.bench_products.products import Product, products

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


@pytest.mark.parametrize("product", [WIDE, Product(6, 8, 4, (1, 8), (16, 1), 8)], ids=str)
def test_operands_have_the_layout_that_was_noted_and_room_for_nothing_else(product: Product) -> None:
    left, right, out = product.operands(torch.device("cpu"))
    assert (left.stride(), right.stride(), out.stride()) == (product.left_strides, product.right_strides, (product.out_stride, 1))
    product.run(left, right, out)
    torch.testing.assert_close(out.float(), product.alpha * left.float() @ right.float(), rtol=1e-2, atol=1e-3)
    assert product.flops == 2 * 6 * 8 * 4


def test_a_step_of_the_whole_model_is_counted_from_two_cuts() -> None:
    head, layer = Product(6, 8, 4, (4, 1), (8, 1), 8), WIDE
    assert _extrapolated([Counter({head: 2, layer: 6}), Counter({head: 2, layer: 9})], 32) == {head: 2, layer: 96}


class Library:
    """cuBLASLt's calls for one product of bf16 matrices in host memory, column after column, as its documentation describes them."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def __getattr__(self, function: str) -> Any:
        return lambda *arguments: getattr(self, f"_{function.removeprefix('cublasLt')}")(*arguments) or 0

    def _create(self, into: Any, **values: Any) -> None:
        self.made.append(values)
        into._obj.value = len(self.made)

    def _MatmulDescCreate(self, into: Any, compute: Any, scale: Any) -> None:
        assert (compute.value, scale.value) == (68, 0)
        self._create(into, turned={3: 0, 4: 0})

    def _MatmulPreferenceCreate(self, into: Any) -> None:
        self._create(into)

    def _MatrixLayoutCreate(self, into: Any, kind: Any, rows: Any, columns: Any, stride: Any) -> None:
        assert kind.value == 14
        self._create(into, rows=rows.value, columns=columns.value, stride=stride.value)

    def _MatmulDescSetAttribute(self, description: Any, attribute: Any, value: Any, size: Any) -> None:
        self.made[description.value - 1]["turned"][attribute.value] = value._obj.value

    def _MatmulPreferenceSetAttribute(self, preference: Any, attribute: Any, value: Any, size: Any) -> None:
        assert (attribute.value, value._obj.value, size.value) == (1, 32 * 2**20, 8)

    def _MatmulAlgoGetHeuristic(self, *arguments: Any) -> None:
        arguments[-1]._obj.value = 1

    def _Matmul(self, handle: Any, description: Any, alpha: Any, *rest: Any) -> None:
        turned = self.made[description.value - 1]["turned"]
        a, b = self._matrix(*rest[0:2]), self._matrix(*rest[2:4])
        self._matrix(*rest[7:9]).copy_(alpha._obj.value * (a.t() if turned[3] else a) @ (b.t() if turned[4] else b))

    def _matrix(self, address: Any, layout: Any) -> torch.Tensor:
        size = self.made[layout.value - 1]
        room = (size["columns"] - 1) * size["stride"] + size["rows"]
        memory = (ctypes.c_uint16 * room).from_address(address.value)
        return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((size["rows"], size["columns"]), (1, size["stride"]))


@pytest.mark.parametrize("left", [(10, 1), (1, 8)], ids=["left", "left turned"])
@pytest.mark.parametrize("right", [(16, 1), (1, 5)], ids=["right", "right turned"])
def test_rows_become_columns_for_the_library(monkeypatch: pytest.MonkeyPatch, left: tuple[int, int], right: tuple[int, int]) -> None:
    monkeypatch.setattr(cublaslt, "_library", lambda: (Library(), ctypes.c_void_p(1)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    product = Product(6, 8, 4, left, right, 12, 0.5)
    operands = product.operands(torch.device("cpu"))
    multiplier = cublaslt.Multiplier(product, operands, 4)
    (way,) = multiplier.ways
    assert ctypes.sizeof(way) == 96
    multiplier.run(way)
    expected = 0.5 * operands[0].float() @ operands[1].float()
    assert expected.abs().max() > 0
    torch.testing.assert_close(operands[2].float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_on_a_gpu_every_product_of_a_step_is_made_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "llama3_1b", "--batch", "1x2048", "--ways", "4"])
    said = capsys.readouterr().out
    assert "products in bf16 a step" in said
    assert said.count(" of 4): ") >= 8
    assert "less with the fastest ways" in said
