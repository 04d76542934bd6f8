"""A search begins with what stored records know, says so, and does not believe what its own looks contradict."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from harness.config import request, single
from harness.engine import Machine
from harness.record import Record
from harness.store import Stored, load
from harness.tune.__main__ import asked
from harness.tune.asked import Ask, Result, Told
from harness.tune.entrants import Entrants, Layouts, candidates, entrants
from harness.tune.experience import Experience, Lesson
from harness.tune.lessons import Searching, but_looks_of, experience
from harness.tune.observed import result_of
from harness.tune.scale import capacity_bytes, scale_of
from harness.tune.search import Rules, Search, search
from harness.tune.show import state
from harness.tune.space import Candidate, Facts, Space
from tests.tune.spaces import SCALE, machine, space

RESULTS = Path(__file__).resolve().parents[2] / "results"
H100 = "NVIDIA H100 80GB HBM3"
ENGINES = ("fused", "hf", "fsdp", "deepspeed", "unsloth")
PLANNED = "model=llama3_8b method=lora data=dense data.num_samples=64 train=default train.steps=500 budget_minutes=8"  # docs/tune.md
FUSED_TOKENS_PER_SECOND = 17_600.0  # as the committed records have it at 4 x 2,048


@functools.cache
def committed() -> tuple[Record, ...]:
    return tuple(stored.record for stored in load(RESULTS).stored)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every package is installed."""
    monkeypatch.setattr("harness.tune.entrants._lack", lambda _: None)
    monkeypatch.setattr("engines.hf._liger_reasons", lambda *_: [])


def planned(name: str = H100, device: str = "cuda") -> tuple[Entrants, Searching]:
    """The 8B line of docs/tune.md on a GPU of this name."""
    found = entrants([*asked(shlex.split(PLANNED)).overrides, "machine=cuda"], ENGINES)
    workload = request(found.first).cell.workload
    card = Machine(device=cast("Any", device), name=name, count=1, memory_gib=80, power_limit_watts=700)
    model = cast("dict[str, Any]", workload.model.config)
    of, _ = candidates(found, Layouts(workload, cast("Any", None)), card, model)  # even samples: no token file is read
    return found, Searching(workload=workload, machine=card, model=model, space=of, scale=scale_of(model, workload))


def begun(records: Sequence[Record], name: str = H100, **rules: Any) -> Search:
    found, of = planned(name)
    known = experience(found.configs, records, of, lambda _: ())
    return Search(of.space, of.scale, capacity_bytes(of.machine), Rules(planned_steps=500, **rules), known)


def as_foretold(policy: Search, pace: float) -> Any:
    """A machine that does what is foretold, but for ``fused``, which has this pace."""
    forecasts = policy.view([]).forecasts

    def measure(ask: Ask) -> Result:
        one = ask.candidate
        step = one.facts.positions / pace if one.engine == "fused" else forecasts[one].step.middle
        took = forecasts[one].startup_seconds
        peak = forecasts[one].memory.middle
        return Result(outcome="ok", cost_seconds=took + 8 * step, step_seconds=step, startup_seconds=took, peak_bytes=peak)

    return measure


@pytest.mark.usefixtures("peers")
def test_what_the_records_of_a_gpu_know_to_be_fastest_is_looked_at_first() -> None:
    """8B on an H100 in 8 minutes: a search that knew nothing spent them on eight others and never tried ``fused`` (2026-11-27)."""
    policy = begun(committed())
    first = policy.view([]).next
    assert first is not None
    assert first.candidate.engine == "fused"
    assert "NVIDIA H100 80GB HBM3: " in policy.experience.sentence
    assert "0 of this work" not in policy.experience.sentence


@pytest.mark.usefixtures("peers")
def test_so_it_is_by_records_of_other_work_alone_and_the_bound_ends_the_search() -> None:
    policy = begun([record for record in committed() if record.cell.workload.train.samples_per_step != 16])
    assert "NVIDIA H100 80GB HBM3: 0 of this work" in policy.experience.sentence
    begins = policy.view([])
    assert begins.next is not None
    assert begins.next.candidate.engine == "fused"
    tokens = begins.next.candidate.facts.positions / begins.forecasts[begins.next.candidate].step.middle
    assert tokens == pytest.approx(FUSED_TOKENS_PER_SECOND, rel=0.06)

    told = search(policy, as_foretold(policy, FUSED_TOKENS_PER_SECOND))
    view = policy.view(told)
    assert view.incumbent is not None
    assert view.incumbent.engine == "fused"
    assert "nothing left can take less than" in str(view.stopped)
    looks = [ask.candidate.engine for ask, _ in told if ask.steps == 8]
    assert len(looks) <= 8
    assert not {"fsdp", "deepspeed"} & set(looks), "by the records they are far behind on one GPU"


@pytest.mark.usefixtures("peers")
def test_of_another_kind_of_gpu_ratios_carry_over() -> None:
    policy = begun(committed(), "NVIDIA of tomorrow")
    assert policy.experience.sentence.endswith("none of this kind of GPU, so that only ratios carry over")
    view = policy.view([])
    assert view.next is not None
    assert view.next.candidate.engine == "fused"
    assert view.forecasts[view.next.candidate].step.deviation > 2, "how fast it is, nobody knows"
    slow = as_foretold(policy, FUSED_TOKENS_PER_SECOND / 5)(view.next)
    after = policy.view([(view.next, slow)])
    unsloth = min(forecast.total_seconds for one, forecast in after.forecasts.items() if one.engine == "unsloth")
    assert unsloth > 4 * 1_100, "where one engine is five times slower than on an H100, so are the others"
    assert not after.contradicted, "of this kind of GPU nothing had been said"


def lied(on: Any, wrong: Mapping[str, float]) -> Experience:
    """Lessons of other work, made of the truth about every seventh candidate and, for the engines in ``wrong``, of a factor."""
    lessons = []
    for one in on.space.candidates[::7]:
        if on.peak_bytes(one) <= on.capacity_bytes:
            other = replace(one, work="made up: other work", facts=replace(one.facts, scale=SCALE))
            seconds = on.step_seconds(one) * wrong.get(one.engine, 1.0)
            lessons.append(Lesson(other, seconds, 30.0, on.peak_bytes(one)))
    return Experience(tuple(lessons), "made up", True, SCALE)


def regret(seed: int, wrong: Mapping[str, float]) -> tuple[float, list[Told]]:
    on = machine(space(), seed)
    totals = {one: total for one in on.space.candidates if (total := on.total_seconds(one, 1000)) is not None}
    by_engine = {engine: min(total for one, total in totals.items() if one.engine == engine) for engine in on.space.expected}
    ranked = sorted(by_engine, key=lambda engine: by_engine[engine])
    named = {ranked[int(place)]: factor for place, factor in wrong.items()}
    policy = Search(on.space, SCALE, on.capacity_bytes, Rules(planned_steps=1000, most_runs=8), lied(on, named))
    told = search(policy, on.measure)
    incumbent = policy.view(told).incumbent
    assert incumbent is not None
    return totals[incumbent] / min(totals.values()) - 1, told


@pytest.mark.parametrize("seed", range(3))
def test_experience_that_is_wrong_costs_a_look_and_not_the_answer(seed: int) -> None:
    """By the records the slowest engine is by far the fastest; on this machine it is not."""
    lost, told = regret(seed, {"-1": 0.4})
    assert lost <= 0.03
    assert len(told) <= 8


def test_an_engine_that_its_own_looks_contradict_teaches_nothing_more() -> None:
    on = machine(space(), 0)
    policy = Search(on.space, SCALE, on.capacity_bytes, Rules(planned_steps=1000), lied(on, {"hf": 0.4}))
    first = policy.view([]).next
    assert first is not None
    assert first.candidate.engine == "hf"
    answer = (first, on.measure(first))
    before, after = policy.view([]).forecasts, policy.view([answer]).forecasts
    other = next(one for one in on.space.candidates if one.engine == "hf" and one != first.candidate)
    assert after[other].total_seconds > 1.5 * before[other].total_seconds
    assert policy.view([answer]).next != first
    assert policy.view([answer]).contradicted == ("hf",)
    assert policy.experience.after(["hf"]).endswith("; contradicted here and left out: hf")
    assert "contradicted here and left out: hf" in "\n".join(state(policy.view([answer]), [cast("Any", answer)], 0.0, None, 1000))


def one_record() -> Record:
    """A committed look of a tune: ``unsloth`` on an H100."""
    found = [record for record in committed() if record.cell.engine.name == "unsloth" and record.machine.name == H100]
    return next(one for one in found if one.status == "ok" and one.cell.workload.train.samples_per_step == 16)


@pytest.mark.usefixtures("peers")
def test_own_looks_are_answers_and_not_experience() -> None:
    """Whatever a search has recorded, it goes on as it began."""
    _, of = planned()
    mine = Stored(one_record(), "", None, None)
    assert mine.record.cell.workload.train.stop_after == 8
    copied = Stored(mine.record.model_copy(deep=True), "", None, None)
    assert but_looks_of(of.workload, [copied], [mine]) == []
    assert but_looks_of(of.workload, [copied], []) == [mine.record]
    longer = of.workload.model_copy(update={"train": of.workload.train.model_copy(update={"steps": 600})})
    assert but_looks_of(longer, [], [mine]) == [mine.record]


@pytest.mark.usefixtures("peers")
def test_the_same_work_for_other_steps_is_told_from_other_work() -> None:
    found, of = planned()
    record = one_record()
    (lesson,) = experience(found.configs, [record], of, lambda _: ()).lessons
    assert lesson.candidate in of.space.candidates
    capped = record.model_copy(update={"machine": record.machine.model_copy(update={"memory_cap_gib": 24})})
    (lesson,) = experience(found.configs, [capped], of, lambda _: ()).lessons
    assert lesson.candidate.work.startswith(f"{H100}: llama3_8b lora")
    assert not experience(found.configs, [record.model_copy(update={"status": "unsteady"})], of, lambda _: ()).lessons
    assert not experience(found.configs, [record], planned(device="cpu")[1], lambda _: ()).lessons


def test_samples_of_several_lengths_are_known_by_runs_that_begin_alike() -> None:
    """What was measured of the first steps is stretched to the positions of all; another seed draws other samples."""
    config = single(["engine=unsloth", "machine=cuda"])
    measured_here = [one for one in committed() if one.cell.workload.data.name == "gsm8k" and one.status == "ok"]
    shorter = [one for one in measured_here if one.cell.engine.name == "unsloth" and one.cell.workload.train.num_steps == 44]
    record = max(shorter, key=lambda one: one.provenance.started_utc)  # older ones of its cell are superseded
    ran = record.cell.workload.train
    chosen = tuple((knob, json.dumps(record.cell.engine.knobs[knob])) for knob in config.engine.searched_knobs)
    one = Candidate("unsloth", chosen, Facts(positions=150, num_passes=4, largest=100))
    longer = record.cell.workload.model_copy(update={"train": ran.model_copy(update={"steps": 88})})
    model = cast("dict[str, Any]", longer.model.config)
    of = Searching(
        workload=longer,
        machine=record.machine,
        model=model,
        space=Space((one,), {"unsloth": config.engine.searched_knobs}),
        scale=scale_of(model, longer),
    )

    def known(search: Searching) -> list[Lesson]:
        found = experience({"unsloth": config}, committed(), search, lambda _: (100.0,) * 44 + (200.0,) * 44)
        assert found.gpu == H100
        return [lesson for lesson in found.lessons if not lesson.candidate.work]

    (lesson,) = known(of)
    assert lesson.candidate == one
    measured = result_of(record)
    assert measured.step_seconds is not None
    assert lesson.step_seconds == pytest.approx(1.5 * measured.step_seconds, rel=0.1)
    reseeded = longer.model_copy(update={"train": longer.train.model_copy(update={"seed": 7})})
    assert known(replace(of, workload=reseeded)) == []


def test_it_says_with_what_it_begins() -> None:
    of = space(["fused"])
    policy = Search(of, SCALE, None, Rules(planned_steps=100))
    said = "\n".join(state(policy.view([]), [], 0.0, None, 100))
    assert "begins with what the engines' YAML expects: no record teaches anything of this" in said
    assert "nothing is known of this machine yet" in said
    known = Experience((Lesson(replace(of.candidates[0], work="other"), 1.0, 9.0, None),), "a GPU", True, SCALE)
    policy = Search(of, SCALE, None, Rules(planned_steps=100), known)
    said = "\n".join(state(policy.view([]), [], 0.0, None, 100, known))
    assert "begins with paces from 1 measured setting on a GPU: 0 of this work, the rest of 1 other" in said
    assert "nothing left can take less than" in said
