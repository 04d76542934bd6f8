"""Which machine this is: found without torch, so that planning stays light."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from harness.engine import Machine

_GIB = 2**30
_POWER_BUCKET_WATTS = 50  # cards of one model are sold with different limits; small differences in the setting are noise
# Cards of one chip, of as many multiprocessors, that differ in their memory: the same code takes the same kernels there (decision 0022).
_CHIPS = {"NVIDIA H100 80GB HBM3": "gh100-132", "NVIDIA H200": "gh100-132"}


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """The NVML module, initialised, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def has_cuda() -> bool:
    """Whether NVML sees an NVIDIA GPU."""
    with nvml() as library:
        return library is not None and library.nvmlDeviceGetCount() > 0


def detect(device: Literal["cpu", "cuda"], *, count: int = 1, memory_cap_gib: int | None = None) -> Machine:
    """The hardware key of this machine for a cell on ``device`` (``count`` accelerators; all cores of a CPU).

    Raises LookupError when ``device`` is cuda and there are not ``count`` GPUs.
    """
    if device == "cpu":
        return _cpu(memory_cap_gib)
    with nvml() as library:
        found = library.nvmlDeviceGetCount() if library else 0
        if library is None or found < count:
            raise LookupError(f"asked for {count} NVIDIA GPU(s), NVML sees {found}")
        handle = library.nvmlDeviceGetHandleByIndex(0)
        watts = library.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        return Machine(
            device="cuda",
            name=library.nvmlDeviceGetName(handle),
            count=count,
            memory_gib=round(library.nvmlDeviceGetMemoryInfo(handle).total / _GIB),
            memory_cap_gib=memory_cap_gib,
            power_limit_watts=round(watts / _POWER_BUCKET_WATTS) * _POWER_BUCKET_WATTS,
        )


def cap_refused(machine: Machine) -> str | None:
    """Why the memory of ``machine`` cannot be capped, None where it can or need not be."""
    if machine.device == "cpu" and machine.memory_cap_gib is not None:
        return "machine.memory_cap_gib caps the allocator of a GPU; on a CPU set it to null"
    return None


def arithmetic(machine: Machine) -> str:
    """What decides which bits the same code computes: the chip and the number of its multiprocessors, not how much memory it has or how
    fast that is; how many GPUs there are; an emulated cap. A card whose chip is not known is one of its own.
    """
    chip = _CHIPS.get(machine.name)
    return machine.model_copy(update={"name": chip, "memory_gib": 0, "power_limit_watts": None}).key if chip else machine.key


def driver_version() -> str | None:
    """The NVIDIA driver's version, None without one."""
    with nvml() as library:
        return str(library.nvmlSystemGetDriverVersion()) if library else None


def host_id() -> str:
    """A short hash that tells hosts apart without naming them."""
    parts = [platform.node()]
    for name in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError):
            parts.append(Path(name).read_text().strip())
    return hashlib.sha256(":".join(parts).encode()).hexdigest()[:12]


def _cpu(memory_cap_gib: int | None) -> Machine:
    import psutil

    return Machine(
        device="cpu",
        name=cpu_name(),
        count=psutil.cpu_count(logical=True) or 1,
        memory_gib=round(psutil.virtual_memory().total / _GIB),
        memory_cap_gib=memory_cap_gib,
    )


def cpu_name() -> str:
    """What the processor is called."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
