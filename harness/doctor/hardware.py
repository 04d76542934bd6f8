"""The machine itself: system, Python, processor, memory, and every GPU that NVML sees."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from harness.doctor.finding import Finding
from harness.machine import cpu_name, nvml

GIB = 2**30
OLDEST, FIRST_UNTRIED = (3, 11), (3, 14)
DEMO_MEMORY_BYTES = 3 * GIB  # the demo's engines peak at 2.41 GiB (docs/log.md, 2026-11-23)
BUSY_BYTES = GIB  # an idle H100 reports half of it in use, the driver's own (seen 2026-11-24)


def machine_findings() -> list[Finding]:
    """System, Python, processor and memory."""
    return [_system(), python_finding(sys.version_info[:2]), _processor(), memory_finding(available_memory())]


def python_finding(version: tuple[int, int]) -> Finding:
    """Whether this Python is one that the project is tested with."""
    found = f"{platform.python_version()} in {sys.prefix}"
    if OLDEST <= version < FIRST_UNTRIED:
        return Finding("machine", "Python", "ok", found)
    wanted = f"{OLDEST[0]}.{OLDEST[1]} to {FIRST_UNTRIED[0]}.{FIRST_UNTRIED[1] - 1}"
    return Finding("machine", "Python", "problem", found, f"use Python {wanted}: make clean, then make PYTHON=python3.13 demo", blocks=True)


def memory_finding(available: int) -> Finding:
    """Whether the demo fits beside what is running now."""
    found = f"{available / GIB:.1f} GiB free of {psutil.virtual_memory().total / GIB:.1f} GiB"
    if available >= DEMO_MEMORY_BYTES:
        return Finding("machine", "memory", "ok", found)
    remedy = f"the demo needs {DEMO_MEMORY_BYTES / GIB:.0f} GiB: end other programs, or choose model=tiny_llama"
    return Finding("machine", "memory", "problem", found, remedy, blocks=True)


def available_memory() -> int:
    """Bytes that a new process may take, a container's limit included."""
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        return free
    return min(free, max(0, limit - used))


def gpu_findings() -> list[Finding]:
    """Driver and devices, as NVML sees them; one note where there is none."""
    with nvml() as library:
        count = library.nvmlDeviceGetCount() if library else 0
        if library is None or count == 0:
            remedy = "nothing, if this is meant to be a CPU machine; otherwise install NVIDIA's driver and look at nvidia-smi"
            return [Finding("GPU", "NVIDIA", "note", "none: machine=cpu is used", remedy)]
        speaks = driver_cuda(library)
        driver = f"{library.nvmlSystemGetDriverVersion()}, speaks CUDA {speaks[0]}.{speaks[1]}"
        devices = [finding for index in range(count) for finding in _device(library, index)]
        return [Finding("GPU", "driver", "ok", driver), *devices]


def driver_cuda(library: Any) -> tuple[int, int]:
    """The newest CUDA version that the driver speaks."""
    number = int(library.nvmlSystemGetCudaDriverVersion())
    return number // 1000, number % 1000 // 10


def _device(library: Any, index: int) -> list[Finding]:
    handle = library.nvmlDeviceGetHandleByIndex(index)
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    major, minor = library.nvmlDeviceGetCudaComputeCapability(handle)
    watts = library.nvmlDeviceGetPowerManagementLimit(handle) / 1000
    size = f"{memory.total / GIB:.1f} GiB, {memory.used / GIB:.1f} in use"
    text = f"{library.nvmlDeviceGetName(handle)}, {size}, compute capability {major}.{minor}, limit {watts:.0f} W"
    findings = [Finding("GPU", f"GPU {index}", "ok", text)]
    busy = _asked(library, lambda: library.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    if busy or memory.used > BUSY_BYTES:
        who = ", ".join(f"process {one.pid}" for one in busy) or "a process that the driver does not name"
        remedy = "wait for it or end it: figures taken beside it would be its figures as well"
        findings.append(Finding("GPU", f"GPU {index} busy", "problem", f"{who} holds {memory.used / GIB:.1f} GiB", remedy))
    mode = _asked(library, lambda: library.nvmlDeviceGetMigMode(handle))
    if mode and mode[0]:
        remedy = "name the slice with CUDA_VISIBLE_DEVICES=MIG-…; its figures are not those of the whole GPU"
        findings.append(Finding("GPU", f"GPU {index} MIG", "note", "on: a process sees one slice of this GPU", remedy))
    return findings


def _asked(library: Any, question: Callable[[], Any]) -> Any:
    """The answer, None where this GPU or its driver has none."""
    try:
        return question()
    except library.NVMLError:
        return None


def _system() -> Finding:
    found = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if platform.system() == "Linux":
        return Finding("machine", "system", "ok", found)
    return Finding("machine", "system", "problem", found, "use Linux, or a Linux container or virtual machine on this system", blocks=True)


def _processor() -> Finding:
    mine, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count()
    return Finding("machine", "processor", "ok", f"{cpu_name()}, {mine} of {all_of_them} cores for us")
