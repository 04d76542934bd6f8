"""cuBLASLt by ctypes: the ways in which it offers to make a product, and one product made in one of them.

Names, values and layouts: NVIDIA's documentation of cuBLASLt (cublasLtMatmul, cublasLtMatmulAlgoGetHeuristic), CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

from engines.native.bench_products.products import Product
from harness.errors import HarnessError

WORKSPACE_BYTES = 32 * 2**20  # as torch gives cuBLAS on Hopper
_BF16, _F32, _COMPUTE_F32 = 14, 0, 68  # cudaDataType_t, cublasComputeType_t
_TURN_A, _TURN_B = 3, 4  # cublasLtMatmulDescAttributes_t
_MOST_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t


class _Way(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (("algo", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4))


class Multiplier:
    """One product at fixed addresses, in any of the ``ways`` that cuBLASLt offers for it, its own first choice first."""

    def __init__(self, product: Product, operands: tuple[Tensor, Tensor, Tensor], most: int) -> None:
        """Ask for ``most`` ways. Raises HarnessError where there is no cuBLASLt or it has none."""
        self._lt, self._handle = _library()
        left, right, self._out = operands
        self._alpha, self._beta = c_float(product.alpha), c_float(0.0)
        # Row after row here is column after column there, so out is asked for turned: right is its first factor.
        self._first, self._second = right, left
        self._description = self._made("cublasLtMatmulDescCreate", c_int(_COMPUTE_F32), c_int(_F32))
        self._layouts = []
        for attribute, factor in ((_TURN_A, right), (_TURN_B, left)):
            turned = factor.stride(1) != 1
            self._say("cublasLtMatmulDescSetAttribute", self._description, c_int(attribute), byref(c_int32(int(turned))), c_size_t(4))
            rows, columns = (factor.shape[0], factor.shape[1]) if turned else (factor.shape[1], factor.shape[0])
            self._layouts.append(self._layout(rows, columns, factor.stride(1) if turned else factor.stride(0)))
        self._layouts.append(self._layout(product.columns, product.rows, product.out_stride))
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=left.device)
        self.ways = self._offered(most)

    def run(self, way: Any) -> None:
        """Make the product on torch's current stream."""
        a, b, d = self._layouts
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        factors = (_at(self._first), a, _at(self._second), b)
        out = _at(self._out), d
        room = _at(self._workspace), c_size_t(WORKSPACE_BYTES)
        alpha, beta = byref(self._alpha), byref(self._beta)
        self._say("cublasLtMatmul", self._handle, self._description, alpha, *factors, beta, *out, *out, byref(way.algo), *room, stream)

    def _offered(self, most: int) -> list[Any]:
        preference = self._made("cublasLtMatmulPreferenceCreate")
        limit = c_size_t(WORKSPACE_BYTES)
        self._say("cublasLtMatmulPreferenceSetAttribute", preference, c_int(_MOST_WORKSPACE), byref(limit), c_size_t(sizeof(limit)))
        found, count = (_Way * most)(), c_int(0)
        a, b, d = self._layouts
        self._say(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, self._description, a, b, d, d, preference, c_int(most), found, byref(count)
        )
        return [way for way in found[: count.value] if way.state == 0]

    def _layout(self, rows: int, columns: int, stride: int) -> c_void_p:
        return self._made("cublasLtMatrixLayoutCreate", c_int(_BF16), c_uint64(rows), c_uint64(columns), c_int64(stride))

    def _made(self, function: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        self._say(function, byref(made), *arguments)
        return made

    def _say(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._lt, function)(*arguments):
            raise HarnessError(f"{function}: cuBLAS status {status}")


def _library() -> tuple[Any, c_void_p]:
    """The cuBLASLt that torch has loaded, and a handle of it."""
    name = f"libcublasLt.so.{(torch.version.cuda or '0').split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise HarnessError(f"{name}: {error}; it comes with torch for CUDA") from error
    handle = c_void_p()
    if status := library.cublasLtCreate(byref(handle)):
        raise HarnessError(f"cublasLtCreate: cuBLAS status {status}")
    return library, handle


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
