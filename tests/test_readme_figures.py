"""Every cell of the README's table of engines, and every rate of docs/peers.md, is what the records under results/ say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.rank import Group, Variant, compare_variants
from harness.report.judged import judged
from harness.store import load

TREE = Path(__file__).resolve().parent.parent
GROUPS = judged(load(TREE / "results"))
MODELS = {"1": "llama3_1b", "8": "llama3_8b"}
MODES = {"unsloth/nockpt+padded": "plain", "unsloth/nockpt+graphs": "graphs", "unsloth/nockpt": "packed"}


def table() -> dict[tuple[str, int], str]:
    """The cells by the beginning of their row and by column."""
    text = (TREE / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^\| \| 8B, .*?\n\n", text, re.MULTILINE | re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.strip().splitlines()]
    head, _, *rest = lines
    assert all(len(line) == len(head) for line in lines)
    rows = {"column": head[1:], **{line[0]: line[1:] for line in rest}}
    return {(name, place): cell.replace("**", "") for name, row in rows.items() for place, cell in enumerate(row)}


CELLS = table()
COLUMNS = sorted({place for _, place in CELLS})


def group(place: int) -> Group:
    """The group of results/ that a column shows: of several (trainings of other lengths) the one with most blocks of ours and Unsloth's, of
    as many the longest.
    """
    said = re.fullmatch(r"(\d)B( on NF4)?, (?:GSM8K|(\d+) × ([\d,]+))", CELLS["column", place])
    assert said is not None
    work = ("dense", int(said[3]), int(said[4].replace(",", ""))) if said[3] else ("gsm8k", 64, 1024)
    wanted = (MODELS[said[1]], "qlora" if said[2] else "lora", *work)
    found = [one for one in GROUPS if work_of(one) == wanted and CELLS["card", place] in one.machine.name and one.machine.count == 1]
    return max(filter(shows_both, found), key=lambda one: (num_blocks(one), one.workload.train.steps))


def work_of(one: Group) -> tuple[str, str, str, int, int]:
    """What a column's head says of a group."""
    work = one.workload
    return (work.model.name, work.method.name, work.data.name, work.train.samples_per_step, work.data.sequence_length)


def num_blocks(group: Group) -> int:
    """Repeats that ours and the faster of Unsloth's, nothing recomputed, have in common."""
    ours, theirs = pair(group)
    between = compare_variants(ours, theirs).interval
    return between.n if between else 0


def pair(group: Group) -> tuple[Variant, Variant]:
    variants = {variant.label: variant for variant in group.variants if variant.runs}
    ours, theirs = without_budget(variants), fastest(variants, "unsloth/nockpt")
    assert ours is not None
    assert theirs is not None
    return ours, theirs


def without_budget(variants: Mapping[str, Variant]) -> Variant | None:
    """The fastest of ours, whatever its micro-batch, that may use all memory."""
    return fastest({label: one for label, one in variants.items() if re.fullmatch(r"fused( micro_batch=\d+)?", label)}, "fused")


def shows_both(group: Group) -> bool:
    """Whether ours ran there and Unsloth with nothing recomputed, as in every column."""
    variants = {variant.label: variant for variant in group.variants if variant.runs}
    return without_budget(variants) is not None and fastest(variants, "unsloth/nockpt") is not None


def figure(variant: Variant) -> str:
    assert variant.tokens_per_second is not None
    assert variant.peak_allocated_bytes is not None
    return f"{variant.tokens_per_second:,.0f} ({variant.peak_allocated_bytes / 2**30:.1f})"


def fastest(variants: Mapping[str, Variant], *names: str) -> Variant | None:
    """Of those of ``variants`` whose label begins with one of ``names``."""
    able = [one for label, one in variants.items() if label.startswith(names)]
    return max(able, key=lambda one: one.tokens_per_second or 0.0, default=None)


def modes(variants: Mapping[str, Variant]) -> str:
    """Unsloth's, nothing recomputed, that have a rate, the fastest first, with their runs."""
    ran = [one for label, one in variants.items() if label in MODES and one.rates]
    ran.sort(key=lambda one: one.tokens_per_second or 0.0, reverse=True)
    return ", ".join(f"{MODES[one.label]} {len(one.rates)}" for one in ran)


@pytest.mark.parametrize("place", COLUMNS)
def test_a_column_of_the_readme_is_what_its_records_say(place: int) -> None:
    shown = group(place)
    variants = {variant.label: variant for variant in shown.variants if variant.runs}
    ours, theirs = pair(shown)
    between = compare_variants(ours, theirs).interval
    assert between is not None
    reach = f" ({between.low:.3f} to {between.high:.3f})" if between.n > 1 else ""
    expected = {
        "`fused`, ours": ours,
        "Unsloth, nothing recomputed": theirs,
        "Axolotl": fastest(variants, "axolotl"),
        "transformers + peft, the best": fastest(variants, "hf/best"),
        "transformers + peft as it comes": fastest(variants, "hf/default", "hf/ckpt"),
        "little memory: Unsloth": fastest(variants, "unsloth/default"),
        "little memory: `fused`": fastest(variants, "fused memory_gib=17.7", "fused/within-17.7"),
    }
    said = {name: cell for (name, column), cell in CELLS.items() if column == place}
    for begin, variant in expected.items():
        (cell,) = (cell for name, cell in said.items() if name.startswith(begin))
        assert cell == (figure(variant) if variant else ""), begin
    assert said["`fused` ÷ Unsloth, 98 % interval"] == f"{between.ratio:.2f}{reach}"
    assert said["blocks that the two share"] == str(between.n)
    assert said["… the modes of it that ran, runs of each"] == modes(variants)


def test_every_rate_of_the_peers_page_is_one_of_a_record() -> None:
    rates = {f"{rate:,.0f}" for one in GROUPS for variant in one.variants for rate in (*variant.rates, variant.tokens_per_second or 0.0)}
    rows = [
        line for line in (TREE / "docs" / "peers.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `") and " (" in line
    ]
    said = [rate for line in rows for rate in re.findall(r"(?<![\d,])\d{1,3},\d{3}(?!,?\d)", line)]
    assert len(said) >= 20
    assert set(said) <= rates
