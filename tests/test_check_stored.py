"""A check of stored records: judged without measuring, and what it refuses to trust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.check.__main__ import main
from harness.gates import Counted
from tests import records
from tests.checks import MIB, counted, side_of, stored


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return stored(tmp_path / "base", side_of(0)), stored(tmp_path / "new", side_of(1, 1.05))


def records_of(base: Path, candidate: Path) -> tuple[object, ...]:
    return "--records", base, "--candidate", candidate


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_stored_records_measured_side_by_side_are_judged_as_pairs(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(capsys, *records_of(*both))
    assert code == 3
    assert "regressed" in said
    assert "not measured side by side" not in said


def test_stored_records_of_two_sittings_must_beat_the_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = [
        one.model_copy(
            update={"provenance": one.provenance.model_copy(update={"started_utc": one.provenance.started_utc.replace("T10", "T20")})}
        )
        for one in side_of(1, 1.03)
    ]
    code, said = check(capsys, *records_of(stored(tmp_path / "base", side_of(0)), stored(tmp_path / "new", later)), "--strict")
    assert code == 4
    assert "not measured side by side" in said


def test_outputs_are_written(both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("o.md", "o.xml", "o.json")]
    check(capsys, *records_of(*both), "--markdown", files[0], "--junit", files[1], "--benchmark-json", files[2])
    assert [len(file.read_text()) > 100 for file in files] == [True] * 3


def spoil(root: Path, how: str) -> None:
    path = sorted(root.glob("*/*/*/*.json"))[0]
    raw = json.loads(path.read_text())
    if how == "truncated":
        path.write_text(path.read_text()[:400])
    elif how == "newer schema":
        path.write_text(json.dumps({**raw, "schema_version": 99}))
    elif how == "edited cell":
        raw["cell"]["workload"]["train"]["learning_rate"] = 1.0
        path.write_text(json.dumps(raw))
    elif how == "edited machine":
        raw["machine"]["name"] = "A faster one"
        path.write_text(json.dumps(raw))
    elif how == "edited seconds":
        raw["measurement"]["steps"]["seconds"] = [0.0] * 20
        path.write_text(json.dumps(raw))
    elif how == "failed":
        path.write_text(json.dumps({**raw, "status": "oom", "reason": "no room"}))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("truncated", 2, "truncated or edited"),
        ("newer schema", 2, "schema 99"),
        ("edited cell", 2, "edited or moved"),
        ("edited machine", 2, "edited or moved"),
        ("edited seconds", 6, "was edited"),
        ("failed", 6, "ended oom"),
    ],
)
def test_records_that_cannot_be_trusted_never_pass(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str], which: int, how: str, code: int, says: str
) -> None:
    spoil(both[which], how)
    found, said = check(capsys, *records_of(*both))
    assert (found, says in said) == (code, True), said


def test_an_older_schema_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = stored(tmp_path / "base", side_of(0))
    for path in base.glob("*/*/*/*.json"):
        raw = json.loads(path.read_text())
        raw["schema_version"] = 1
        data = raw["cell"]["workload"]["data"]
        data["mask_prompt"] = data.pop("supervise") == "answers"
        path.write_text(json.dumps(raw))
    code, said = check(capsys, *records_of(base, stored(tmp_path / "new", side_of(1))))
    assert (code, "same" in said) == (0, True), said


def test_too_few_repeats_are_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stored(tmp_path / "base", side_of(0, num_runs=2)), stored(tmp_path / "new", side_of(1))
    code, said = check(capsys, *records_of(*folders))
    assert (code, "too few repeats: 2 of the base, 8 of the candidate; at least 3" in said) == (6, True), said


def test_records_of_another_machine_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stored(tmp_path / "base", side_of(0, machine=records.GPU)), stored(tmp_path / "new", side_of(1))
    code, said = check(capsys, *records_of(*folders))
    assert code == 2
    assert "another machine" in said
    assert records.GPU.key in said


def test_records_that_cannot_be_compared_with_this_machine_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.check.command.Bench", pytest.fail)
    where = f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}"
    code, said = check(capsys, "--records", tmp_path / "absent", *where)
    assert (code, "there is no such folder" in said) == (2, True)
    code, said = check(capsys, "--records", stored(tmp_path / "base", side_of(0)), *where)
    assert (code, "records of another machine" in said, "this one is" in said) == (2, True, True)


def test_records_without_a_cell_in_common_are_nothing_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stored(tmp_path / "base", side_of(0)), stored(tmp_path / "new", side_of(1, work=records.workload(seed=7)))
    code, said = check(capsys, *records_of(*folders))
    assert code == 6
    assert "only in the base" in said
    assert "only in the candidate" in said


def test_a_default_that_changed_does_not_part_the_same_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = records.engine(micro_batch=8)
    later = [one.model_copy(update={"cell": one.cell.model_copy(update={"engine": spec})}) for one in side_of(1)]
    code, said = check(capsys, *records_of(stored(tmp_path / "base", side_of(0)), stored(tmp_path / "new", later)))
    assert (code, "only in" in said) == (0, False), said


def test_two_engines_are_no_default_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [one.model_copy(update={"cell": one.cell.model_copy(update={"engine": records.engine("fused")})}) for one in side_of(1)]
    code, said = check(capsys, *records_of(stored(tmp_path / "base", side_of(0)), stored(tmp_path / "new", other)))
    assert (code, said.count("only in")) == (6, 2), said


def test_counts_beside_the_records_are_compared(both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = stored(tmp_path / "better", side_of(1, 0.9))
    for root, one in ((both[0], counted()), (better, counted(peak=150 * MIB))):
        (root / "counts").mkdir()
        (root / "counts" / "0.json").write_text(one.model_dump_json())
    assert check(capsys, *records_of(both[0], better))[0] == 3
    (better / "counts" / "0.json").write_text(counted().model_dump_json()[:-30])
    code, said = check(capsys, *records_of(both[0], better))
    assert (code, "truncated or edited" in said) == (2, True)


def with_counts(root: Path, *of: Counted) -> Path:
    (root / "counts").mkdir(parents=True)
    for index, one in enumerate(of):
        (root / "counts" / f"{index}.json").write_text(one.model_dump_json())
    return root


def test_counts_alone_are_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``--gates`` leaves."""
    base, same = with_counts(tmp_path / "base", counted()), with_counts(tmp_path / "same", counted())
    code, said = check(capsys, *records_of(base, same))
    assert (code, "as before: memory, setup-memory" in said, "only in" in said) == (0, True, False), said
    code, said = check(capsys, *records_of(base, with_counts(tmp_path / "more", counted(peak=150 * MIB))))
    assert (code, "peak memory of a step: 104,857,600 → 157,286,400 bytes" in said) == (3, True), said
    other = counted()
    cell = other.record.cell.model_copy(update={"workload": records.workload(stop_after=3, seed=7)})
    apart = other.model_copy(update={"record": other.record.model_copy(update={"cell": cell})})
    code, said = check(capsys, *records_of(base, with_counts(tmp_path / "apart", apart)))
    assert (code, said.count("only in the ")) == (6, 2), said


def test_counts_of_a_side_without_times_are_compared_with_those_beside_times(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = check(capsys, *records_of(with_counts(tmp_path / "counts", counted()), with_counts(both[1], counted())))
    assert (code, said.count("\nsame "), said.count("only in the candidate")) == (0, 1, 1), said


def test_counts_alone_are_no_times_to_measure_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.check.command.Bench", pytest.fail)
    where = f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}"
    code, said = check(capsys, "--records", with_counts(tmp_path / "base", counted()), *where)
    assert (code, "counts alone, no timed record" in said) == (2, True), said


def test_places_may_be_said_where_nothing_is_measured(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, *records_of(both[0], both[0]), "runs=elsewhere", "cache=elsewhere")[0] == 0


def test_a_run_that_was_stopped_early_is_a_cell_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = stored(tmp_path / "both", [*side_of(0), *side_of(0, work=records.workload(stop_after=5))])
    code, said = check(capsys, *records_of(with_counts(root, counted()), root))
    assert (code, said.count("\nsame "), said.count("as before: memory, setup-memory")) == (0, 2, 2), said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base", "no-such-revision"], "no such revision, and no such folder"),
        (["--base", "{tmp}"], "there is no harness in it"),
        (["--records", "{tmp}/absent", "--candidate", "{tmp}"], "no such folder"),
        (["--records", "{tmp}", "--candidate", "{tmp}"], "no record here"),
        (["--records", "{tmp}", "--candidate", "{tmp}", "engine=hf"], "nothing is measured"),
        (["--base", "HEAD", "--candidate", "{tmp}"], "give that too"),
        (["--records", "{tmp}", "--gates"], "--gates counts both trees"),
        (["--base", "HEAD", "--allow", "memry"], "did you mean 'memory'"),
        (["--base", "HEAD", "engine=hff"], "did you mean 'hf'"),
        (["--base", "HEAD", "repeat=range(3)"], "use --pairs"),
    ],
)
def test_mistakes_are_exit_2_and_say_what_to_do(
    arguments: list[str], says: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [] if "--records" in arguments and "--candidate" in arguments else [f"runs={tmp_path}", f"cache={cache}"]
    code, said = check(capsys, *(argument.format(tmp=tmp_path) for argument in arguments), *places)
    assert (code, says in said) == (2, True), said
