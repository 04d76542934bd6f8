"""What a step costs that needs no statistics: live bytes and operations on a CPU, allocated bytes, kernels and launches on a GPU."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness.data.tokens import StepTokens
from harness.engine import Chosen, Probe
from harness.errors import ConfigError, RecordError
from harness.record import Record, loads
from harness.spec import Spec, Workload, parse

if TYPE_CHECKING:
    from torch import Tensor

NUM_STEPS = 3  # that are counted: the first compiles and allocates; the other two are alike, unless something grows
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")  # and their Ex and ExC forms
_COPIES = ("Memcpy", "Memset")


class Counts(Spec):
    """Costs of each optimizer step of a counted run; null: no meaning on this device, or nobody can say (``notes`` have the reason).

    Bytes are of tensors: on a CPU the storages that went through torch's dispatcher and are alive, on a GPU what the allocator gave
    out. ``peak_bytes``: the most within the step, ``live_bytes``: at its end. ``num_operations``: dispatched to a CPU;
    ``num_kernels``: run by a GPU, ``num_launches``: asked for by the host (a replayed graph is one).
    """

    device: Literal["cpu", "cuda"]
    setup_peak_bytes: int
    peak_bytes: tuple[int, ...]
    live_bytes: tuple[int, ...]
    num_operations: tuple[int, ...] | None
    num_kernels: tuple[int, ...] | None
    num_launches: tuple[int, ...] | None
    notes: tuple[str, ...] = ()


class Counted(Spec):
    """A counted run: its record, whose times say nothing, and its counts, null when it did not end ok."""

    schema_version: Literal[1] = 1
    record: Record
    counts: Counts | None


def counted_part(workload: Workload) -> Workload:
    """What a counted run makes of ``workload``: its first steps, on the schedule of all of them."""
    train = workload.train.model_copy(update={"stop_after": min(NUM_STEPS, workload.train.num_steps)})
    return workload.model_copy(update={"train": train})


def loads_counted(text: str, source: str) -> Counted:
    """Read a counted run, its record upgraded. Raises RecordError naming ``source`` and what to do."""
    try:
        raw = json.loads(text)
        if raw["schema_version"] != 1:
            raise RecordError(f"{source}: schema {raw['schema_version']!r} of counts is not 1; update engine-room to read it")
        record = loads(json.dumps(raw["record"]), source)
        return Counted(record=record, counts=None if raw["counts"] is None else parse(Counts, raw["counts"]))
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise RecordError(f"{source}: not a counted run (truncated or edited): {error}; delete it and count again") from error


@contextlib.contextmanager
def counting(path: str | None, device: Literal["cpu", "cuda"], probe: Probe) -> Iterator[Probe]:
    """Count what runs inside the block, step by step, and write the :class:`Counts` to ``path``; None: count nothing.

    Yields the probe to hand to the engine. Counting slows a run down, so a counted run says nothing about time.
    """
    if path is None:
        yield probe
        return
    meter = _CudaMeter() if device == "cuda" else _CpuMeter()
    with _collected_by_hand(), meter:
        counted = _CountedProbe(probe, meter)
        yield counted
    Path(path).write_text(counted.counts(device).model_dump_json(indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _collected_by_hand() -> Iterator[None]:
    """When the collector comes by itself depends on every object of the process; here it comes at the end of each step."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already is not looked at again: a collection takes milliseconds, not a second
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


class _Step(Spec):
    peak_bytes: int
    live_bytes: int
    num_operations: int | None = None
    num_kernels: int | None = None
    num_launches: int | None = None


class _Meter(Protocol):
    notes: tuple[str, ...]

    def close(self) -> _Step:
        """What was counted since the last call."""


class _CountedProbe:
    """Passes on what the engine reports, and closes the meter's step with it."""

    def __init__(self, probe: Probe, meter: _Meter) -> None:
        self._probe, self._meter = probe, meter
        self._setup_peak = 0
        self._steps: list[_Step] = []

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        """The set-up is counted by its peak alone."""
        gc.collect()
        self._setup_peak = self._meter.close().peak_bytes
        self._probe.ready(chosen)

    def step(self, *, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens) -> None:
        """The step ends here; the garbage that it left is not held against the next one."""
        gc.collect()
        self._steps.append(self._meter.close())
        self._probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)

    def waits(self) -> AbstractContextManager[None]:
        """Nothing to count."""
        return self._probe.waits()

    def exchanges(self) -> AbstractContextManager[None]:
        """Nothing to count."""
        return self._probe.exchanges()

    def counts(self, device: Literal["cpu", "cuda"]) -> Counts:
        """All steps so far."""
        return Counts(
            device=device,
            setup_peak_bytes=self._setup_peak,
            peak_bytes=tuple(step.peak_bytes for step in self._steps),
            live_bytes=tuple(step.live_bytes for step in self._steps),
            num_operations=self._column("num_operations"),
            num_kernels=self._column("num_kernels"),
            num_launches=self._column("num_launches"),
            notes=self._meter.notes,
        )

    def _column(self, name: str) -> tuple[int, ...] | None:
        values = [getattr(step, name) for step in self._steps]
        return None if None in values else tuple(values)


class _CpuMeter:
    """Sees every operation that torch dispatches, forward and backward, and when the storages of its tensors come and go.

    What an operation allocates for itself and frees before it returns is not seen, nor is memory outside torch.
    """

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._live = self._peak = self._operations = 0
        self._mode = _dispatch_mode(self._saw)

    def __enter__(self) -> _CpuMeter:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)

    def close(self) -> _Step:
        """What was counted since the last call."""
        step = _Step(peak_bytes=self._peak, live_bytes=self._live, num_operations=self._operations)
        self._peak, self._operations = self._live, 0
        return step

    def _saw(self, tensors: list[Tensor]) -> None:
        self._operations += 1
        for tensor in tensors:
            with contextlib.suppress(NotImplementedError):  # a tensor without a storage
                self._note(tensor.untyped_storage())
        self._peak = max(self._peak, self._live)

    def _note(self, storage: Any) -> None:
        """A storage may be new, known, or resized since."""
        if storage.device.type != "cpu":
            return
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _dispatch_mode(saw: Any) -> Any:
    """A mode that tells ``saw`` the tensors of every dispatched operation."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            saw([leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)])
            return result

    return Watch()  # type: ignore[no-untyped-call]


class _CudaMeter:
    """The allocator's peaks, and what the profiler saw the device run; every step ends with the device idle."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()
        self._profile: Any = None

    def __enter__(self) -> _CudaMeter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)

    def close(self) -> _Step:
        """What was counted since the last call; the set-up, before the first call, is not profiled."""
        import torch

        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        kernels, launches = self._stop()
        step = _Step(
            peak_bytes=stats.get("allocated_bytes.all.peak", 0),
            live_bytes=stats.get("allocated_bytes.all.current", 0),
            num_kernels=kernels,
            num_launches=launches,
        )
        torch.cuda.reset_peak_memory_stats()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()
        return step

    def _stop(self) -> tuple[int | None, int | None]:
        if self._profile is None:
            return None, None
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)
        events = profile.events()
        kernels = sum(event.device_type.name == "CUDA" and not event.name.startswith(_COPIES) for event in events)
        if kernels == 0:
            self.notes = ("the profiler saw no kernel: is CUPTI missing, or counting of kernels not permitted?",)
            return None, None
        return kernels, sum(event.device_type.name == "CPU" and event.name.startswith(_LAUNCHES) for event in events)
