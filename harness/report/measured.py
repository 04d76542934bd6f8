"""What stands behind a variant's rate: medians over its repeats, as a table that shows only what has a meaning here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.derived import Derived, derive
from harness.floor import Floors
from harness.rank import Group, Variant
from harness.report.numbers import GIB, finite, gib, number
from harness.stats import median

_MOSTLY = 0.5  # of the steps


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the repeats of what ``harness.derived`` tells (``values``), and peaks over repeats, ranks and phases.

    ``chosen``: what the engine decided by itself in the first repeat.
    ``limit_fraction``: the rate over the rate at this machine's floor for the workload; null where nobody measured it.
    """

    values: Mapping[str, float | None]
    startup: Mapping[str, float | None]
    peaks: Mapping[str, int | None]
    limit_fraction: float | None
    throttled_by: tuple[str, ...] | None
    judged: bool
    chosen: Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Details:
    """A table: ``head`` and one row a variant, its label first. A column without a single value is not there."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def measured(variant: Variant, group: Group, floors: Floors) -> Measured:
    """The figures of ``variant``."""
    found = [one for run in variant.runs if (one := derive(run.record)) is not None]
    floor = floors.get((group.machine.key, group.workload.key))
    limit, rate = floor.tokens_per_second if floor else None, variant.tokens_per_second
    throttles = [one.throttled_by for one in found if one.throttled_by is not None]
    return Measured(
        values={
            field.name: _middle(found, field.name) for field in dataclasses.fields(Derived) if field.name not in ("judged", "throttled_by")
        },
        startup=_startup(variant, found),
        peaks={name: _peak(variant, f"peak_{name}_bytes") for name in ("allocated", "active", "reserved", "device", "rss")},
        limit_fraction=rate / limit if rate and limit else None,
        throttled_by=tuple(dict.fromkeys(name for names in throttles for name in names)) if throttles else None,
        judged=all(one.judged for one in found),
        chosen=next((run.record.measurement.chosen or {} for run in variant.runs if run.record.measurement), {}),
    )


def plain(of: Measured) -> dict[str, Any]:
    """For programs: strict JSON, null where something has no meaning or is not known."""
    return {
        **{name: finite(value) for name, value in of.values.items() if name != "tokens_per_second"},
        **{f"startup_{name}_seconds": finite(value) for name, value in of.startup.items()},
        **{f"peak_{name}_gib": None if size is None else size / GIB for name, size in of.peaks.items()},
        "limit_fraction": finite(of.limit_fraction),
        "throttled_by": None if of.throttled_by is None else list(of.throttled_by),
        "steady_judged": of.judged,
        "chosen": dict(of.chosen),
    }


def details(group: Group, floors: Floors) -> Details | None:
    """The table of ``group``; None when none of its variants ran."""
    ran = [variant for variant in group.variants if variant.runs]
    found = [measured(variant, group, floors) for variant in ran]
    columns = {title: [tell(one) for one in found] for title, tell in _COLUMNS.items()}
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [tuple(cells) for cells in zip([variant.label for variant in ran], *shown.values(), strict=True)]
    return Details(("variant", *shown), tuple(rows)) if rows and shown else None


def limit(of: Measured) -> str:
    """``87 %`` of the rate at the floor."""
    return _share(of.limit_fraction)


def remarks(of: Measured) -> str:
    """What a reader must know before trusting the rate."""
    said = []
    if not of.judged:
        said.append("too few steps to judge whether it was steady")
    waited = of.values["host_bound_fraction"]
    if waited is not None and waited > _MOSTLY:
        said.append(f"the GPU waited for the host in {_share(waited)} of the steps")
    if of.limit_fraction is not None and of.limit_fraction > 1:
        said.append("faster than the limit, which was measured on a busy machine: measure it again (python -m harness.limit)")
    retries = of.values["num_alloc_retries"]
    if retries:
        said.append(f"{retries:.0f} allocator retries: memory is short")
    if of.throttled_by:
        said.append(f"clocks held back by {', '.join(of.throttled_by)}")
    return "; ".join(said)


def _startup(variant: Variant, found: list[Derived]) -> dict[str, float | None]:
    startups = [run.record.measurement.startup for run in variant.runs if run.record.measurement]
    return {
        "process": _middle(startups, "process_seconds"),
        "import": _middle(startups, "import_seconds"),
        "data": _middle(startups, "data_seconds"),
        "model": _middle(found, "model_seconds"),
        "first_step": _middle(found, "first_step_seconds"),
        "second_step": _middle(found, "second_step_seconds"),
    }


def _middle(found: list[Any], name: str) -> float | None:
    known = [value for one in found if (value := getattr(one, name)) is not None]
    return median(known) if known else None


def _peak(variant: Variant, name: str) -> int | None:
    measurements = [run.record.measurement for run in variant.runs if run.record.measurement]
    return max((size for one in measurements for memory in one.memory if (size := getattr(memory, name)) is not None), default=None)


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}\u00a0%"


def _utilisation(of: Measured) -> str:
    names = {"mfu": "MFU", "mfu_causal": "causal", "hfu": "HFU", "mfu_of_gemm": "of a GEMM here"}
    shares = [f"{word} {_share(of.values[name])}" for name, word in names.items() if of.values[name] is not None]
    return ", ".join([*([f"{limit(of)} of the limit"] if of.limit_fraction else []), *shares])


def _tokens(of: Measured) -> str:
    names = {"pad_fraction": "padding", "loss_fraction": "supervised"}
    return ", ".join(f"{word} {_share(of.values[name])}" for name, word in names.items() if of.values[name] is not None)


def _memory(of: Measured) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in of.peaks.items() if size is not None)


def _startup_text(of: Measured) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number(seconds, 1)}" for name, seconds in of.startup.items() if seconds is not None)


def _chosen(of: Measured) -> str:
    """Sizes in GiB."""
    sizes = {name: f"{gib(int(value))} GiB" for name, value in of.chosen.items() if name.endswith("_bytes")}
    return "; ".join(f"{name.removesuffix('_bytes').replace('_', ' ')}: {sizes.get(name, value)}" for name, value in of.chosen.items())


def _energy(of: Measured) -> str:
    clock, joules, dollars = (of.values[name] for name in ("sm_clock_mhz", "joules_per_token", "dollars_per_million_tokens"))
    parts = {f"{number(clock, 0)} MHz": clock, f"{number(joules, 4)} J a token": joules, f"${number(dollars, 3)} a million tokens": dollars}
    return ", ".join(text for text, value in parts.items() if value is not None)


_COLUMNS: Mapping[str, Callable[[Measured], str]] = {
    "utilisation": _utilisation,
    "tokens": _tokens,
    "peak GiB": _memory,
    "start-up s": _startup_text,
    "chosen by the engine": _chosen,
    "clock, energy, money": _energy,
    "remarks": remarks,
}
