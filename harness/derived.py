"""What follows from a record's raw values: rates, shares, FLOP utilisation, clocks, energy and money; null where it has no meaning."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from harness.flops import PEAK_FLOPS, recomputed_flops, step_flops
from harness.record import GpuSamples, Measurement, Record, Steps
from harness.spec import Lora
from harness.steady import steady

LEAST_ENERGY_SECONDS = 30.0  # the counter is updated every 20 to 100 ms, and a short window is mostly chance
_LAG_SHARE, _LAG_SECONDS = 0.01, 1e-4  # a device that ends this soon after the host has issued a step was waiting for it
# NVML's bits of nvmlClocksEventReasons, but for those that mean nothing bad: 1 (idle), 2 (set by the user), 256 (display).
_THROTTLES = {
    4: "power cap",
    8: "hardware slowdown",
    16: "sync boost",
    32: "thermal (driver)",
    64: "thermal (hardware)",
    128: "power brake",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """Of one record, over its steady steps; seconds, bytes, joules and dollars are per what the name says.

    ``judged``: whether the run was long enough to tell that it is steady. ``mfu``: operations needed over peak, attention counted
    without the causal mask (PaLM); ``mfu_causal``: with it; ``hfu``: with what was recomputed; ``mfu_of_gemm``: ``mfu`` against a large
    product measured in the same process. ``host_bound_fraction``: of the steps, those whose device waited for the host.
    """

    num_steady_steps: int
    judged: bool
    step_seconds: float | None
    tokens_per_second: float | None
    pad_fraction: float | None
    loss_fraction: float | None
    model_seconds: float | None
    first_step_seconds: float | None
    second_step_seconds: float | None
    host_bound_fraction: float | None
    flops_per_second: float | None
    mfu: float | None
    mfu_causal: float | None
    hfu: float | None
    mfu_of_gemm: float | None
    num_alloc_retries: int | None
    sm_clock_mhz: float | None
    throttled_by: tuple[str, ...] | None
    joules_per_token: float | None
    dollars_per_million_tokens: float | None


def derive(record: Record) -> Derived | None:
    """Everything derived from ``record``; None when it has no measurement, or was not made from start to end by one process."""
    measured = record.measurement
    if measured is None or measured.resumed_at:
        return None
    steps, window = measured.steps, steady(measured.steps)
    seconds = [steps.seconds[i] for i in window.steps]
    total, tokens = sum(seconds), sum(steps.tokens_input[i] for i in window.steps)
    rate = tokens / total if total > 0 else None
    startup, price = measured.startup, record.provenance.price
    parts = (startup.setup_seconds, startup.data_seconds, startup.import_seconds)
    return Derived(
        num_steady_steps=len(seconds),
        judged=window.judged,
        step_seconds=statistics.median(seconds) if seconds else None,
        tokens_per_second=rate,
        pad_fraction=_pad_fraction(steps),
        loss_fraction=_ratio(sum(steps.tokens_loss), sum(steps.tokens_input)),
        model_seconds=max(0.0, parts[0] - parts[1] - parts[2]) if None not in parts else None,  # type: ignore[operator]
        first_step_seconds=steps.seconds[0] if steps.seconds else None,
        second_step_seconds=steps.seconds[1] if len(steps.seconds) > 1 else None,
        host_bound_fraction=_host_bound_fraction(steps, window.steps),
        num_alloc_retries=_sum_of_known(memory.num_alloc_retries for memory in measured.memory),
        sm_clock_mhz=_clock(measured, window.steps),
        throttled_by=_throttled_by(measured, window.steps),
        joules_per_token=_joules_per_token(measured, window.steps, tokens),
        dollars_per_million_tokens=price.dollars_per_hour / 3600 / rate * 1e6 if price and rate else None,
        **_utilisation(record, measured, window.steps, total),
    )


def _utilisation(record: Record, measured: Measurement, window: range, seconds: float) -> dict[str, float | None]:
    work, steps = measured.work, measured.steps
    names = ("flops_per_second", "mfu", "mfu_causal", "hfu", "mfu_of_gemm")
    if work is None or seconds <= 0:
        return dict.fromkeys(names)
    lora = isinstance(record.cell.workload.method, Lora)

    def total(*, causal: bool) -> float:
        return sum(step_flops(work, i, steps.tokens_input[i], steps.tokens_loss[i], lora=lora, causal=causal) for i in window)

    again = [recomputed_flops(work, i, steps.tokens_input[i]) for i in window]
    needed = total(causal=False)
    all_done = None if None in again else needed + sum(value for value in again if value is not None)
    peak = PEAK_FLOPS.get(record.machine.name) if record.machine.device == "cuda" else None
    peak = peak * record.machine.count if peak else None
    gemm = measured.gemm_peak_flops
    return {
        "flops_per_second": needed / seconds,
        "mfu": _ratio(needed / seconds, peak),
        "mfu_causal": _ratio(total(causal=True) / seconds, peak),
        "hfu": None if all_done is None else _ratio(all_done / seconds, peak),
        "mfu_of_gemm": _ratio(needed / seconds, gemm * record.machine.count if gemm else None),
    }


def _pad_fraction(steps: Steps) -> float | None:
    """Of the positions processed, those that held no token; null where an engine left tokens out, which hides its padding."""
    share = _ratio(sum(steps.tokens_input), sum(steps.tokens_processed))
    return None if share is None or share > 1 else 1 - share


def _host_bound_fraction(steps: Steps, window: range) -> float | None:
    """The host issues a step and goes on; a device that ends the step at once had nothing left to do, and waited."""
    if steps.host_seconds is None or not window:
        return None
    ends = zip(accumulate(steps.seconds), accumulate(steps.host_seconds), strict=True)
    lags = [device - host for device, host in ends]
    bound = [lags[i] < max(_LAG_SECONDS, _LAG_SHARE * steps.seconds[i]) for i in window]
    return sum(bound) / len(bound)


def _clock(measured: Measurement, window: range) -> float | None:
    clocks = [clock for gpu, i in _samples(measured, window) if (clock := gpu.sm_clock_mhz[i]) is not None]
    return statistics.median(clocks) if clocks else None


def _throttled_by(measured: Measurement, window: range) -> tuple[str, ...] | None:
    """Null where nobody looked; empty where nothing held the clocks back."""
    seen = [bits for gpu, i in _samples(measured, window) if (bits := gpu.event_reasons[i]) is not None]
    return tuple(name for bit, name in _THROTTLES.items() if any(bits & bit for bits in seen)) if seen else None


def _joules_per_token(measured: Measurement, window: range, tokens: int) -> float | None:
    """The counters' rise over the samples inside the window, stretched to all of it; every GPU must have counted."""
    begin, end = _span(measured.steps, window)
    watts = []
    for gpu in measured.gpus:
        inside = [i for i, at in enumerate(gpu.seconds) if begin <= at <= end and gpu.energy_joules[i] is not None]
        if len(inside) < 2 or gpu.seconds[inside[-1]] - gpu.seconds[inside[0]] < LEAST_ENERGY_SECONDS:
            return None
        first, last = gpu.energy_joules[inside[0]], gpu.energy_joules[inside[-1]]
        assert first is not None
        assert last is not None
        watts.append((last - first) / (gpu.seconds[inside[-1]] - gpu.seconds[inside[0]]))
    return sum(watts) * (end - begin) / tokens if watts and tokens else None


def _samples(measured: Measurement, window: range) -> Iterable[tuple[GpuSamples, int]]:
    """Every GPU's samples whose time lies inside the steady window."""
    begin, end = _span(measured.steps, window)
    return [(gpu, i) for gpu in measured.gpus for i, at in enumerate(gpu.seconds) if begin <= at <= end]


def _span(steps: Steps, window: range) -> tuple[float, float]:
    """Begin and end of the window, in seconds since ready."""
    return sum(steps.seconds[: window.start]), sum(steps.seconds[: window.stop])


def _sum_of_known(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
