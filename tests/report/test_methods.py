"""Methods side by side: which workloads stand together, what each reached, what held-out losses say, and how sure that is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.converge import LEAST_SEEDS as SEEDS_OF_CONVERGE
from harness.report.advice import LEAST_SEEDS, SITTINGS
from harness.report.judged import judged
from harness.report.methods import Row, Table, methods
from harness.report.page import html, markdown
from harness.report.titles import identifier
from harness.spec import Full, LoraFp8, QLora, Workload
from harness.store import Stored
from tests.records import CPU, GPU, TRAINED_LOSS, engine, record, repeats, results, stored, workload

THREE = (0.99, 1.0, 1.01)


def work(method: str, **train: Any) -> Workload:
    given = workload(**train)
    adapters = {**given.method.model_dump(), "name": method}
    kinds = {"lora": lambda: given.method, "qlora": lambda: QLora(**adapters), "lora_fp8": lambda: LoraFp8(**adapters)}
    return given.model_copy(update={"method": kinds[method]() if method in kinds else Full(name="full")})


def ran(method: str, rate: float, gib: float, loss: float | None = None, *, spec: Any = None, **changed: Any) -> list[Stored]:
    """Three repeats of ``fused`` or ``spec``; fields of the training in ``train``."""
    train, count = changed.pop("train", {}), changed.pop("count", 3)
    rates = [rate * each for each in THREE[-count:]]
    made = repeats(spec or engine("fused"), rates, work=work(method, **train), memory_gib=gib, scored=False, **changed)
    return made if loss is None else [stored(one.record, held_out_loss=loss) for one in made]


def tables(*found: list[Stored]) -> tuple[Table, ...]:
    return methods(judged(results([one for each in found for one in each])), {})


def only(*found: list[Stored]) -> Table:
    (table,) = tables(*found)
    return table


def row(table: Table, name: str) -> Row:
    (found,) = (one for one in table.rows if one.name == name)
    return found


LORA = ran("lora", 2000.0, 10.0, TRAINED_LOSS)
QLORA = ran("qlora", 1660.0, 7.8, TRAINED_LOSS + 0.0123)


def test_a_row_a_method_the_fastest_first() -> None:
    table = only(LORA, QLORA)
    assert [one.name for one in table.rows] == ["lora", "qlora"]
    assert table.machine == CPU.key
    found = row(table, "qlora")
    assert (found.first, found.rate, found.ratio, found.memory) == ("fused", "1,660", "0.830", "7.80")
    assert found.interval == "0.830 to 0.830, 3 pairs"
    assert (found.held_out_loss, found.distance, found.distance_note) == ("2.1123", "+0.0123", "")
    assert found.id == next(identifier(group) for group in judged(results(QLORA)))
    assert table.sentences.headline == (
        "The fastest, by the peak memory that it needs: qlora from 7.80 GiB (1,660 tokens/s); lora from 10.00 GiB (2,000 tokens/s)."
    )
    said = table.sentences.text
    assert (
        "qlora at its fastest needs 7.80 GiB (lora 10.00) and has 0.83 times lora's rate (98\u00a0% interval 0.830 to 0.830, 3 pairs)."
        in said
    )
    assert "The held-out loss of qlora is 0.0123 above lora's. Too few seeds to tell a difference from chance: qlora (1)." in said
    assert "Measured on one host, 2026-11-23 10:00 to 2026-11-23 10:02 UTC; rates of different sittings compare only within about 3" in said


def test_one_method_another_machine_another_shape_and_another_model_stand_alone() -> None:
    assert tables(LORA) == ()
    assert tables(LORA, ran("qlora", 1660.0, 7.8, machine=GPU)) == ()
    assert tables(LORA, ran("qlora", 1660.0, 7.8, train={"samples_per_step": 8})) == ()
    other = work("qlora").model_copy(update={"model": workload(model="other").model})
    assert tables(LORA, repeats(engine("fused"), [830.0], work=other)) == ()
    assert tables(LORA, [stored(record(engine("fused"), work=work("qlora"), status="crash", reason="TypeError"))]) == ()


def test_memory_that_did_not_suffice_is_an_answer() -> None:
    failed = stored(record(engine("fused"), work=work("full"), status="oom", reason="CUDA out of memory"))
    table = only(LORA, [failed])
    found = row(table, "full")
    assert (found.first, found.rate, found.ratio, found.memory, found.least, found.distance) == (
        "nothing ran to the end (oom)", "", "", "", "", "",
    )  # fmt: skip
    assert table.sentences.headline == "lora alone has a rate here: 2,000 tokens/s."
    assert "full: nothing ran to the end (oom)." in table.sentences.text


def test_the_least_memory_is_of_any_variant_and_what_was_not_tried_is_said() -> None:
    lean = engine("fused", memory_gib=5)
    table = only(LORA, ran("lora", 1400.0, 5.0, spec=lean), QLORA)
    assert row(table, "lora").least == "5.00"
    assert row(table, "lora").least_note == "fused memory_gib=5, 1,400 tokens/s"
    assert (row(table, "qlora").least, row(table, "qlora").least_note) == ("7.80", "the fastest")
    assert table.sentences.headline.endswith(
        ": lora from 5.00 GiB (1,400 tokens/s); qlora from 7.80 GiB (1,660 tokens/s); lora from 10.00 GiB (2,000 tokens/s)."
    )
    assert "Nothing leaner than the fastest was measured, so less memory may do: qlora." in table.sentences.text
    leaner = only(LORA, ran("lora", 1800.0, 5.0, spec=lean), QLORA).sentences.headline
    assert leaner.startswith("lora from 5.00 GiB (1,800 tokens/s, up to 2,000 in 10.00): no other method"), "qlora is slower in more"


def test_who_trained_something_else_is_no_row_but_is_named() -> None:
    cheat = ran("qlora", 4000.0, 1.0, TRAINED_LOSS, spec=engine("cheat"), losses=(0.0,) * 20)
    table = only(LORA, ran("qlora", 1660.0, 7.8, spec=engine("hf")), cheat)
    assert (row(table, "qlora").first, row(table, "qlora").least) == ("hf", "7.80")
    assert "qlora: cheat was faster (4,000 tokens/s) but cannot win: not comparable; its held-out loss is 2.1000." in table.sentences.text


def test_other_hosts_and_single_runs_are_no_verdict() -> None:
    there = ran("qlora", 1960.0, 7.8, host="host-2", count=1)
    table = only(LORA, there)
    assert (row(table, "qlora").ratio, row(table, "qlora").interval) == ("0.990", "no repeat on the same host")
    said = table.sentences.text
    assert "lora from 10.00 GiB (2,000 tokens/s, too close to call)" in said
    assert "has 0.990 times lora's rate, too close to call." in said
    assert "Measured on different hosts" in said
    assert said.endswith("One run each, which says nothing about chance: qlora.")
    assert "too close" not in only(LORA, ran("qlora", 1920.0, 7.8, host="host-2")).sentences.text, "4 % is more than sittings differ by"


def test_pairs_of_one_host_are_told_apart_by_their_interval() -> None:
    assert "3 pairs), the same within ±2\u00a0%." in only(LORA, ran("qlora", 1990.0, 7.8)).sentences.text
    noisy = repeats(engine("fused"), [1700.0, 2100.0, 1500.0], work=work("qlora"), memory_gib=7.8, scored=False)
    assert "3 pairs), too close to call." in only(LORA, noisy).sentences.text


def test_the_margin_of_sittings_is_that_of_the_check_and_seeds_are_as_many_as_converge_wants() -> None:
    assert LEAST_SEEDS == SEEDS_OF_CONVERGE
    conf = Path(__file__).resolve().parents[2] / "conf" / "check.yaml"
    assert yaml.safe_load(conf.read_text(encoding="utf-8"))["drift"] == SITTINGS


def test_held_out_losses_over_seeds() -> None:
    def seeds(*losses: float) -> Table:
        more = [ran("lora", 2000.0, 10.0, TRAINED_LOSS + 0.01 * seed, train={"seed": seed}) for seed in (1, 2)]
        more += [ran("qlora", 1660.0, 7.8, loss, train={"seed": seed}) for seed, loss in enumerate(losses)]
        return only(LORA, *more)

    above = seeds(2.105, 2.116, 2.127)
    assert above.facts == "20 steps, seed 0"
    assert row(above, "qlora").distance == "+0.0060"
    assert row(above, "qlora").distance_note == "+0.0050 to +0.0070, 3 seeds"
    said = above.sentences.text
    assert "The held-out loss of qlora is 0.0060 above lora's on average (+0.0050 to +0.0070 over 3 seeds)." in said
    assert "lora's own spans 0.0200 over the seeds 0, 1, 2." in said
    assert "Too few seeds" not in said
    assert "Too few seeds to tell a difference from chance: qlora (2)." in seeds(2.105, 2.116).sentences.text
    near = seeds(2.1005, 2.1105, 2.1195).sentences.text
    assert "The held-out loss of qlora is within 0.001 of lora's in each of 3 seeds." in near
    either = seeds(2.095, 2.116, 2.127).sentences.text
    assert "on average, but \N{MINUS SIGN}0.0050 to +0.0070 over 3 seeds: no difference shown." in either


def test_losses_compare_within_one_engine_where_it_ran_both() -> None:
    """Engines round differently, by more than methods may: hf is not measured by fused."""
    slow = ran("lora", 500.0, 12.0, 2.15, spec=engine("hf"))
    table = only(LORA, slow, ran("qlora", 400.0, 6.0, 2.16, spec=engine("hf")))
    assert (row(table, "qlora").distance, row(table, "qlora").distance_note) == ("+0.0100", "")
    other = only(LORA, ran("qlora", 400.0, 6.0, 2.16, spec=engine("unsloth")))
    assert (row(other, "qlora").distance, row(other, "qlora").distance_note) == ("+0.0600", "from fused")
    assert "is 0.0600 above lora's (of fused, not unsloth: engines differ, too)." in other.sentences.text
    near = only(LORA, ran("qlora", 1660.0, 7.8, TRAINED_LOSS - 0.0009)).sentences.text
    assert "The held-out loss of qlora is within 0.001 of lora's." in near


def test_other_steps_are_said_and_leave_rates_only() -> None:
    table = only(LORA, ran("qlora", 1660.0, 7.8, 2.5, train={"steps": 40}))
    found = row(table, "qlora")
    assert (found.differs, found.held_out_loss, found.distance) == ("steps 40", "2.5000", "")
    assert found.ratio == "0.830"
    assert "qlora was trained with steps 40 instead of 20: that changes losses, not rates." in table.sentences.text
    assert "Not shown is how well qlora learns: no held-out losses that compare with lora's." in table.sentences.text


def test_a_learning_rate_is_a_methods_own() -> None:
    table = only(LORA, ran("full", 400.0, 30.0, 2.05, train={"learning_rate": 1e-5}))
    found = row(table, "full")
    assert (found.differs, found.distance) == ("learning rate 1e-05", "\N{MINUS SIGN}0.0500")


def test_the_training_that_most_methods_share_is_shown() -> None:
    long = {"steps": 40}
    table = only(ran("lora", 2200.0, 10.0, train=long), LORA, QLORA, ran("full", 300.0, 30.0, train=long))
    assert table.facts == "20 steps, seed 0"
    assert [(one.name, one.differs) for one in table.rows] == [("lora", ""), ("qlora", ""), ("full", "steps 40")]


def test_what_was_tried_with_other_steps_counts_where_no_losses_are_compared() -> None:
    """Their number changes no speed: else a method is said to be slower, or to need more memory, than the same page shows."""
    short, lean = ran("qlora", 1000.0, 12.0), ran("qlora", 900.0, 5.0, train={"steps": 8})
    table = only(ran("lora", 1500.0, 20.0), ran("lora", 2000.0, 10.0, train={"steps": 60}), short, lean)
    assert (row(table, "lora").rate, row(table, "lora").memory) == ("2,000", "10.00")
    assert (row(table, "qlora").rate, row(table, "qlora").least) == ("1000.0", "5.00")
    assert "qlora from 5.00 GiB" in table.sentences.text
    assert (
        row(only(ran("lora", 1500.0, 20.0, TRAINED_LOSS), ran("lora", 2000.0, 10.0, TRAINED_LOSS, train={"steps": 60}), QLORA), "lora").rate
        == "1,500"
    )


def test_what_was_measured_again_since_is_left_out() -> None:
    old = ran("lora", 9000.0, 10.0, train={"steps": 60})
    groups = judged(results([*old, *LORA, *QLORA]))
    (outdated,) = (group for group in groups if group.workload.train.steps == 60)
    (table,) = methods(groups, {identifier(outdated): "since then engines have changed"})
    assert row(table, "lora").rate == "2,000"


def test_how_much_more_of_a_card_was_taken_is_measured() -> None:
    def on_a_card(found: list[Stored], more: int | None) -> list[Stored]:
        made = []
        for one in found:
            assert one.record.measurement is not None
            memory = tuple(
                part.model_copy(update={"peak_device_bytes": None if more is None else (part.peak_allocated_bytes or 0) + more})
                for part in one.record.measurement.memory
            )
            made.append(stored(one.record.model_copy(update={"measurement": one.record.measurement.model_copy(update={"memory": memory})})))
        return made

    lora, qlora = ran("lora", 2000.0, 10.0, machine=GPU), ran("qlora", 1660.0, 7.8, machine=GPU)
    says = "A card also holds what the allocator keeps in reserve, and the CUDA context"
    assert f"{says}." in only(on_a_card(lora, None), on_a_card(qlora, None)).sentences.text
    assert f"{says}: 1.00 to 1.50 GiB more in these runs." in only(on_a_card(lora, 2**30), on_a_card(qlora, 3 * 2**29)).sentences.text
    assert says not in only(LORA, QLORA).sentences.text, "on a CPU"


def test_without_lora_the_fastest_is_compared_with_and_settings_tell_namesakes_apart() -> None:
    assert only(QLORA, ran("full", 300.0, 30.0)).reference == "qlora"
    wide = work("lora")
    wide = wide.model_copy(update={"method": wide.method.model_copy(update={"rank": 64})})
    assert tables(LORA, repeats(engine("fused"), [900.0], work=wide)) == (), "one method, whatever its rank"
    table = only(LORA, QLORA, repeats(engine("fused"), [2400.0], work=wide))
    assert [one.name for one in table.rows] == ["lora rank=64", "lora rank=16", "qlora"]
    assert table.reference == "lora rank=16", "whose adapters qlora has, too"


def test_an_engine_that_was_changed_in_between_is_named() -> None:
    changed = [
        stored(one.record.model_copy(update={"provenance": one.record.provenance.model_copy(update={"engine_fingerprint": "e" * 12})}))
        for one in QLORA
    ]
    assert "fused was changed between the runs of lora and qlora." in only(LORA, changed).sentences.text
    assert "was changed" not in only(LORA, QLORA).sentences.text


@pytest.mark.parametrize("write", [html, markdown])
def test_the_page_shows_it_before_the_workloads_and_links_to_it(write: Any) -> None:
    page = write(results([*LORA, *QLORA])).replace("<wbr>", "")
    assert page.index("at a glance") < page.index("Which method?</h2>" if write is html else "## Which method?")
    assert "qlora at its fastest needs 7.80 GiB" in page
    assert "Which method?" not in write(results(LORA))


def test_every_link_of_the_page_leads_somewhere() -> None:
    page = html(results([*LORA, *QLORA]))
    ids, links = re.findall(r'id="([^"]+)"', page), re.findall(r'href="#([^"]+)"', page)
    assert set(links) <= set(ids)
    assert len(ids) == len(set(ids))
    assert "methods" in links
    assert sum(link.startswith("methods-") for link in links) == 2, "from both workloads"
