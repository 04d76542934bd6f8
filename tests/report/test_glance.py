"""The first table of the page: who is fastest on each workload, before which other engine, and how sure that is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.record import Record
from harness.report.advice import nothing
from harness.report.glance import Line, glance
from harness.report.judged import judged
from harness.report.page import html, markdown
from harness.report.text import table
from harness.store import Results, Stored
from harness.updates import UpdatePair, pair_key
from tests.records import CPU, GPU, engine, record, repeats, results, sha256, steps, stored, workload
from tests.records import made as made_of

FASTER = [*repeats(engine("hf"), [100.0, 101.0, 99.0]), *repeats(engine("fused"), [200.0, 201.0, 199.0])]


def line(found: Results) -> Line:
    ((one,),) = (machine.lines for machine in glance(judged(found)))
    return one


def test_the_winner_and_how_far_the_next_engine_is() -> None:
    one = line(results(FASTER))
    assert (one.first, one.rate, one.beside, one.next, one.memory) == ("fused", "200.0", "", "hf", "1.50")
    assert one.lead == "2.00 times"
    assert one.sure.endswith("3 pairs")


def test_the_next_is_of_another_engine() -> None:
    other = repeats(engine("fused", micro_batch=2), [150.0, 151.0, 149.0])
    one = line(results([*FASTER, *other]))
    assert (one.first, one.next) == ("fused micro_batch=4", "hf")


def test_a_named_variant_of_the_same_engine_is_no_other_engine() -> None:
    named = engine("fused", memory_gib=8).model_copy(update={"variant": "within-8"})
    assert line(results([*FASTER, *repeats(named, [150.0, 151.0, 149.0])])).next == "hf"


def test_a_tie_says_so_and_still_gives_the_ratio() -> None:
    one = line(results([*repeats(engine("hf"), [100.0]), *repeats(engine("fused"), [117.0])]))
    assert one.beside == "shares the first place with 1 other"
    assert (one.lead, one.sure) == ("1.17 times", "one pair of runs: no verdict")


def test_who_trained_something_else_is_neither_first_nor_next() -> None:
    other = repeats(engine("other"), [300.0, 301.0, 299.0], losses=(9.0, 8.0, 7.0, 6.0))
    assert line(results([*FASTER, *other])).first == "fused"


def test_alone_on_another_host_and_nothing_at_all() -> None:
    alone = line(results(repeats(engine("hf"), [100.0])))
    assert (alone.first, alone.lead, alone.sure) == ("hf", "", "no other engine to compare with")
    apart = line(results([*repeats(engine("hf"), [100.0]), *repeats(engine("fused"), [117.0], host="host-2")]))
    assert (apart.lead, apart.sure) == ("", "no repeat on the same host")
    failed = line(results([stored(record(engine("hf"), status="oom", reason="out of memory"))]))
    assert (failed.first, failed.rate, failed.parity) == ("nothing ran to the end", "", "")


def test_two_repeats_that_say_nothing_neither_contradict_the_ranking_nor_show_an_endless_interval() -> None:
    """The geometric mean of these pairs has hf first, the medians have fused first."""
    found = results([*repeats(engine("hf"), [14000.0, 15924.0]), *repeats(engine("fused"), [20180.0, 10000.0])])
    one, printed = line(found), table(found)
    says = "two paired repeats that differ too much to say anything: run at least 3"
    assert (one.first, one.lead, one.sure) == ("fused", "1.009 times", says)
    assert f"fused measured 1.009 times the rate of hf by their medians, from {says}." in printed
    for page in (printed, html(found), markdown(found)):
        assert "confidence interval:" not in page
        assert " 0.000 to " not in page
    assert f"0.992 ({says})" in markdown(found)
    three = judged(results([*repeats(engine("hf"), [100.0, 50.0, 55.0]), *repeats(engine("fused"), [40.0, 120.0, 70.0])]))
    assert glance(three)[0].lines[0].sure.endswith("3 pairs"), "three are said with their interval, however wide"


def test_two_repeats_that_agree_are_believed() -> None:
    one = line(results([*repeats(engine("hf"), [100.0, 101.0]), *repeats(engine("fused"), [200.0, 202.0])]))
    assert (one.lead, one.sure) == ("2.00 times", "2.000 to 2.000, 2 pairs")


def test_what_never_kept_a_pace_ran_to_its_end() -> None:
    found = results([stored(record(engine("hf"), status="unsteady", reason="steps become faster", ran=steps()))])
    assert line(found).first == "no rate: not steady"
    assert nothing(judged(found)[0]) == "no rate: what ran to its end never kept a pace"
    assert "No rate was measured: what ran to its end never kept a pace; take more steps (train.steps)." in table(found)


def test_what_went_on_from_a_checkpoint_ran_to_its_end() -> None:
    whole = record(engine("hf"))
    assert whole.measurement is not None
    resumed = stored(whole.model_copy(update={"measurement": whole.measurement.model_copy(update={"resumed_at": (5,)})}))
    found = results([resumed, stored(record(engine("fused"), status="oom", reason="out of memory"))])
    assert line(found).first == "no rate: went on from a checkpoint"
    assert nothing(judged(found)[0]).startswith("no rate: what ran to its end")


@pytest.mark.parametrize("write", [html, markdown])
def test_the_page_begins_with_it_where_there_is_a_choice_of_workloads(write: object) -> None:
    assert callable(write)
    second = repeats(engine("hf"), [50.0], work=workload(model="other"))
    both = write(results([*FASTER, *second]))
    assert "2.00 times hf" in both.replace("<wbr>", "")
    assert both.index("at a glance") < both.index("Ranking" if write is html else "rank |")
    assert "at a glance" not in write(results(FASTER))


def test_a_machine_has_its_workloads_together() -> None:
    second = repeats(engine("hf"), [50.0], work=workload(model="other"))
    (machine,) = glance(judged(results([*FASTER, *second])))
    assert machine.name == CPU.key
    assert len(machine.lines) == 2


def test_other_sweeps_of_the_same_work_stand_below_the_one_whose_fastest_is_fastest() -> None:
    longer = repeats(engine("hf"), [110.0], work=workload(steps=60))
    other = repeats(engine("hf"), [900.0], work=workload(samples_per_step=4))
    (machine,) = glance(judged(results([*longer, *other, *FASTER])))
    assert [(work.first.rate, [one.again for one in work.also]) for work in machine.works] == [
        ("900.0", []),
        ("200.0", ["60 steps, seed 0"]),
    ]
    for page in (html(results([*FASTER, *longer])), markdown(results([*FASTER, *longer]))):
        assert page.count("also: 60 steps, seed 0") == 1


def test_a_fastest_that_was_measured_again_since_does_not_lead() -> None:
    def sitting(name: str, rate: float, steps: int, day: str, source: str) -> list[Stored]:
        made = repeats(engine(name), [rate], work=workload(steps=steps))
        return [replace(one, record=_of(one.record, f"2026-11-{day}T10:00:00.000+00:00", source)) for one in made]

    slower_now = [*sitting("fused", 300.0, 8, "23", "a"), *sitting("fused", 200.0, 12, "25", "b")]
    (machine,) = glance(judged(results(slower_now)))
    assert (machine.works[0].first.rate, machine.works[0].also[0].rate) == ("200.0", "300.0")
    beside = [*sitting("fused", 300.0, 8, "23", "a"), *sitting("hf", 90.0, 8, "23", "a"), *sitting("hf", 100.0, 12, "25", "b")]
    (machine,) = glance(judged(results(beside)))
    assert [one.rate for one in machine.lines] == ["300.0", "100.0"], "of the fastest nothing newer is known"


def test_workloads_made_to_judge_are_no_races() -> None:
    def tried(name: str, off: float = 0.0) -> tuple[Stored, Stored]:
        """A run and that of its first step."""
        whole = record(engine(name), losses=tuple(loss + off for loss in steps().losses))
        return stored(whole), stored(record(engine(name), work=whole.cell.workload.first_step, ran=steps(num_steps=1)))

    reference, *others = made = [tried("hf"), tried("fused"), tried("other", 0.5)]
    begun = [sorted(made_of(one[1].record.cell)["adapter_sha256"] for one in (reference, other)) for other in others]
    pairs = [UpdatePair(start_sha256=sha256("init"), trained_sha256=(one, two), norms=(1.0, 1.0), cosine=1.0) for one, two in begun]
    elsewhere = repeats(engine("hf"), [5.0], work=workload(model="big"))
    found = results([*(entry for both in made for entry in both), *elsewhere])
    found = replace(found, updates={pair_key(one.start_sha256, *one.trained_sha256): one for one in pairs})
    (machine,) = glance(judged(found))
    assert [work.first.title.split(" ")[0] for work in machine.works] == ["big"]
    (one,) = machine.judging
    assert one.verdicts == "2 settings: 1 same, 1 different; 1 reference: hf"
    for page in (html(found), markdown(found)):
        assert page.count("2 settings: 1 same, 1 different; 1 reference: hf") == 1
        assert "Of 2 settings 1 train the same as the reference and 1 train something else." in page
        assert "times the rate" not in page, "of twenty short steps nobody is the fastest"
    assert not glance(judged(replace(found, updates={})))[0].judging, "a first step that was compared with nothing judges nothing"


def test_an_older_sitting_of_the_same_work_stands_last_and_names_the_newer() -> None:
    """Which of two contradicting lines counts is seen: engines change, and old records stay."""

    def sitting(rates: list[float], steps: int, day: str, source: str, minute: int, variant: str | None = None) -> list[Stored]:
        made = repeats(engine("fused").model_copy(update={"variant": variant}), rates, work=workload(steps=steps))
        return [replace(one, record=_of(one.record, f"{day}T10:{minute:02}:00.000+00:00", source)) for one in made]

    old, new = sitting([100.0], 12, "2026-11-23", "a", 0), sitting([200.0], 40, "2026-11-27", "b", 1)
    (machine,) = glance(judged(results([*old, *new])))
    assert [(one.rate, one.outdated) for one in machine.lines] == [
        ("200.0", ""),
        ("100.0", "since then engines have changed: see 2026-11-27, 40 steps"),
    ]
    (machine,) = glance(judged(results([*old, *sitting([200.0], 40, "2026-11-27", "a", 1)])))
    assert not any(one.outdated for one in machine.lines), "the same engine: longer, and as true as the other"
    (machine,) = glance(judged(results([*old, *sitting([200.0], 40, "2026-11-27", "b", 1, variant="within-8.05")])))
    assert not any(one.outdated for one in machine.lines), "another setting of the engine does not say what this one does today"
    page = html(results([*old, *new]))
    assert "since then engines have changed: see 2026-11-27, 40 steps" in page
    assert page.count("Since then engines have changed") == 1, "the section says it, too"
    assert table(results([*old, *new])).count("Since then engines have changed: see 2026-11-27, 40 steps.") == 1, "and the terminal"


def test_what_failed_before_its_engine_changed_is_old_too() -> None:
    """A crash that was mended since does not stand among the answers of today."""
    crashed = stored(record(engine("fused"), status="crash", reason="TypeError", work=workload(steps=8)))
    old = [replace(crashed, record=_of(crashed.record, "2026-11-27T09:00:00.000+00:00", "a"))]
    new = [replace(one, record=_of(one.record, "2026-11-27T10:00:00.000+00:00", "b")) for one in repeats(engine("fused"), [200.0])]
    (machine,) = glance(judged(results([*old, *new])))
    assert [bool(one.outdated) for one in machine.lines] == [False, True]
    assert machine.lines[1].first == "nothing ran to the end"
    again = [replace(crashed, record=_of(crashed.record, "2026-11-27T11:00:00.000+00:00", "b"))]
    (machine,) = glance(judged(results([*again, *new])))
    assert not any(one.outdated for one in machine.lines), "it is what the engine does today"


def test_another_engine_that_cannot_win_is_not_passed_over_in_silence() -> None:
    other = repeats(engine("other"), [300.0, 301.0, 299.0], losses=(9.0, 8.0, 7.0, 6.0))
    assert line(results([*repeats(engine("hf"), [100.0]), *other])).sure == "no other engine that can win"


def test_a_workload_says_its_shape() -> None:
    one = line(results(FASTER))
    work = workload()
    assert one.title.endswith(f" · {work.train.samples_per_step}\u00a0×\u00a0{work.data.sequence_length}")
    assert one.facts.startswith(f"{work.train.samples_per_step} samples a step of ")
    single = line(results(repeats(engine("hf"), [100.0], work=workload(samples_per_step=1))))
    assert single.facts.startswith("1 sample a step of ")


@pytest.mark.parametrize(("stop_after", "says"), [(None, "60 steps"), (8, "8 of 60 steps"), (60, "60 steps")])
def test_a_run_that_was_stopped_early_does_not_pass_for_the_whole_one(stop_after: int | None, says: str) -> None:
    found = results(repeats(engine("hf"), [100.0], work=workload(steps=60, stop_after=stop_after)))
    assert f", {says}, seed 0" in line(found).facts
    assert f", {says}, seed 0, on " in table(found)
    assert f", {says}, seed 0" in markdown(found)


def test_two_files_under_one_name_are_told_apart() -> None:
    def of(path: object, sha256: str | None = None) -> Line:
        data = {"name": "jsonl", "source": "jsonl", "path": path, "sequence_length": 512, "sha256": sha256}
        return line(results(repeats(engine("hf"), [100.0], work=workload(data=data))))

    assert " · jsonl a.jsonl · 16" in of("a.jsonl").title
    assert " · jsonl b.jsonl and 1 more · 16" in of(["b.jsonl", "c.jsonl"]).title
    assert f" · jsonl {40 * 'x'}… · 16" in of(f"{99 * 'x'}.jsonl").title
    assert of("a.jsonl", 64 * "1").facts.endswith(", data sha-256 11111111"), "two of one name"
    named = workload(data={"name": "gsm8k", "source": "jsonl", "path": "package:some/gsm8k.jsonl", "sequence_length": 512})
    assert " · gsm8k · 16" in line(results(repeats(engine("hf"), [100.0], work=named))).title


def test_the_machine_that_was_measured_last_comes_first_and_sections_follow_the_table() -> None:
    def at(found: list[Stored], day: str) -> list[Stored]:
        return [replace(one, record=_of(one.record, f"2026-11-{day}T10:00:00.000+00:00", "a")) for one in found]

    here = at(repeats(engine("hf"), [50.0]), "23")
    there = at(repeats(engine("hf"), [60.0], machine=GPU, memory_gib=1.0), "27")
    for old, new in ((here, there), (at(there, "23"), at(here, "27"))):
        page = markdown(results([*old, *new]))
        names = [one[0].record.machine.key for one in (new, old)]
        assert page.index(f"## {names[0]} at a glance") < page.index(f"## {names[1]} at a glance")
        assert page.index(f"On {names[0]};") < page.index(f"On {names[1]};")
        assert "the newest of 2026-11-27 10:00 UTC." in page


def _of(one: Record, started_utc: str, source: str) -> Record:
    return one.model_copy(
        update={"provenance": one.provenance.model_copy(update={"started_utc": started_utc, "engine_fingerprint": source})}
    )
