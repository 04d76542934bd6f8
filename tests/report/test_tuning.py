"""The page of a search: every measured and every predicted figure is there, and which is which."""

from __future__ import annotations

from pathlib import Path

from harness import tuned
from harness.report.page import html, markdown
from harness.report.tuning import front, tuning
from harness.store import load
from harness.tune.show import summary
from harness.tuned import Predicted, Trial, Tuned
from tests.records import GPU, record, results, stored, workload


def trial(title: str, total: float | None, gib: float | None, *, status: str = "ok", predicted: float = 90.0) -> Trial:
    ran = total is not None
    return Trial(
        title=title, engine="fused", knobs={"micro_batch": 4}, steps=8, status=status, reason=None if ran else f"{status}: <memory>",
        total_seconds=total, step_seconds=total / 200 if total is not None else None, startup_seconds=20.0 if ran else None,
        peak_bytes=gib * 2**30 if gib else None, predicted_seconds=predicted, predicted_bytes=10.0 * 2**30, cell="0" * 12,
    )  # fmt: skip


def found() -> Tuned:
    return Tuned(
        machine=GPU.key, memory_cap_gib=None, workload=workload().label, planned_steps=200, samples_per_step=16, engine="fused",
        knobs={"micro_batch": 4, "recompute": "fit"}, total_seconds=88.0, step_seconds=0.34, startup_seconds=20.0, peak_bytes=9.0 * 2**30,
        parity="same: fp32", bound_seconds=87.5, stopped="nothing left can take less than 87.5 s",
        spent_seconds=240.0, budget_seconds=1200.0,
        num_candidates=120, ruled_out={"may not fit": 31}, left_out=("unsloth: not installed",), tuned_utc="2026-11-27T02:00:00+00:00",
        commit="0123456789abcdef",
        trials=(trial("lean", 120.0, 5.0), trial("fast", 88.0, 9.0), trial("beaten", 130.0, 9.5), trial("large", None, None, status="oom")),
        predicted=(Predicted(title="guess", total_seconds=95.0, least_seconds=89.0, peak_bytes=7.0 * 2**30, why="may not fit"),),
    )  # fmt: skip


def test_the_terminal_names_engines_that_were_never_measured() -> None:
    other = Predicted(title="hf micro_batch=4", total_seconds=95.0, least_seconds=70.0, peak_bytes=7.0 * 2**30, why="the time was over")
    more, mine = (other.model_copy(update={"title": title}) for title in ("hf micro_batch=1", "fused micro_batch=8"))
    said = "\n".join(summary(found().model_copy(update={"predicted": (other, more, mine)})))
    assert "hf was never measured; its best, 95 s by prediction (hf micro_batch=4): the time was over" in said
    assert said.count("never measured") == 1


def test_the_front_is_of_what_was_measured() -> None:
    assert [one.title for one in front(found().trials)] == ["lean", "fast"]


def test_tables_and_plots_say_what_was_measured_and_what_was_not() -> None:
    view = tuning(found())
    assert [row[0] for row in view.tried.rows] == ["lean", "fast", "beaten", "large"]
    assert [row[2] for row in view.tried.rows] == ["120", "88", "130", "oom"]
    assert view.tried.rows[1][3] == "90"
    assert view.untried.rows == (("guess", "95", "89", "7.00", "may not fit"),)
    assert "predicted: guess" in view.plots[0].svg
    assert "measured: fast" in view.plots[0].svg
    assert "predicted 90, measured 88" in view.plots[1].svg
    assert any("nothing left can take less than 87.5 s" in fact for fact in view.facts)
    assert not any("it began with" in fact for fact in view.facts), "an older file does not say"
    begun = tuning(found().model_copy(update={"experience": "paces from 29 measured settings"}))
    assert "it began with paces from 29 measured settings" in begun.facts
    assert "<title>front</title>" in view.plots[0].svg
    assert not any("memory was not measured" in fact for fact in view.facts)


def test_without_an_allocator_it_says_why_there_is_no_front() -> None:
    trials = tuple(one.model_copy(update={"peak_bytes": None}) for one in found().trials)
    view = tuning(found().model_copy(update={"trials": trials, "processes": 2}))
    assert any("memory was not measured" in fact for fact in view.facts)
    assert len(view.plots) == 1
    assert view.facts[0].startswith("best: fused processes=2 micro_batch=4 recompute=fit: 88 s")


def test_it_is_on_the_page_escaped(tmp_path: Path) -> None:
    some = results([stored(record())])
    page = html(type(some)(some.stored, (), {}, {}, (found(),)))
    assert "Tuned: smollm2_135m-lora-python_docs" in page
    assert "oom: &lt;memory&gt;" in page
    text = markdown(type(some)(some.stored, (), {}, {}, (found(),)))
    assert "Not measured, the most promising first" in text


def test_the_store_reads_what_was_saved_and_names_what_it_cannot(tmp_path: Path) -> None:
    path = tuned.path_of(tmp_path, GPU, workload())
    tuned.save(found(), path)
    (path.parent / "broken.yaml").write_text("engine: [")
    known = load(tmp_path)
    assert known.tuned == (found(),)
    assert any("broken.yaml: not what tune writes" in problem for problem in known.problems)
    assert tuned.found([tmp_path], GPU, workload(steps=999, seed=5)) == found()  # the same kind of work
    assert tuned.found([tmp_path], GPU, workload(samples_per_step=8)) is None
