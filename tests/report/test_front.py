"""Who is on the front of speed against memory, what an engine chose, and how the page tells it."""

from __future__ import annotations

from dataclasses import replace

from harness.rank import Group
from harness.report.front import front, stairs, told
from harness.report.judged import judged
from harness.report.page import html, markdown
from harness.store import Results
from tests.records import engine, repeats, results


def three() -> Results:
    lean = repeats(engine("hf"), [100.0, 101.0, 99.0], memory_gib=1.0)
    fast = repeats(engine("fused"), [200.0, 201.0, 199.0], memory_gib=3.0)
    return results([*lean, *fast, *repeats(engine("slow"), [90.0, 91.0, 89.0], memory_gib=2.0)])


def of(found: Results) -> Group:
    (group,) = judged(found)
    return group


def test_the_front_leaves_out_who_is_beaten_in_both() -> None:
    assert [one.label for one in front(of(three()))] == ["hf", "fused"]
    assert stairs(of(three())) == [(100.0, 1.0), (100.0, 3.0), (200.0, 3.0)]


def test_of_equal_memory_the_faster_one_counts() -> None:
    group = of(results([*repeats(engine("hf"), [100.0]), *repeats(engine("fused"), [200.0])]))
    assert [one.label for one in front(group)] == ["fused"]
    assert told(group) is None, "one member leaves no choice"


def test_who_cannot_win_is_not_on_it() -> None:
    other = repeats(engine("other"), [300.0, 301.0, 299.0], memory_gib=0.5, losses=(9.0, 8.0, 7.0, 6.0))
    group = of(results([*three().stored, *other]))
    assert not next(one for one in group.variants if one.label == "other").can_win
    assert [one.label for one in front(group)] == ["hf", "fused"]


def test_a_lean_variant_is_held_against_what_needs_as_much() -> None:
    rival = repeats(engine("near"), [50.0, 50.5, 49.5], memory_gib=1.04)
    far = repeats(engine("far"), [60.0, 61.0, 59.0], memory_gib=1.06)
    said = told(of(results([*three().stored, *rival, *far])))
    assert said
    assert said.endswith(" In no more memory than another engine: hf has 2.00 times the rate of near (1.04 GiB; 2.000 to 2.000, 3 pairs).")
    assert "In no more memory" not in (told(of(three())) or "")


def test_the_page_says_and_draws_it() -> None:
    said = "Where memory is short: hf 100.0 tokens/s in 1.00 GiB, fused 200.0 tokens/s in 3.00 GiB; every other variant is slower"
    assert said in html(three())
    assert "Where memory is short: hf" in markdown(three())
    assert "the line is the best speed of every budget" in html(three())


def test_what_an_engine_chose_stands_behind_its_rate() -> None:
    chosen = {"plan": "again gate_up x3", "loss_chunk": 512, "predicted_peak_bytes": 3 * 2**29}
    found = []
    for stored in three().stored:
        assert stored.record.measurement is not None
        mine = chosen if stored.record.cell.engine.name == "fused" else None
        measurement = stored.record.measurement.model_copy(update={"chosen": mine})
        found.append(replace(stored, record=stored.record.model_copy(update={"measurement": measurement})))
    page = html(results(found))
    assert "plan: again gate_up x3; loss chunk: 512; predicted peak: 1.50 GiB" in page
    assert "chosen by the engine" not in html(three()), "a column in which nobody says anything is not there"
