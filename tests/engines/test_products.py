"""What a product is, and what cuBLASLt is asked for to make it."""

from __future__ import annotations

import pytest
import torch

from engines.native import cublaslt
from engines.native.cublaslt import Multiplier
from engines.native.products import Asked, Product, asked
from harness.errors import HarnessError, UnsupportedError
from tests.engines.lt import Library, matrix, on_the_host

HOST = torch.device("cpu")
WIDE = Product(6, 8, 4, (10, 1), (1, 16), 12, 0.5)
ATEN = torch.ops.aten


def test_operations_are_told_apart() -> None:
    x, y, out = (torch.zeros(4, 4) for _ in range(3))
    assert asked(ATEN.mm.default, (x, y), {}) == Asked(x, y, None)
    assert asked(ATEN.mm.out, (x, y), {"out": out}) == Asked(x, y, out)
    assert asked(ATEN.mm.dtype_out, (x, y, torch.float32), {"out": out}) == Asked(x, y, out)
    assert asked(ATEN.addmm.out, (out, x, y), {"beta": 0, "alpha": 0.5, "out": out}) == Asked(x, y, out, 0.5)
    for sum_or_other in (ATEN.addmm.out, ATEN.addmm.default, ATEN.addmm_.default, ATEN.bmm.default, ATEN.add.Tensor):
        assert asked(sum_or_other, (out, x, y), {"out": out}) is None


@pytest.mark.parametrize(
    "what",
    [
        Asked(matrix(4, 6, dtype=torch.float32), matrix(6, 8, dtype=torch.float32), None),
        Asked(matrix(4, 12)[:, ::2], matrix(6, 8), None),
        Asked(matrix(1, 6).expand(4, 6), matrix(6, 8), None),
        Asked(matrix(4, 6), matrix(6, 1).expand(6, 8), None),
        Asked(matrix(4, 6), matrix(6, 8), matrix(8, 4).t()),
        Asked(matrix(4, 6), matrix(6, 8), matrix(4, 8, dtype=torch.float16)),
        Asked(matrix(4, 6), matrix(6, 8), matrix(4, 8, dtype=torch.float32), 0.5),
    ],
    ids=["float32", "gaps", "rows_overlap", "columns_overlap", "out_turned", "out_float16", "alpha_into_float32"],
)
def test_what_cublaslt_would_have_to_be_asked_otherwise_is_no_product(what: Asked) -> None:
    assert Product.of(what) is None


def test_a_new_result_is_like_one_that_is_given() -> None:
    left, right = matrix(4, 6), matrix(8, 6).t()
    assert Product.of(Asked(left, right, None)) == Product.of(Asked(left, right, matrix(4, 8))) == Product(4, 8, 6, (6, 1), (1, 6), 8)


@pytest.mark.parametrize("product", [WIDE, Product(6, 8, 4, (1, 8), (16, 1), 8)], ids=str)
def test_operands_have_the_layout_that_was_noted_and_room_for_nothing_else(product: Product) -> None:
    left, right, out = product.operands(HOST)
    assert (left.stride(), right.stride(), out.stride()) == (product.left_strides, product.right_strides, (product.out_stride, 1))
    assert Product.of(Asked(left, right, out, product.alpha)) == product
    product.run(left, right, out)
    torch.testing.assert_close(out.float(), product.alpha * left.float() @ right.float(), rtol=1e-2, atol=1e-3)
    assert product.flops == 2 * 6 * 8 * 4


@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("left", [(10, 1), (1, 8)], ids=["left", "left turned"])
@pytest.mark.parametrize("right", [(16, 1), (1, 5)], ids=["right", "right turned"])
def test_rows_become_columns_for_the_library(
    monkeypatch: pytest.MonkeyPatch, left: tuple[int, int], right: tuple[int, int], into: torch.dtype
) -> None:
    product = Product(6, 8, 4, left, right, 12, 0.5, into)
    operands = product.operands(HOST)
    multiplier = Multiplier(product, on_the_host(monkeypatch, Library()), 4)
    (way,) = multiplier.ways
    multiplier.run(way, *operands)
    expected = 0.5 * operands[0].float() @ operands[1].float()
    assert expected.abs().max() > 0
    torch.testing.assert_close(operands[2].float(), expected, rtol=1e-2, atol=1e-3)


def test_sums_stay_in_float32_and_alignments_are_those_of_a_b_c_and_d(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(num_ways=3)
    multiplier = Multiplier(WIDE, on_the_host(monkeypatch, library), 8, (16, 32, 64))
    assert len(multiplier.ways) == 3
    (wanted,) = (made["preferences"] for made in library.made if "preferences" in made)
    assert wanted == {1: 32 * 2**20, 3: 2, 5: 32, 6: 16, 7: 64, 8: 64}


def test_a_product_may_have_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Multiplier(WIDE, on_the_host(monkeypatch, Library(num_ways=0)), 8).ways == []


def test_a_call_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lt = on_the_host(monkeypatch, Library())
    monkeypatch.setattr(Library, "_MatmulDescCreate", lambda *_: 13)
    with pytest.raises(HarnessError, match="cublasLtMatmulDescCreate: cuBLAS status 13"):
        Multiplier(WIDE, lt, 8)


@pytest.mark.parametrize(("version", "says"), [(None, "for something else"), ("1.0", "libcublasLt.so.1: ")])
def test_a_machine_without_it_is_told(monkeypatch: pytest.MonkeyPatch, version: str | None, says: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(UnsupportedError, match=says) as raised:
        cublaslt.CublasLt(HOST)
    assert "products=torch" in str(raised.value)
