"""Groups, variants, repeats, ties, and who may win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from harness.comparable import Light
from harness.current import current, latest
from harness.engine import Machine
from harness.rank import Entry, Group, Variant, compare_variants, rank
from harness.record import Record
from harness.spec import EngineSpec
from harness.verdict import Kind, Verdict
from tests import records
from tests.records import engine


def judged(kind: Kind, anchor: str | None = None, *, can_win: bool = True) -> Verdict:
    return Verdict(kind, anchor, "why", (), Light(None, "not checked"), can_win)


SAME, REFERENCE = judged("same", "fp32"), judged("reference", "fp32")
DIFFERENT = judged("different", can_win=False)
UNKNOWN, CHANGED = judged("not comparable"), judged("not comparable", can_win=False)


def entry(of: Record, verdict: Verdict = SAME, **score: Any) -> Entry:
    made = records.score(of, **score) if of.measurement else None
    return Entry(of, f"{of.cell.key}/{of.provenance.started_utc}.json", made, verdict)


def entries(spec: EngineSpec, rates: Sequence[float], verdict: Verdict = SAME, **changed: Any) -> list[Entry]:
    return [entry(records.record(spec, repeat=i, rate=rate, **changed), verdict) for i, rate in enumerate(rates)]


def group(*parts: list[Entry]) -> Group:
    (only,) = rank([one for part in parts for one in part])
    return only


def places(of: Group) -> list[tuple[str, int | None]]:
    return [(variant.label, variant.rank) for variant in of.variants]


def rates(around: float) -> list[float]:
    return [around, around * 1.003, around * 0.998]


def test_groups_are_machine_and_workload() -> None:
    capped = Machine(**{**records.CPU.model_dump(), "memory_cap_gib": 4})
    mixed = [
        *entries(engine(), rates(100), machine=records.CPU),
        *entries(engine(), rates(100), machine=records.GPU),
        *entries(engine(), rates(100), machine=capped),
        *entries(engine(), rates(100), work=records.workload(seed=1)),
    ]
    groups = rank(reversed(mixed))
    assert len(groups) == 4
    assert len({(one.machine.key, one.workload.key) for one in groups}) == 4
    assert [one.machine.key for one in groups] == sorted(one.machine.key for one in groups)
    assert rank([]) == ()


def test_order_is_by_the_median_repeat() -> None:
    found = group(entries(engine("slow"), rates(50)), entries(engine("fast"), [99, 100, 500]), entries(engine("mid"), rates(80)))
    assert [variant.label for variant in found.variants] == ["fast", "mid", "slow"]
    assert found.variants[0].tokens_per_second == pytest.approx(100)
    assert found.variants[0].rates == pytest.approx((99, 100, 500))


def test_clear_differences_get_ranks_of_their_own() -> None:
    found = group(entries(engine("a"), rates(100)), entries(engine("b"), rates(80)), entries(engine("c"), rates(60)))
    assert places(found) == [("a", 1), ("b", 2), ("c", 3)]
    assert [variant.label for variant in found.outcome.first] == ["a"]
    assert found.outcome.next is not None
    assert found.outcome.next.label == "b"
    assert found.outcome.lead is not None
    assert found.outcome.lead.answer == "faster"


def test_what_is_too_close_shares_the_rank_and_the_next_rank_counts_on() -> None:
    found = group(entries(engine("a"), [100, 101, 99]), entries(engine("b"), [99, 101, 99.5]), entries(engine("c"), rates(60)))
    assert [place for _, place in places(found)] == [1, 1, 3]
    assert {variant.label for variant in found.outcome.first} == {"a", "b"}
    assert found.outcome.lead is not None
    assert found.outcome.lead.answer in ("same", "inconclusive")


def test_a_chain_of_small_steps_is_cut_at_the_leader_of_the_rank() -> None:
    chain = [entries(engine(f"e{i}"), rates(100 * 0.992**i)) for i in range(4)]
    assert [place for _, place in places(group(*chain))] == [1, 1, 3, 3]


def test_one_repeat_never_wins() -> None:
    found = group(entries(engine("a"), [200]), entries(engine("b"), [100]))
    assert [place for _, place in places(found)] == [1, 1]
    assert found.outcome.lead is not None
    assert found.outcome.lead.answer == "inconclusive"


def test_repeats_are_paired_by_number_and_host() -> None:
    a, b = entries(engine("a"), [100, 200, 300]), entries(engine("b"), [50, 100, 150])
    found = group(a, list(reversed(b)))
    comparison = compare_variants(*found.variants)
    assert comparison.interval is not None
    assert (comparison.interval.ratio, comparison.interval.low) == (pytest.approx(2), pytest.approx(2))
    elsewhere = group(a, entries(engine("b"), [50, 100, 150], host="host-2"))
    assert compare_variants(*elsewhere.variants).interval is None
    assert [place for _, place in places(elsewhere)] == [1, 1]


@pytest.mark.parametrize("verdict", [DIFFERENT, CHANGED])
def test_what_did_not_train_the_same_is_ranked_last_and_cannot_win(verdict: Verdict) -> None:
    found = group(entries(engine("cheat"), rates(900), verdict), entries(engine("slow"), rates(50)), entries(engine("honest"), rates(100)))
    assert places(found) == [("honest", 1), ("slow", 2), ("cheat", 3)]
    assert [variant.label for variant in found.outcome.barred] == ["cheat"]
    assert not found.variants[2].can_win


def test_one_bad_repeat_bars_the_variant() -> None:
    mixed = [*entries(engine("a"), [100, 101]), entry(records.record(engine("a"), repeat=2, rate=102), DIFFERENT)]
    found = group(mixed, entries(engine("b"), rates(50)))
    assert places(found) == [("b", 1), ("a", 2)]
    assert found.variants[1].verdict == DIFFERENT


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ([SAME, UNKNOWN], UNKNOWN), ([SAME, UNKNOWN, DIFFERENT], DIFFERENT), ([UNKNOWN, CHANGED], CHANGED), ([REFERENCE, SAME], REFERENCE),
        ([REFERENCE, UNKNOWN], REFERENCE), ([REFERENCE, DIFFERENT], DIFFERENT),
    ],
)  # fmt: skip
def test_the_verdict_of_a_variant_is_its_worst(verdicts: list[Verdict], worst: Verdict) -> None:
    found = group([entry(records.record(repeat=i), verdict) for i, verdict in enumerate(verdicts)])
    assert found.variants[0].verdict == worst


def test_when_all_are_barred_there_is_no_winner() -> None:
    found = group(entries(engine("cheat"), rates(900), DIFFERENT))
    assert found.outcome.first == ()
    assert found.outcome.next is None
    assert found.outcome.lead is None
    assert [variant.label for variant in found.outcome.barred] == ["cheat"]


def test_failures_are_rows_without_a_rank() -> None:
    lost = [entry(records.record(engine("b"), repeat=i, status="oom", reason="out of memory")) for i in range(2)]
    found = group(entries(engine("a"), rates(100)), lost, [entry(records.record(engine("c"), status="crash"))])
    b, c = found.variants[1:]
    assert (b.status, b.rank, b.tokens_per_second, b.verdict) == ("oom", None, None, None)
    assert b.reason == "repeat 0: oom: out of memory; repeat 1: oom: out of memory"
    assert c.reason == "repeat 0: crash: no reason was recorded"


def test_a_variant_with_some_repeats_ok_is_ok_and_names_the_others() -> None:
    found = group([*entries(engine("a"), [100, 101]), entry(records.record(engine("a"), repeat=2, status="timeout", reason="3600 s"))])
    variant = found.variants[0]
    assert (variant.status, len(variant.runs), variant.reason) == ("ok", 2, "repeat 2: timeout: 3600 s")


def test_an_ok_record_without_a_rate_is_a_failure() -> None:
    empty = entry(records.record(engine("a"), ran=records.steps(num_steps=0)))
    assert group([empty]).variants[0].reason == "repeat 0: ok: nothing was timed"


def test_the_newest_record_of_a_cell_counts_and_the_older_are_counted() -> None:
    old = entry(records.record(rate=50, started="2026-11-01T00:00:00+00:00"))
    new = entry(records.record(rate=100, started="2026-11-02T00:00:00+00:00"))
    for order in ([old, new], [new, old]):
        variant = group(order).variants[0]
        assert variant.rates == pytest.approx((100,))
        assert variant.num_superseded == 1
    assert group([new, entry(new.record.model_copy())]).variants[0].num_superseded == 0, "a copy in another root is the same record"


BEFORE, SINCE = "2026-11-01T00:00:00+00:00", "2026-11-02T00:00:00+00:00"


def test_an_engine_without_its_newer_knobs_is_the_same_one_earlier() -> None:
    """Three repeats by older code, one by newer: the newer counts, the older are counted; other settings stay rows of their own."""
    old = [*entries(engine("a"), [50, 51, 52], started=BEFORE), *entries(engine("a", micro_batch=8), [60], started=BEFORE)]
    new = entries(engine("a", offload=True), [100], started=SINCE)
    found = group(old, new)
    assert places(found) == [("a micro_batch=4", 1), ("a micro_batch=8", 1)]
    assert [(variant.rates, variant.num_superseded) for variant in found.variants] == [
        (pytest.approx((100,)), 3),
        (pytest.approx((60,)), 0),
    ]
    assert {id(one) for one in current(each.record for each in [*old, *new])} == {id(each.record) for each in [*old[3:], *new]}


@pytest.mark.parametrize(
    ("other", "started"),
    [
        (engine("a", offload=True), BEFORE),
        (engine("a", offload=True, micro_batch=8), SINCE),
        (engine("a", offload=True, processes=2), SINCE),
        (engine("b", offload=True), SINCE),
        (engine("a", offload=True).model_copy(update={"variant": "sharded"}), SINCE),
    ],
    ids=["earlier", "another value", "several processes", "another engine", "another name"],
)
def test_what_only_looks_like_it_is_not(other: EngineSpec, started: str) -> None:
    both = [*entries(engine("a"), [50], started=BEFORE), *entries(other, [100], started=started)]
    assert len(group(both).variants) == 2
    assert len(current(each.record for each in both)) == 2


def test_what_could_not_run_takes_nobodys_place() -> None:
    old = entries(engine("a"), [50], started=BEFORE)
    new = [entry(records.record(engine("a", offload=True), status="unsupported", reason="run make peers", started=SINCE))]
    assert places(group(old, new)) == [("a offload=unset", 1), ("a offload=true", None)]


def test_a_run_alone_does_not_tear_a_block_apart() -> None:
    """Three blocks on one host; later repeat 0 of one of them again, on another host, where nothing ran beside it."""
    blocks = [*entries(engine("a"), rates(100), started=BEFORE, host="one"), *entries(engine("b"), rates(80), started=BEFORE, host="one")]
    alone = entries(engine("a"), [90], started=SINCE, host="two")
    assert group(blocks, alone).variants[0].rates == pytest.approx(rates(100))
    again = [*entries(engine("a"), [90], started=SINCE, host="two"), *entries(engine("b"), [72], started=SINCE, host="two")]
    assert group(blocks, again).variants[0].rates == pytest.approx([90, *rates(100)[1:]]), "a block as large is newer"
    caps = [one for cap in (20, 24, 32) for one in entries(engine("a", memory_gib=cap), [50], started=SINCE, host="two")]
    assert group(blocks, alone, caps).variants[0].rates == pytest.approx(rates(100)), "variants of one engine are no peers"
    changed = entries(engine("a"), [90], started=SINCE, host="two", fingerprint="other code")
    assert group(blocks, changed).variants[0].rates == pytest.approx([90, *rates(100)[1:]]), "another engine"
    failed = [entry(records.record(engine("a"), status="oom", started=SINCE, host="two"))]
    assert len(group(blocks, failed).variants[0].rates) == 2, "what fails now counts"
    assert sum(variant.num_superseded for variant in group(blocks, alone).variants) == 1


def test_code_that_has_been_run_anew_since_makes_no_block_larger() -> None:
    """a's newer code ran beside b on another host; that its older code ran beside b in two variants keeps b there no longer."""
    older = [
        one
        for size in (1, 2)
        for one in entries(engine("a", micro_batch=size), rates(50), started=BEFORE, host="one", fingerprint="before")
    ]
    older += entries(engine("b"), rates(80), started=BEFORE, host="one")
    anew = entries(engine("a", micro_batch=1), rates(100), started=SINCE, host="two")
    anew += entries(engine("b"), rates(70), started=SINCE, host="two")
    variants = {variant.label: variant for variant in group(older, anew).variants}
    assert variants["b"].rates == pytest.approx(rates(70))
    comparison = variants["b"].comparison
    assert comparison is not None
    assert comparison.answer == "slower", "the two have a host in common"
    assert variants["a micro_batch=2"].rates == pytest.approx(rates(50)), "has not been run anew"


def test_latest_keeps_machines_apart() -> None:
    both = [records.record(machine=records.CPU), records.record(machine=records.GPU)]
    assert latest(both) == tuple(both)


def test_memory_is_the_largest_over_repeats_and_phases() -> None:
    small, large = records.record(repeat=0, memory_gib=1), records.record(repeat=1, memory_gib=2)
    variant = group([entry(small), entry(large)]).variants[0]
    assert (variant.peak_rss_bytes, variant.peak_allocated_bytes) == (2 * 2**30, None)
    on_gpu = group(entries(engine(), [100], machine=records.GPU, memory_gib=40)).variants[0]
    assert (on_gpu.peak_allocated_bytes, on_gpu.peak_rss_bytes) == (40 * 2**30, 2**30)


def test_held_out_loss_is_the_median_of_the_scored_repeats() -> None:
    scored = [entry(records.record(repeat=i), held_out_loss=loss) for i, loss in enumerate((2.0, 2.2, 2.1))]
    assert group(scored).variants[0].held_out_loss == 2.1
    assert group([Entry(records.record(), "p", None, SAME)]).variants[0].held_out_loss is None


def test_variants_are_told_apart_by_every_part_of_the_engine() -> None:
    specs = [engine("a"), engine("a", processes=2), engine("a", environment={"X": "1"}), engine("a", micro_batch=8)]
    found = group(*(entries(spec, [100]) for spec in specs))
    names = [variant.label for variant in found.variants]
    assert len(set(names)) == 4
    assert all(isinstance(variant, Variant) for variant in found.variants)
