"""cuBLASLt by ctypes: the ways in which it offers to make a product, and one product made in one of them.

Only ways that add up in float32 are asked for: one that splits a sum "in place" adds its parts up in the type of the result
(cublasLtReductionScheme_t).

Names, values and layouts: NVIDIA's documentation of cuBLASLt (cublasLtMatmul, cublasLtMatmulAlgoGetHeuristic), CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

from engines.native.footprint import WORKSPACE_BYTES
from engines.native.products import Product, is_turned
from harness.errors import HarnessError, UnsupportedError

MOST_ALIGNMENT = 256  # bytes: what cuBLASLt takes for granted unless told otherwise
_BF16, _F32, _COMPUTE_F32 = 14, 0, 68  # cudaDataType_t, cublasComputeType_t
_TURN_A, _TURN_B = 3, 4  # cublasLtMatmulDescAttributes_t
_MOST_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; of a, b, c, d
_REDUCED_IN_COMPUTE_TYPE = 2  # cublasLtReductionScheme_t; a sum that is not split is always allowed
_NOT_SUPPORTED = 15  # cublasStatus_t


class _Way(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (("algo", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4))


class CublasLt:
    """The cuBLASLt that torch has loaded, and a workspace for products that are made one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Raises UnsupportedError where there is no cuBLASLt."""
        self._library, self.handle = _library()
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def ask(self, function: str, *arguments: Any) -> int:
        """Call ``function``; its cublasStatus_t."""
        status: int = getattr(self._library, function)(*arguments)
        return status

    def say(self, function: str, *arguments: Any) -> None:
        """Call ``function``. Raises HarnessError where it fails."""
        if status := self.ask(function, *arguments):
            raise HarnessError(f"{function}: cuBLAS status {status}")

    def made(self, function: str, *arguments: Any) -> c_void_p:
        """What ``function`` makes."""
        made = c_void_p()
        self.say(function, byref(made), *arguments)
        return made


class Multiplier:
    """One product in any of the ``ways`` that cuBLASLt offers for it, its own first choice first; there may be none.

    What describes it stays until the process ends: products are few.
    """

    def __init__(self, product: Product, lt: CublasLt, most: int, alignments: tuple[int, int, int] = (MOST_ALIGNMENT,) * 3) -> None:
        """Ask for ``most`` ways; ``alignments``: of the addresses of left, right and out, in bytes."""
        self._lt = lt
        self._alpha, self._beta = byref(c_float(product.alpha)), byref(c_float(0.0))
        self._workspace = c_void_p(lt.workspace.data_ptr()), c_size_t(WORKSPACE_BYTES)
        # Row after row here is column after column there, so out is asked for turned: right is its first factor.
        self._description = lt.made("cublasLtMatmulDescCreate", c_int(_COMPUTE_F32), c_int(_F32))
        right = self._factor(_TURN_A, (product.depth, product.columns), product.right_strides)
        left = self._factor(_TURN_B, (product.rows, product.depth), product.left_strides)
        kind = _BF16 if product.out_dtype == torch.bfloat16 else _F32
        self._layouts = right, left, self._layout(kind, product.columns, product.rows, product.out_stride)
        self.ways = self._offered(most, alignments)

    def run(self, way: Any, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Make the product on torch's current stream."""
        a, b, d = self._layouts
        into = c_void_p(out.data_ptr())
        self._lt.say(
            "cublasLtMatmul", self._lt.handle, self._description, self._alpha, c_void_p(right.data_ptr()), a, c_void_p(left.data_ptr()), b,
            self._beta, into, d, into, d, byref(way.algo), *self._workspace, c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip

    def _offered(self, most: int, alignments: tuple[int, int, int]) -> list[Any]:
        preference = self._lt.made("cublasLtMatmulPreferenceCreate")
        left, right, out = alignments
        wanted: list[tuple[int, Any]] = [(_MOST_WORKSPACE, c_size_t(WORKSPACE_BYTES)), (_REDUCTIONS, c_uint32(_REDUCED_IN_COMPUTE_TYPE))]
        wanted += [(attribute, c_uint32(size)) for attribute, size in zip(_ALIGNMENTS, (right, left, out, out), strict=True)]
        for attribute, value in wanted:
            self._lt.say("cublasLtMatmulPreferenceSetAttribute", preference, c_int(attribute), byref(value), c_size_t(sizeof(value)))
        found, count = (_Way * most)(), c_int(0)
        a, b, d = self._layouts
        asked = self._lt.handle, self._description, a, b, d, d, preference, c_int(most), found, byref(count)
        status = self._lt.ask("cublasLtMatmulAlgoGetHeuristic", *asked)
        self._lt.say("cublasLtMatmulPreferenceDestroy", preference)
        if status not in (0, _NOT_SUPPORTED):
            raise HarnessError(f"cublasLtMatmulAlgoGetHeuristic: cuBLAS status {status}")
        return [way for way in found[: count.value] if way.state == 0]

    def _factor(self, attribute: int, shape: tuple[int, int], strides: tuple[int, int]) -> c_void_p:
        """The layout of a factor, and whether it is to be turned."""
        turned = is_turned(strides)
        value = c_int32(int(turned))
        self._lt.say("cublasLtMatmulDescSetAttribute", self._description, c_int(attribute), byref(value), c_size_t(sizeof(value)))
        return self._layout(_BF16, *(shape if turned else shape[::-1]), strides[1] if turned else strides[0])

    def _layout(self, kind: int, rows: int, columns: int, stride: int) -> c_void_p:
        return self._lt.made("cublasLtMatrixLayoutCreate", c_int(kind), c_uint64(rows), c_uint64(columns), c_int64(stride))


def _library() -> tuple[Any, c_void_p]:
    """The library, and a handle of it."""
    if torch.version.cuda is None:
        raise UnsupportedError("cuBLASLt comes with torch for CUDA, and this torch is for something else; set products=torch")
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise UnsupportedError(f"{name}: {error}; it comes with torch for CUDA. Set products=torch") from error
    handle = c_void_p()
    if status := library.cublasLtCreate(byref(handle)):
        raise UnsupportedError(f"cublasLtCreate: cuBLAS status {status}; set products=torch")
    return library, handle
