"""A fake of NVIDIA's management library, as much of it as the harness asks."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """What the library raises."""


def nvml(
    count: int, *, fails: bool = False, used: int = 2**20, processes: Sequence[int] = (), mig: bool | NVMLError = False
) -> SimpleNamespace:
    """A machine with ``count`` H100s; ``fails``: no driver; ``mig``: an error where the card knows no such mode."""

    def init() -> None:
        if fails:
            raise NVMLError("no driver")

    def mig_mode(_handle: Any) -> tuple[int, int]:
        if isinstance(mig, NVMLError):
            raise mig
        return int(mig), int(mig)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "NVIDIA H100 80GB HBM3",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=81559 * 2**20, used=used),
        nvmlDeviceGetPowerManagementLimit=lambda handle: 699_800,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=pid) for pid in processes],
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetHandleByUUID=lambda name: name.removeprefix("GPU-"),
        NVML_CLOCK_SM=1,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000_000,
        nvmlSystemGetDriverVersion=lambda: "580.159.04",
        nvmlSystemGetCudaDriverVersion=lambda: 13000,
    )
