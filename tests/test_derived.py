"""What follows from raw values, by hand; and that nothing without a meaning is shown, not even as zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from harness import report
from harness.derived import Derived, derive
from harness.floor import Floor
from harness.record import GpuSamples, Price, Record, Work
from harness.spec import Full
from harness.store import Results
from tests import records

H100 = records.GPU.model_copy(update={"name": "NVIDIA H100 80GB HBM3"})
NUM_STEPS = 50
TOKENS, LABELS, PROCESSED, SQUARES = 8000, 6000, 10_000, 16_000_000
LAYERS, HEAD, ADAPTERS, WIDTH = 10**9, 10**8, 10**7, 10**5
NEEDED = 4 * LAYERS * TOKENS + 6 * ADAPTERS * TOKENS + 4 * HEAD * LABELS + 12 * WIDTH * SQUARES
ATTENTION = 12 * WIDTH * SQUARES
WORK = Work(
    convention="palm", layer_parameters=LAYERS, head_parameters=HEAD, adapter_parameters=ADAPTERS, attention_size=WIDTH,
    squared_lengths=(SQUARES,) * NUM_STEPS, recomputed_fraction=1.0,
)  # fmt: skip


def gpu_record(*, machine: Any = H100, seconds: float = 1.0, host: float = 0.2, **changed: Any) -> Record:
    """Fifty steps of one second; a sample every half second, 700 W, and the first of all steps slow."""
    times = tuple(i * 0.5 for i in range(2 * NUM_STEPS + 1))
    samples = GpuSamples(
        rank=0, gpu="ab", seconds=times, sm_clock_mhz=(300, *[1755] * (len(times) - 1)), event_reasons=(64, *[4, 1] * NUM_STEPS),
        energy_joules=tuple(1e6 + 700 * at for at in times),
    )  # fmt: skip
    of = records.record(
        records.engine("hf", compute_dtype="bfloat16"), machine=machine, work=records.workload(steps=NUM_STEPS),
        seconds=(seconds,) * NUM_STEPS, host_seconds=(host,) * NUM_STEPS, reserved_bytes=(2**30,) * NUM_STEPS,
        compiles=(3, *[0] * (NUM_STEPS - 1)),
        tokens_input=(TOKENS,) * NUM_STEPS, tokens_loss=(LABELS,) * NUM_STEPS, tokens_processed=(PROCESSED,) * NUM_STEPS,
    )  # fmt: skip
    assert of.measurement is not None
    startup = of.measurement.startup.model_copy(update={"setup_seconds": 10.0, "data_seconds": 0.5, "import_seconds": 4.0})
    update = {"startup": startup, "gpus": (samples,), "work": WORK, "gemm_peak_flops": 700e12, **changed}
    provenance = of.provenance.model_copy(update={"price": Price(dollars_per_hour=3.6, date="2026-11-24")})
    return of.model_copy(update={"measurement": of.measurement.model_copy(update=update), "provenance": provenance})


def derived(of: Record) -> Derived:
    found = derive(of)
    assert found is not None
    return found


def test_every_figure_of_a_gpu_run_by_hand() -> None:
    found = derived(gpu_record())
    assert (found.num_steady_steps, found.judged, found.step_seconds, found.tokens_per_second) == (NUM_STEPS - 1, True, 1.0, TOKENS)
    assert (found.pad_fraction, found.loss_fraction) == (pytest.approx(0.2), 0.75)
    assert (found.model_seconds, found.first_step_seconds, found.second_step_seconds) == (5.5, 1.0, 1.0)
    assert found.flops_per_second == pytest.approx(NEEDED)
    assert found.mfu == pytest.approx(NEEDED / 989.4e12)
    assert found.mfu_causal == pytest.approx((NEEDED - ATTENTION / 2) / 989.4e12)
    forward = 2 * (LAYERS + ADAPTERS) * TOKENS + 4 * WIDTH * SQUARES
    assert found.hfu == pytest.approx((NEEDED + forward) / 989.4e12)
    assert found.mfu_of_gemm == pytest.approx(NEEDED / 700e12)
    assert found.num_alloc_retries == 0
    assert found.sm_clock_mhz == 1755, "what came before the steady window does not count"
    assert found.throttled_by == ("power cap",), "heat was seen before the steady window only, and idling is no throttle"
    assert found.joules_per_token == pytest.approx(700 / TOKENS)
    assert found.dollars_per_million_tokens == pytest.approx(3.6 / 3600 / TOKENS * 1e6)


def test_full_fine_tuning_also_pays_for_the_gradients_of_weights() -> None:
    of = gpu_record()
    full = of.cell.workload.model_copy(update={"method": Full(name="full")})
    work = WORK.model_copy(update={"adapter_parameters": 0})
    assert of.measurement is not None
    trained = of.model_copy(
        update={"cell": of.cell.model_copy(update={"workload": full}), "measurement": of.measurement.model_copy(update={"work": work})}
    )
    assert derived(trained).flops_per_second == pytest.approx(6 * LAYERS * TOKENS + 6 * HEAD * LABELS + ATTENTION)


def test_a_gpu_that_is_not_in_the_table_has_no_mfu_but_its_own_product() -> None:
    found = derived(gpu_record(machine=H100.model_copy(update={"name": "NVIDIA H100 80GB HBM3 rev B"})))
    assert (found.mfu, found.mfu_causal, found.hfu) == (None, None, None)
    assert found.mfu_of_gemm == pytest.approx(NEEDED / 700e12)


def test_a_device_that_keeps_up_with_the_host_was_waiting_for_it() -> None:
    assert derived(gpu_record(host=0.2)).host_bound_fraction == 0.0
    assert derived(gpu_record(host=1.0)).host_bound_fraction == 1.0


def test_energy_needs_thirty_seconds_and_what_the_engine_does_not_tell_is_not_known() -> None:
    assert derived(gpu_record(seconds=0.5)).joules_per_token is None
    assert derived(gpu_record(seconds=0.65)).joules_per_token is not None
    silent = derived(gpu_record(work=WORK.model_copy(update={"recomputed_fraction": None})))
    assert silent.hfu is None
    assert silent.mfu is not None
    unknown = derived(gpu_record(work=None, work_unknown="no formula"))
    assert (unknown.flops_per_second, unknown.mfu) == (None, None)


def test_on_a_cpu_nothing_of_a_gpu_is_there() -> None:
    found = derived(records.record())
    assert found.tokens_per_second == pytest.approx(1000.0)
    names = "host_bound_fraction mfu mfu_causal hfu mfu_of_gemm num_alloc_retries sm_clock_mhz throttled_by joules_per_token"
    assert {name: getattr(found, name) for name in names.split()} == dict.fromkeys(names.split())


def behind(of: Record, **floors: Any) -> dict[str, str]:
    """The row below *Behind the rates* in the Markdown report."""
    lines = report.markdown(dataclasses.replace(Results((records.stored(of),), ()), **floors)).splitlines()
    start = lines.index("### Behind the rates")
    head, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[start + 2], lines[start + 4]))
    return dict(zip(head, row, strict=True))


def test_the_report_shows_what_is_known_and_no_column_of_nothing() -> None:
    floor = Floor(
        machine=H100.key, workload=gpu_record().cell.workload.key, compute_dtype="bfloat16", tokens_per_step=TOKENS, forward_seconds=0.3,
        backward_seconds=0.3, attention_seconds=0.2, attention_by="flash", measured_utc="2026-11-24", torch="2",
    )  # fmt: skip
    found = behind(gpu_record(), floors={(floor.machine, floor.workload): floor})
    assert found["utilisation"].startswith(f"80.0 % of the limit, MFU {100 * NEEDED / 989.4e12:.1f} %, causal ")
    assert found["clock, energy, money"] == "1755 MHz, 0.0875 J a token, \\$0.125 a million tokens"
    assert "clocks held back by power cap" in found["remarks"]
    slow = floor.model_copy(update={"forward_seconds": 0.9})
    assert "measure it again" in behind(gpu_record(), floors={(floor.machine, floor.workload): slow})["remarks"]
    on_cpu = behind(records.record())
    assert list(on_cpu) == ["variant", "tokens", "peak GiB", "start-up s", "remarks"]
    assert on_cpu["peak GiB"] == "rss 1.50"
    assert "too few steps" in on_cpu["remarks"]
