"""Triton kernels compiled by several threads before they are launched: noted where they would be, made beside what else the host does.

A first launch compiles its kernel, has a C compiler make the launcher of its argument types, and loads both, one kernel after the other.
Threads share that work: the MLIR passes let go of the interpreter lock, ptxas and the C compiler are processes. Ten kernels of a step
take 2.8 s on two threads and 4.8 s on one here, and the C compiler 0.6 s a launcher more (two CPU cores, 2026-11-27).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import triton_key

_NOWHERE = -1  # a device that no GPU is: what is noted for it is never compiled for it, and so never launched


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and everything that decides what it is compiled to, as Triton writes it down."""

    kernel: Any
    specialisation: str


Launches = dict[tuple[int, str], Launch]


class _Nowhere:
    """Triton's driver while launches are noted: the kind of GPU that is there, but nothing runs on it."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return _NOWHERE

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def noted() -> Iterator[Launches]:
    """What this process launches inside is noted instead: nothing is compiled, nothing runs, and tensors need no memory.

    Other threads must neither launch nor compile kernels meanwhile.
    """
    found: Launches = {}
    actual, earlier = driver.active, knobs.runtime.jit_cache_hook

    def note(**told: Any) -> bool:
        """Called with what would be compiled; true: it is not, and the launch is left out."""
        kernel = told["fn"].jit_function
        found.setdefault((id(kernel), told["key"]), Launch(kernel, told["compile"]["specialization_data"]))
        return True

    driver.set_active(_Nowhere(actual.get_current_target()))
    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = earlier
        driver.set_active(actual)


class Kernels:
    """Compiles noted launches by threads, each once, into Triton's own caches: this process's and the folder's."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        """Nothing is compiled yet. ``device``: whose launches they are."""
        self._pool = ThreadPoolExecutor(num_threads, "compile", initializer=stand_on, initargs=(device,))
        self._first = self._pool.submit(triton_key)  # hashes all of Triton (415 MB, 1.5 s here): once, not in every thread
        self._asked: dict[tuple[int, str], Future[Any]] = {}

    def compile(self, launches: Mapping[tuple[int, str], Launch]) -> None:
        """Begin with those that were not asked for before; the calling thread stands on the same device."""
        for key, launch in launches.items():
            if key not in self._asked:
                # Made here, once: two threads that each make a kernel's cache would leave one of them with what nobody finds again.
                _ = launch.kernel.device_caches[driver.active.get_current_device()]
                self._asked[key] = self._pool.submit(self._compile, launch)

    def wait(self) -> int:
        """Until all are compiled: how many they are. Raises what Triton raised. No other thread compiles or launches kernels meanwhile."""
        made = [future.result() for future in self._asked.values()]
        for kernel in made:  # only now: no thread loads a launcher any more
            if kernel is not None:
                _load_launcher(kernel)
        return len(made)

    def close(self) -> None:
        """Begin with nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, launch: Launch) -> Any:
        self._first.result()
        kernel = launch.kernel.preload(launch.specialisation)
        if kernel is not None:  # else a hook of somebody else's forbade it
            _ = kernel.run  # asking for it makes the launcher and loads both
        return kernel


def _load_launcher(kernel: Any) -> None:
    """Load the launcher of ``kernel`` once more, out of the cache, now that nobody else loads one.

    Every launcher is a module of the same name. Python loads such a module a second time (two kernels of the same argument types) by
    filling the one of that name with the second one's contents, and Triton reads the function from it only afterwards: two threads may
    exchange their launchers between those two steps. That was seen on a GPU, as a launch with "35 arguments (38 given)" (2026-11-27).
    """
    kernel._run = driver.active.launcher_cls(kernel.src, kernel.metadata)


def threads_for(processes: int) -> int:
    """How many threads one of ``processes`` on this host compiles with."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def stand_on(device: torch.device) -> None:
    """The current GPU is each thread's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
