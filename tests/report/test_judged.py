"""First steps are facts and no rows; what cannot be judged carries what its engine was found to be where every test was made."""

from __future__ import annotations

from typing import Any

from harness.rank import Variant
from harness.report.judged import judged
from harness.spec import QLora, Workload
from harness.store import Stored
from tests import records

DENSE = {"name": "dense", "source": "dense", "sequence_length": 64, "num_samples": 8}
SPEED = records.workload(model="llama3_8b", data=DENSE)
REAL = records.workload()


def entry(name: str, work: Workload, *, scored: bool = True, update_norm: float = records.UPDATE_NORM, **changed: Any) -> Stored:
    """All runs of a workload end in the same weights: nothing needs to be compared."""
    record = records.record(records.engine(name), work=work, artifacts={"adapter_sha256": records.sha256(work.key)}, **changed)
    return records.stored(record, scored=scored, **({"update_norm": update_norm} if scored else {}))


def fused(*entries: Stored) -> list[Variant]:
    groups = judged(records.results(entries))
    return [variant for group in groups for variant in group.variants if variant.engine.name == "fused" and group.workload == SPEED]


def on_parity(work: Workload = REAL, **changed: Any) -> list[Stored]:
    return [entry("hf", work), entry("fused", work, **changed), *(entry(name, work.first_step, scored=False) for name in ("hf", "fused"))]


SPEED_ROWS = [entry("hf", SPEED, scored=False), entry("fused", SPEED, scored=False, rate=2000.0)]


def test_first_steps_complete_the_verdict_and_are_no_rows() -> None:
    (group,) = judged(records.results(on_parity()))
    assert {variant.verdict.label for variant in group.variants if variant.verdict} == {"reference: fp32", "same: fp32"}


def test_a_row_on_random_weights_carries_the_verdict_of_the_workload_that_can_be_judged() -> None:
    (alone,) = fused(*SPEED_ROWS)
    assert (alone.verdict and alone.verdict.label, alone.can_win) == ("not comparable", True)
    (vouched,) = fused(*SPEED_ROWS, *on_parity())
    assert vouched.verdict is not None
    assert (vouched.verdict.label, vouched.verdict.look, vouched.can_win) == (f"same elsewhere (fp32 on {REAL.label})", "same", True)


def test_a_verdict_on_another_method_says_nothing() -> None:
    packed = REAL.model_copy(update={"method": QLora.model_validate({**REAL.method.model_dump(), "name": "qlora"})})
    for there in (on_parity(packed), on_parity(packed, update_norm=2.0)):
        (row,) = fused(*SPEED_ROWS, *there)
        assert (row.verdict and row.verdict.label, row.can_win) == ("not comparable", True)


def test_seeds_of_one_workload_are_named_together() -> None:
    other = records.workload(seed=1)
    (vouched,) = fused(*SPEED_ROWS, *on_parity(), *on_parity(other))
    assert vouched.verdict is not None
    first, second = sorted(work.label for work in (REAL, other))
    assert vouched.verdict.label == f"same elsewhere (fp32 on {first} and -{second.rpartition('-')[2]})"


def test_an_engine_that_trains_another_function_there_wins_nowhere() -> None:
    for there in (on_parity(update_norm=2.0), [*on_parity(update_norm=2.0), entry("fused", REAL, repeat=1)]):
        (barred,) = fused(*SPEED_ROWS, *there)
        assert (barred.verdict and barred.verdict.label) == f"not comparable; different on {REAL.label}"
        assert not barred.can_win


def test_another_version_of_the_engine_does_not_vouch_for_it() -> None:
    older = []
    for one in on_parity():
        provenance = one.record.provenance.model_copy(update={"engine_fingerprint": "older"})
        older.append(Stored(one.record.model_copy(update={"provenance": provenance}), one.path, one.score, one.base_score))
    (unknown,) = fused(*SPEED_ROWS, *older)
    assert (unknown.verdict and unknown.verdict.label) == "not comparable"


def on(card: str, one: Stored) -> Stored:
    machine = one.record.machine.model_copy(update={"name": card})
    return Stored(one.record.model_copy(update={"machine": machine}), one.path, one.score, one.base_score)


def test_a_card_of_the_same_chip_vouches_and_is_named() -> None:
    """The H200 is an H100 with other memory; an A100 is neither."""
    rows = [on("NVIDIA H100 80GB HBM3", one) for one in SPEED_ROWS]
    for card, label in (
        ("NVIDIA H200", f"same elsewhere (fp32 on {REAL.label}, NVIDIA H200)"),
        ("NVIDIA A100-SXM4-80GB", "not comparable"),
    ):
        (row,) = fused(*rows, *(on(card, one) for one in on_parity()))
        assert (row.verdict and row.verdict.label) == label
    own = [on("NVIDIA H100 80GB HBM3", one) for one in on_parity()]
    (row,) = fused(*rows, *own, *(on("NVIDIA H200", one) for one in on_parity()))
    assert (row.verdict and row.verdict.label) == f"same elsewhere (fp32 on {REAL.label})"
    (barred,) = fused(*rows, *own, *(on("NVIDIA H200", one) for one in on_parity(update_norm=2.0)))
    assert not barred.can_win
    assert (
        barred.verdict and barred.verdict.label
    ) == f"not comparable; same: fp32 on {REAL.label}, different on {REAL.label}, NVIDIA H200"
