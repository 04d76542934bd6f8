"""The plots of a group: what they say in words, what pointing at them tells, the look of a variant, and odd records."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree
from collections.abc import Iterable

from harness.report.judged import judged
from harness.report.page import html as page
from harness.report.plots import COLOURS, MOST_DRAWN, Plot, looks, plots
from tests import records
from tests.records import engine, repeats, results
from tests.report.test_report import FASTER, HOSTILE, SLOWER, parsed


def alts(drawn: Iterable[Plot]) -> list[str]:
    """What each plot says to those who do not see it; it must be well-formed."""
    return [xml.etree.ElementTree.fromstring(plot.svg).attrib["aria-label"] for plot in drawn]


def test_every_plot_has_a_description_and_units() -> None:
    results_ = results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER)])
    (group,) = judged(results_)
    drawn = plots(group, looks([group]))
    said = alts(drawn)
    assert [alt.split(":")[0] for alt in said] == ["Tokens per second of every repeat", "Memory against speed", "Training loss"]
    assert "fused 200.0, 201.0, 199.0" in said[0]
    shown = [attributes for tag, attributes in parsed(page(results_)).tags if tag == "svg"]
    assert [(one["role"], one["aria-label"]) for one in shown] == [("img", alt) for alt in said]
    for plot, unit in zip(drawn, ("tokens/s", "peak resident memory (RSS), GiB", "training loss, nats per token"), strict=True):
        assert f">{unit}</text>" in plot.svg


def test_whoever_points_at_a_mark_or_a_curve_reads_what_it_is() -> None:
    (group,) = judged(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER)]))
    speed, memory, loss = (re.findall("<title>(.*?)</title>", plot.svg) for plot in plots(group, looks([group])))
    assert speed[:4] == [*(f"fused, repeat {i}: {rate:.1f} tokens/s" for i, rate in enumerate(FASTER)), "hf, repeat 0: 100.0 tokens/s"]
    assert memory == ["fused 1.50 GiB at 200.0 tokens/s", "hf 1.50 GiB at 100.0 tokens/s"]
    assert len(loss) == 6 + 2, "a curve a run, and a mark a variant"
    assert loss[0].startswith("fused, repeat 0: from ")


def test_plots_are_the_same_for_the_same_records() -> None:
    (group,) = judged(results([*repeats(engine("hf"), SLOWER), *repeats(engine("fused"), FASTER)]))
    assert plots(group, looks([group])) == plots(group, looks([group]))


def test_plots_survive_nan_hostile_labels_one_step_and_missing_memory() -> None:
    short = records.workload(steps=1, warmup_steps=0)
    odd = [
        *repeats(engine("hf"), SLOWER, work=short, losses=(math.nan,)),
        *repeats(engine("evil", note=HOSTILE), [90.0], work=short),
        *repeats(engine("evil", note="$"), [90.0], work=short),
    ]
    bare = []
    for one in odd:
        assert one.record.measurement is not None
        measured = one.record.measurement.model_copy(update={"memory": ()})
        bare.append(dataclasses.replace(one, record=one.record.model_copy(update={"measurement": measured})))
    for entries, count in ((odd, 3), (bare, 2)):
        (group,) = judged(results(entries))
        drawn = plots(group, looks([group]))
        assert len(alts(drawn)) == count
        assert "3 values cannot be drawn" in drawn[-1].svg


def test_of_very_many_variants_the_first_are_drawn_and_all_are_listed() -> None:
    many = [one for place in range(MOST_DRAWN + 2) for one in repeats(engine("fused", micro_batch=place + 1), [1000.0 - place])]
    (group,) = judged(results(many))
    drawn = plots(group, looks([group]))
    assert all(plot.title.endswith(f"(the first {MOST_DRAWN} of {MOST_DRAWN + 2} variants)") for plot in drawn)
    assert f"micro_batch={MOST_DRAWN + 2}" not in drawn[0].svg
    assert f"micro_batch={MOST_DRAWN + 2}" in page(results(many))


def test_a_variant_looks_the_same_in_every_group_and_no_two_look_alike() -> None:
    many = [one for i in range(20) for one in repeats(engine(f"e{i}"), [100.0 + i])]
    other = repeats(engine("e3"), [5.0], work=records.workload(seed=3))
    look = looks(judged(results([*many, *other])))
    assert len(look) == 20
    assert len({(one.colour, one.shape) for one in look.values()}) == 20
    assert len({one.colour for one in list(look.values())[: len(COLOURS)]}) == len(COLOURS)


def test_what_often_stands_side_by_side_has_another_colour_whatever_else_there_is() -> None:
    """More labels than colours over the whole report: they must share, but not in the group where both are."""
    others = [repeats(engine(f"e{i}"), [100.0], work=records.workload(seed=i)) for i in range(2 * len(COLOURS) - 1)]
    pairs = [repeats(engine("fused"), [200.0], work=records.workload(seed=i)) for i in range(2 * len(COLOURS) - 1)]
    many = repeats(engine("unsloth"), [90.0], work=records.workload(seed=0)) + repeats(
        engine("unsloth"), [90.0], work=records.workload(seed=1)
    )
    found = judged(results([one for group in [*others, *pairs, many] for one in group]))
    look = looks(found)
    for group in found:
        assert len({look[variant.label].colour for variant in group.variants}) == len(group.variants)
