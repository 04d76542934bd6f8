"""cuBLASLt's calls on bf16 matrices in host memory, column after column, as its documentation describes them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.native import cublaslt

_BYTES = {14: (torch.bfloat16, 2), 0: (torch.float32, 4)}


class Library:
    """Offers ``num_ways``; the one called ``faulty`` writes nothing."""

    def __init__(self, num_ways: int = 1, faulty: int | None = None) -> None:
        self.made: list[dict[str, Any]] = []
        self.ran: list[int] = []
        self._num_ways, self._faulty = num_ways, faulty

    def __getattr__(self, function: str) -> Any:
        return lambda *arguments: getattr(self, f"_{function.removeprefix('cublasLt')}")(*arguments) or 0

    def _create(self, into: Any, **values: Any) -> None:
        self.made.append(values)
        into._obj.value = len(self.made)

    def _MatmulDescCreate(self, into: Any, compute: Any, scale: Any) -> None:
        assert (compute.value, scale.value) == (68, 0)
        self._create(into, turned={3: 0, 4: 0})

    def _MatmulPreferenceCreate(self, into: Any) -> None:
        self._create(into, preferences={})

    def _MatmulPreferenceDestroy(self, preference: Any) -> None:
        assert self.made[preference.value - 1]["preferences"].keys() == {1, 3, 5, 6, 7, 8}

    def _MatrixLayoutCreate(self, into: Any, kind: Any, rows: Any, columns: Any, stride: Any) -> None:
        assert stride.value >= rows.value
        self._create(into, kind=kind.value, rows=rows.value, columns=columns.value, stride=stride.value)

    def _MatmulDescSetAttribute(self, description: Any, attribute: Any, value: Any, size: Any) -> None:
        assert size.value == ctypes.sizeof(value._obj) == 4
        self.made[description.value - 1]["turned"][attribute.value] = value._obj.value

    def _MatmulPreferenceSetAttribute(self, preference: Any, attribute: Any, value: Any, size: Any) -> None:
        assert size.value == ctypes.sizeof(value._obj) == (8 if attribute.value == 1 else 4)
        self.made[preference.value - 1]["preferences"][attribute.value] = value._obj.value

    def _MatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        most, found, count = arguments[-3:]
        count._obj.value = min(most.value, self._num_ways)
        for place in range(count._obj.value):
            found[place].algo[0] = place
        return 0 if self._num_ways else 15

    def _Matmul(self, handle: Any, description: Any, alpha: Any, *rest: Any) -> None:
        way = rest[9]._obj[0]
        self.ran.append(way)
        assert rest[5:7] == rest[7:9], "c is d"
        if way == self._faulty:
            return
        turned = self.made[description.value - 1]["turned"]
        a, b = self._matrix(*rest[0:2]).float(), self._matrix(*rest[2:4]).float()
        self._matrix(*rest[7:9]).copy_(alpha._obj.value * (a.t() if turned[3] else a) @ (b.t() if turned[4] else b))

    def _matrix(self, address: Any, layout: Any) -> torch.Tensor:
        size = self.made[layout.value - 1]
        dtype, num_bytes = _BYTES[size["kind"]]
        room = (size["columns"] - 1) * size["stride"] + size["rows"]
        memory = (ctypes.c_uint8 * (num_bytes * room)).from_address(address.value)
        return torch.frombuffer(memory, dtype=dtype).as_strided((size["rows"], size["columns"]), (1, size["stride"]))


def on_the_host(monkeypatch: pytest.MonkeyPatch, library: Library) -> cublaslt.CublasLt:
    """``library`` as if torch had loaded it."""
    monkeypatch.setattr(cublaslt, "_library", lambda: (library, ctypes.c_void_p(1)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return cublaslt.CublasLt(torch.device("cpu"))


def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Zeros."""
    return torch.zeros(shape, dtype=dtype)
