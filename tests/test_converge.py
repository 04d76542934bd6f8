"""Convergence over seeds: what differs no more than harmless variants is the same; too little learnt says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.comparable import Run
from harness.converge import Convergence, judge, main
from harness.errors import ConfigError
from harness.store import save, save_score
from tests import records

HF = records.engine("hf")
FP32 = records.engine("fused", optimizer_state="fp32")
INT8 = records.engine("fused", optimizer_state="int8")
NAMES = ("hf,compute_dtype=float32", "fused,optimizer_state=int8")


LEARNT = 0.2  # less than which half a per cent would be more than a thousandth


def run(spec: Any, seed: int, off: float = 0.0, *, late: float = 0.0, **changed: Any) -> Run:
    work = records.workload(seed=seed)
    losses = tuple(loss + (late if step >= 15 else 0.0) for step, loss in enumerate(records.losses()))
    made = records.record(spec, work=work, **{"losses": losses, **changed})
    return Run(made, records.score(made, held_out_loss=records.BASE_LOSS - LEARNT + 0.02 * seed + off), records.score(made, base=True))


def three(spec: Any, offs: tuple[float, ...], **changed: Any) -> list[Run]:
    return [run(spec, seed, off, **changed) for seed, off in enumerate(offs)]


REFERENCE = three(HF, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("offs", "kind"), [((0.0009, -0.0009, 0.0), "same"), ((0.0002, 0.0, 0.0012), "different"), ((-0.002,) * 3, "different")]
)
def test_a_thousandth_is_allowed_either_way(offs: tuple[float, ...], kind: str) -> None:
    assert judge([*REFERENCE, *three(INT8, offs)], *NAMES, ()).kind == kind


def test_half_a_per_cent_of_what_was_learnt_is_allowed() -> None:
    def learnt_more(spec: Any, off: float) -> list[Run]:
        return three(spec, tuple(off - 0.8 - 0.02 * seed for seed in range(3)))

    assert judge([*learnt_more(HF, 0.0), *learnt_more(INT8, 0.0049)], *NAMES, ()).kind == "same"
    assert judge([*learnt_more(HF, 0.0), *learnt_more(INT8, 0.0051)], *NAMES, ()).kind == "different"


def test_twice_what_a_harmless_variant_strays_is_allowed() -> None:
    known = [*REFERENCE, *three(FP32, (0.0004, 0.0015, 0.001)), *three(INT8, (0.0029, -0.0029, 0.002))]
    assert judge(known, *NAMES, ()).kind == "different"
    found = judge(known, *NAMES, ("fused,optimizer_state=fp32",))
    assert found.kind == "same"
    assert found.compared[0].allowed == pytest.approx(0.003)
    assert judge([*REFERENCE, *known[3:6], *three(INT8, (0.0031, 0.0, 0.0))], *NAMES, ("fused,optimizer_state=fp32",)).kind == "different"


def test_the_end_of_the_training_loss_counts_too() -> None:
    found = judge([*REFERENCE, *three(INT8, (0.0,) * 3, late=0.004)], *NAMES, ())
    assert found.kind == "different"
    assert [each.worst > each.allowed for each in found.compared] == [False, True]


def test_what_proves_nothing_is_not_comparable() -> None:
    few = judge([*REFERENCE, *three(INT8, (0.0, 0.0))], *NAMES, ())
    assert (few.kind, few.reason) == ("not comparable", "2 seeds were scored for both, at least 3 are needed")
    loose = judge([*REFERENCE, *three(FP32, (0.03,) * 3), *three(INT8, (0.05,) * 3)], *NAMES, ("fused,optimizer_state=fp32",))
    assert loose.kind == "not comparable"
    assert loose.reason is not None
    assert "anything would look the same" in loose.reason


def test_a_loss_that_is_no_number_is_different() -> None:
    broken = run(INT8, 1, losses=(*records.losses()[:-1], float("nan")))
    found: Convergence = judge([*REFERENCE, broken], *NAMES, ())
    assert found.kind == "different"
    assert found.reason == "loss is nan at step 20"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for each in (*REFERENCE, *three(INT8, (0.0004, -0.0003, 0.0))):
        assert each.score is not None
        assert each.base_score is not None
        save(each.record, tmp_path)
        save_score(each.score, tmp_path)
        save_score(each.base_score, tmp_path)
    return tmp_path


def test_the_door_reads_records_and_says_what_it_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root), *NAMES]) == 0
    said = capsys.readouterr().out
    assert said.startswith("convergence: same\n")
    assert "+0.00040, -0.00030, +0.00000" in said
    assert main([str(root), *NAMES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"


def test_mistakes_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(records.record(INT8, work=records.workload(steps=30)), root)
    (root / "empty").mkdir()
    for arguments, reason in (
        ([str(root / "empty"), "hf", "hff", "hf"], "no records of whole runs in it"),
        ([str(root), "hf", "hff", "hf"], "'hff': no run of hff; did you mean 'hf'?"),
        ([str(root / "none"), *NAMES], "no folder"),
        ([str(root), *NAMES], "name one with --workload LABEL"),
        ([str(root), *NAMES, "--workload", "other"], ", and none is 'other'; name one"),
        ([str(root), "axolotl", "hf", "--workload", records.workload().label], "'axolotl': no run of axolotl; known: fused, hf"),
        ([str(root), "hf,float32", "hf", "--workload", records.workload().label], "expected ENGINE[,KNOB=VALUE…]"),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
    assert main([str(root), *NAMES, "--workload", records.workload(seed=1).label]) == 0


def test_help_is_printed_and_says_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "by 0.5 % of what the" in capsys.readouterr().out


def test_runs_of_several_sets_of_knobs_are_not_averaged() -> None:
    known = [*REFERENCE, *three(FP32, (0.0, 0.0, 0.0)), *three(INT8, (0.0009, 0.0, 0.0))]
    with pytest.raises(ConfigError, match="several sets of knobs, which are not averaged; say which: fused,optimizer_state=fp32; fused,op"):
        judge(known, "hf", "fused", ())
    assert judge(known, "hf", "fused,optimizer_state=int8", ("fused,optimizer_state=fp32",)).kind == "same"


def refused(known: list[Run], name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        judge(known, name, name, ())
    return str(caught.value)


def test_the_first_word_that_no_run_has_is_told_with_the_nearest() -> None:
    known = [*three(HF, (0.0,) * 3), *three(FP32, (0.0,) * 3), *three(INT8, (0.0,) * 3)]
    assert refused(known, "fusd,micro_batch=4") == "'fusd,micro_batch=4': no run of fusd; did you mean 'fused'?"
    assert refused(known, "fused,optimizer_sate=int8").endswith(
        ": no run of fused has a knob optimizer_sate; did you mean 'optimizer_state'?"
    )
    assert refused(known, "fused,optimizer_state=int4").endswith(
        "no run of fused has that optimizer_state; there are runs with optimizer_state=fp32; optimizer_state=int8"
    )
    assert refused(known, "fused,~micro_batch").endswith("no run of fused has that micro_batch; there are runs with micro_batch=4")
    more = [*known, run(records.engine("fused", optimizer_state="int8", micro_batch=2), 0)]
    assert refused(more, "fused,optimizer_state=fp32,micro_batch=2").endswith(
        "has all of this at once; there are runs of fused,micro_batch=2,optimizer_state=int8; fused,micro_batch=4,optimizer_state=fp32; "
        "fused,micro_batch=4,optimizer_state=int8"
    )


def test_a_message_names_no_more_than_can_be_read() -> None:
    many = [run(records.engine("hf", micro_batch=number), 0) for number in range(30)]
    for name in ("hf", "hf,micro_batch=99"):
        assert refused(many, name).endswith("; and 22 more")
        assert len(refused(many, name)) < 300


def test_each_name_in_a_message_names_its_runs() -> None:
    """Those of records older than a knob too, and of knobs that are lists or null."""
    specs = (HF, records.engine("hf", optimizer="adamw"), records.engine("hf", optimizer=["a", "b"]), records.engine("hf", optimizer=None))
    known = [one for spec in specs for one in three(spec, (0.0,) * 3)]
    names = refused(known, "hf").partition("say which: ")[2].split("; ")
    assert names == ["hf,optimizer=None", "hf,optimizer=a+b", "hf,optimizer=adamw", "hf,~optimizer"]
    for name in names:
        assert judge(known, name, name, ()).kind == "same"


def test_variants_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["runs"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("required: reference, candidate")
