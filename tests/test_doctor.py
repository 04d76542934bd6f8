"""The doctor on good and bad machines: fake drivers, interpreters that crash, missing packages; and a cache purged with care."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.doctor import hardware, runnable, software
from harness.doctor.caches import entries, purge, select, storage_findings
from harness.doctor.command import run
from harness.doctor.finding import Finding
from harness.doctor.show import findings_json, verdict
from harness.errors import ConfigError, StoreError
from harness.record import Record
from harness.store import save
from tests import records
from tests.fakes_nvml import NVMLError, nvml

TREE = Path(__file__).resolve().parent.parent
FAKES = TREE / "tests" / "fakes" / "conf"
TORCH = {
    "version": "2.13.0", "cuda": "13.0", "usable": True, "devices": [[9, 0]], "architectures": ["sm_80", "sm_90"], "sum": 2.0,
    "sources": 1000, "without_bytecode": 3,
}  # fmt: skip
TRITON = {"version": "3.6.0", "device": "cuda", "right": True}


def interpreter(folder: Path, torch: object = None, triton: object = None, *, ends: str = "") -> str:
    """An interpreter that answers the two probes as told, or ends as told."""
    for name, facts in (("torch", torch or TORCH), ("triton", triton or TRITON)):
        (folder / f"{name}.json").write_text(json.dumps(facts))
    path = folder / "python"
    path.write_text(f'#!/bin/sh\necho "a warning first"\n{ends}\ncat "{folder}/$3.json"\n')
    path.chmod(0o755)
    return str(path)


def test_a_problem_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="must say what to do"):
        Finding("software", "torch", "problem", "broken")
    with pytest.raises(ValueError, match="only a problem"):
        Finding("software", "torch", "note", "absent", "install it", blocks=True)


def test_a_gpu_is_described_with_what_disturbs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1, used=3 * 2**30, processes=(4321,), mig=True))
    found = {finding.name: finding for finding in hardware.gpu_findings()}
    assert found["driver"].found == "580.159.04, speaks CUDA 13.0"
    assert found["GPU 0"].found == "NVIDIA H100 80GB HBM3, 79.6 GiB, 3.0 in use, compute capability 9.0, limit 700 W"
    assert (found["GPU 0 busy"].state, found["GPU 0 busy"].found) == ("problem", "process 4321 holds 3.0 GiB")
    assert found["GPU 0 MIG"].state == "note"


def test_a_quiet_gpu_without_mig_is_one_line_and_no_driver_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(2, mig=NVMLError("not supported")))
    assert [(finding.name, finding.state) for finding in hardware.gpu_findings()] == [("driver", "ok"), ("GPU 0", "ok"), ("GPU 1", "ok")]
    monkeypatch.setitem(sys.modules, "pynvml", nvml(0, fails=True))
    (none,) = hardware.gpu_findings()
    assert (none.state, none.found) == ("note", "none: machine=cpu is used")


@pytest.mark.parametrize(
    ("changed", "state", "says"),
    [
        ({}, "ok", "built for CUDA 13.0, uses 1 GPU(s)"),
        ({"cuda": "12.6"}, "ok", "built for CUDA 12.6"),
        ({"cuda": None, "usable": False}, "problem", "a CPU build, but there is a GPU"),
        ({"cuda": "14.1"}, "problem", "newer than the driver, which speaks CUDA 13.0"),
        ({"usable": False, "devices": []}, "problem", "finds no GPU that NVML sees"),
        ({"devices": [[12, 0]]}, "problem", "no code for compute capability 12.0"),
        ({"devices": [[8, 9]]}, "ok", "uses 1 GPU(s)"),
        ({"devices": [[12, 0]], "architectures": ["sm_80", "compute_90"]}, "ok", "uses 1 GPU(s)"),
    ],
)
def test_torch_must_fit_the_driver_and_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, object], state: str, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1))
    (torch,) = software.torch_findings(interpreter(tmp_path, {**TORCH, **changed}))
    assert (torch.state, torch.blocks) == (state, state == "problem")
    assert says in torch.found


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ('echo "ImportError: libcudart.so: no such file" >&2; exit 1', "ImportError: libcudart.so: no such file"),
        ("kill -SEGV $$", "its process ended with signal 11"),
        ("exit 3", "its process ended with exit code 3"),
        ("echo half; exit 0", "said nothing that can be read"),
    ],
)
def test_a_broken_torch_is_a_finding_not_the_end(tmp_path: Path, ends: str, says: str) -> None:
    (torch,) = software.torch_findings(interpreter(tmp_path, ends=ends))
    assert torch.blocks
    assert says in torch.found
    triton = software.triton_finding(interpreter(tmp_path, ends=ends))
    assert (triton.state, triton.blocks) == ("problem", False)


def test_bytecode_that_nobody_keeps_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked of the real torch: where Python may write what it compiles, and where it may not and finds none."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "kept"))
    assert len(software.torch_findings(sys.executable)) == 1
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "none"))
    torch, note = software.torch_findings(sys.executable)
    assert (torch.state, note.name, note.state) == ("ok", "bytecode", "note")
    assert "PYTHONPYCACHEPREFIX" in str(note.remedy)


def test_an_interpreter_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    (torch,) = software.torch_findings(str(tmp_path / "absent"))
    assert "does not start (No such file or directory)" in torch.found


def test_a_kernel_that_computes_wrong_is_a_problem(tmp_path: Path) -> None:
    wrong = software.triton_finding(interpreter(tmp_path, triton={**TRITON, "right": False}))
    assert (wrong.state, wrong.found) == ("problem", "3.6.0 compiles and runs a kernel on the GPU, but computes it wrong")


def test_packages_are_held_against_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.package_findings()[0].state == "ok", "this environment has what the project requires"
    found = {"transformers": "4.1.0", "peft": None}
    real = software._version
    monkeypatch.setattr(software, "_version", lambda name: found[name] if name in found else real(name))
    required, *_ = software.package_findings()
    assert required.blocks
    assert required.found == "peft is missing; transformers is 4.1.0, required <5.18,>=5.17"


@pytest.mark.parametrize(("version", "blocks"), [((3, 10), True), ((3, 11), False), ((3, 13), False), ((3, 14), True)])
def test_python_must_be_one_that_was_tried(version: tuple[int, int], blocks: bool) -> None:
    assert hardware.python_finding(version).blocks is blocks


def test_too_little_memory_or_disk_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hardware.memory_finding(2**30).blocks
    assert not hardware.memory_finding(2**33).blocks
    monkeypatch.setattr("harness.doctor.caches.shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    states = [(finding.name, finding.blocks) for finding in storage_findings(tmp_path / "runs", tmp_path / "not" / "yet")]
    assert states == [("runs", True), ("cache", True), ("cached", False)]


def test_engines_that_cannot_run_say_why(tmp_path: Path) -> None:
    def engine(*overrides: str, name: str = "faulty") -> Finding:
        own = [f"hydra.searchpath=[file://{FAKES}]", "machine=cpu", "model=tiny_llama", "data=dense", f"cache={tmp_path}", *overrides]
        return next(one for one in runnable.engine_findings(own, [FAKES]) if one.name == name)

    able = engine()
    assert (able.state, able.found.partition(";")[0]) == ("ok", "can run tiny_llama, lora, dense")
    refused = engine("method=full", name="trivial")
    assert (refused.state, refused.found) == (
        "note", "cannot run tiny_llama, full, dense here: trivial has no method=full; use method=lora"
    )  # fmt: skip
    gone = engine(f"engine.python={tmp_path}/gone/bin/python")
    assert (gone.state, gone.found) == ("note", f"not set up: there is no {tmp_path}/gone/bin/python")
    assert str(gone.remedy) == "build that environment, or correct engine.python"
    broken = engine(f"engine.python={shutil.which('false')}")
    assert broken.state == "problem"
    assert "does not run" in broken.found
    assert str(broken.remedy).startswith("build the environment that conf/engine/faulty.yaml names")
    absent = engine("model.tokenizer=package:no_such_package/x")
    assert (absent.state, absent.found) == ("problem", "cannot be configured")
    assert "pip install no-such-package" in str(absent.remedy)


def test_models_that_lack_the_same_package_share_a_remedy(tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.yaml").write_text("weights: package:no_such_package/x.gguf\ntokenizer: package:no_such_package/x.gguf\n")
    (tmp_path / "own.yaml").write_text("weights: ???\ntokenizer: ${model.weights}\n")
    able, lacking = runnable.model_findings(tmp_path)
    assert (able.state, able.found) == ("ok", "own")
    assert (lacking.state, lacking.found) == ("problem", "mine, yours")
    assert str(lacking.remedy).count("pip install no-such-package") == 1


def test_the_demo_is_planned_with_the_overrides_that_were_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(0))
    where = [f"cache={tmp_path}", f"runs={tmp_path}"]
    assert runnable.demo_finding(where).found == "6 cells of hf, fused can run: make demo"
    other = runnable.demo_finding(["machine=cpu", "model=tiny_llama", *where])
    assert other.found.endswith("can run: python -m harness +sweep=demo machine=cpu model=tiny_llama")
    impossible = runnable.demo_finding(["machine=cuda", *where])
    assert impossible.blocks
    assert impossible.found.startswith("hf: asked for 1 NVIDIA GPU(s), NVML sees 0")


def test_the_verdict_names_what_stands_in_the_way() -> None:
    good, bad = Finding("GPU", "driver", "ok", "580"), Finding("software", "torch", "problem", "broken", "mend it", blocks=True)
    beside = Finding("GPU", "GPU 0 busy", "problem", "process 1", "wait")
    assert verdict([good, beside]) == "The demo can run here. 1 problem(s) stand in the way of other things."
    assert verdict([good, bad]).startswith("The demo cannot run here; in the way: software, torch.")
    assert json.loads(findings_json([good, bad]))["demo_can_run"] is False
    assert json.loads(findings_json([good, beside]))["demo_can_run"] is True


def test_the_command_on_this_machine(cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.doctor", "--json", "machine=cpu", f"cache={cache}", f"runs={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=300)
    said = json.loads(done.stdout)
    assert done.returncode == (0 if said["demo_can_run"] else 1)
    assert {"machine", "GPU", "software", "storage", "models", "engines"} == {finding["area"] for finding in said["findings"]}
    assert all(finding["remedy"] for finding in said["findings"] if finding["state"] == "problem")
    assert not (tmp_path / "runs").exists(), "looking changes nothing"


def test_the_doctor_itself_may_lack_a_package() -> None:
    code = "import sys; sys.modules['rich'] = None; from harness.doctor.__main__ import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks the package 'rich'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_override_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chache=x", "--cache"]) == 0, "only runs= and cache= matter to the cache"
    assert run(["cache=[", "--cache"]) == 2
    assert "error: cache=[: not an override" in capsys.readouterr().err


@pytest.fixture
def held(tmp_path: Path) -> tuple[Path, Path, Record]:
    """A cache with an entry of each kind, and a record that used two of them."""
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    record = records.record(artifacts={"tokens_sha256": "a" * 64, "base_sha256": "b" * 64})
    save(record, runs)
    base, adapter = cache / "base" / ("1" * 20), cache / "adapter" / "toy-1-2-seed0-1"
    for folder, manifest in ((base, {"base_sha256": "b" * 64, "description": "Q4_1-dequantised"}), (adapter, {"adapter_sha256": "c" * 64})):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (base / "model.safetensors").write_bytes(b"0" * 5000)
    (cache / "tokens" / "index").mkdir(parents=True)
    (cache / "tokens" / f"{'a' * 64}.safetensors").write_bytes(b"0" * 100)
    (cache / "base" / ".1234.host.5.partial").mkdir()
    (cache / "base" / "notes of mine").write_text("keep")
    (cache / "tokens" / "index" / "x.json").write_text("{}")
    return cache, runs, record


def test_the_cache_is_listed_with_what_used_it(held: tuple[Path, Path, Record]) -> None:
    cache, runs, record = held
    ancient = time.time() - 3 * 86_400
    for path in (cache / "base" / ("1" * 20)).iterdir():
        os.utime(path, (ancient, ancient))
    entries(cache, runs)  # looking is not using
    found = {entry.kind: entry for entry in entries(cache, runs)}
    label = record.cell.workload.label
    assert (found["base"].about, found["base"].age) == (f"Q4_1-dequantised, {label}", "3 days")
    assert (found["tokens"].about, found["tokens"].num_bytes) == (label, 100)
    assert found["adapter"].about == "used by no record here"
    assert found["unfinished"].name == ".1234.host.5.partial"


def test_purging_deletes_what_was_listed_and_nothing_else(held: tuple[Path, Path, Record], capsys: pytest.CaptureFixture[str]) -> None:
    cache, runs, _ = held
    where = [f"cache={cache}", f"runs={runs}"]
    assert run([*where, "--purge", "tokens"]) == 2, "nobody is there to say yes"
    assert len(entries(cache, runs)) == 4
    assert run([*where, "--purge", "tokens", "--yes"]) == 0
    assert "a" * 20 in capsys.readouterr().out, "the list comes first"
    assert sorted(entry.kind for entry in entries(cache, runs)) == ["adapter", "base", "unfinished"]
    assert run([*where, "--purge", "all", "--yes"]) == 0
    assert entries(cache, runs) == []
    assert (cache / "base" / "notes of mine").read_text() == "keep"


def test_purging_takes_kinds_and_beginnings_of_names(held: tuple[Path, Path, Record]) -> None:
    cache, runs, _ = held
    everything = entries(cache, runs)
    assert [entry.kind for entry in select(everything, "toy")] == ["adapter"]
    with pytest.raises(ConfigError, match="did you mean 'adapter'"):
        select(everything, "adaptr")


def test_purging_waits_for_no_sweep_and_follows_no_link(held: tuple[Path, Path, Record], tmp_path: Path) -> None:
    cache, runs, _ = held
    outside = tmp_path / "outside"
    outside.mkdir()
    (cache / "base" / ("2" * 20)).symlink_to(outside)
    linked = [entry for entry in entries(cache, runs) if entry.name == "2" * 20]
    with pytest.raises(StoreError, match="leads out of"):
        purge(linked, cache, runs)
    (runs / "work").mkdir()
    with (runs / "work" / "measuring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="a sweep is at work"):
            purge(entries(cache, runs), cache, runs)
    assert outside.is_dir()
    assert len(entries(cache, runs)) == 5, "nothing was deleted"
