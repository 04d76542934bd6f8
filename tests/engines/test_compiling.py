"""Kernels compiled by threads: each ends with the launcher of its own argument types, though Python gives all launchers one module."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import driver

from engines.native import compiling
from engines.native.compiling import Kernels, Launch


class Launchers:
    """Triton's driver as far as it makes launchers: a module's second loading fills the module of the name with other contents."""

    module = SimpleNamespace(launch="")

    def get_current_device(self) -> int:
        return 0

    def launcher_cls(self, source: str, metadata: object) -> str:
        Launchers.module.launch = source
        time.sleep(0.005)  # another thread's turn, before the function is read
        return Launchers.module.launch


class Compiled:
    """As triton.compiler.CompiledKernel: the launcher is made when it is first asked for."""

    def __init__(self, source: str) -> None:
        self.src, self.metadata = source, None
        self._run: str | None = None

    @property
    def run(self) -> str:
        if self._run is None:
            self._run = driver.active.launcher_cls(self.src, self.metadata)
        return self._run


class Kernel:
    def __init__(self, name: str) -> None:
        self.compiled = Compiled(name)
        self.device_caches: dict[int, Any] = {0: None}

    def preload(self, specialisation: str) -> Compiled:
        return self.compiled


@pytest.fixture
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", Launchers())
    monkeypatch.setattr(compiling, "triton_key", lambda: "")


@pytest.mark.usefixtures("_driver")
def test_each_kernel_has_its_own_launcher_when_all_are_compiled() -> None:
    made = [Kernel(f"arguments of kernel {index}") for index in range(24)]
    kernels = Kernels(torch.device("cpu"), 8)
    kernels.compile({(index, ""): Launch(kernel, "") for index, kernel in enumerate(made)})
    assert kernels.wait() == len(made)
    assert [kernel.compiled.run for kernel in made] == [kernel.compiled.src for kernel in made]
    kernels.close()


@pytest.mark.usefixtures("_driver")
def test_without_that_threads_would_have_exchanged_some() -> None:
    made = [Kernel(f"arguments of kernel {index}") for index in range(24)]
    kernels = Kernels(torch.device("cpu"), 8)
    kernels.compile({(index, ""): Launch(kernel, "") for index, kernel in enumerate(made)})
    for future in kernels._asked.values():
        future.result()
    kernels.close()
    assert [kernel.compiled.run for kernel in made] != [kernel.compiled.src for kernel in made]
