"""After a rehearsal a run's steps compile nothing: every launch had been noted, with the same key, before the weights were there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engines.fused
from engines.native import checkpoint, rehearsal
from engines.native.buckets import extent
from engines.native.plan import KEEP_INPUT, Plan
from engines.native.rehearsal import Piece, sizes_of
from harness.data.tokens import IGNORE, Batch
from harness.spec import parse
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import make_job

TREE = Path(__file__).parents[2]
# Kernels that a step launches in each case, with all their specialisations; what a GPU's records counted (LoRA: 16) is among them.
NAMES: Mapping[str, set[str]] = {
    "lora": {
        "_rms_norm_forward",
        "_rms_norm_backward",
        "_swiglu_gradients",
        "_outer",
        "_rotate",
        "_rotate_back",
        "_attend",
        "_attend_backward_queries",
        "_attend_backward_keys",
        "_embed",
        "_cross_entropy",
        "_adamw",
    },
    "subset": {"_rms_norm_forward", "_swiglu_backward", "_outer", "_norm_rotate", "_norm_rotate_back"},
    "qlora": {"_decode_nf4", "_copy_parts"},
    "sharded": {"_copy_parts"},
    "sharded_qlora": {"_decode_nf4", "_copy_parts"},
    "fp8": {"_quantise_wide", "_write_tail", "_rms_norm_codes", "_swiglu_codes"},
    "fp8_forward": {"_decode_rows"},
    "full": {"_adamw_float32", "_norm_weight", "_normed_again"},
    "full_int8": {"_adamw_eight_bit"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was compiled, and when. In a process of its own: this one defines kernels for the interpreter."""
    folder = tmp_path_factory.mktemp("rehearsed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join([str(TREE), *sys.path])}
    command = [sys.executable, "-m", "tests.engines.rehearsed", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", NAMES)
def test_a_step_compiles_nothing_after_its_rehearsal(made: dict[str, dict[str, Any]], case: str) -> None:
    found = made[case]
    assert found["launches"] > 50, "the step launched hardly anything: the test is void"
    assert found["sizes"] > 2, "steps of one size: the test is weaker than it should be"
    assert found["late"] == []
    assert found["rehearsed"] == 0, "a rehearsal launches nothing"
    assert NAMES[case] <= set(found["ahead"])
    assert found["told"] == len(found["ahead"])


def test_without_a_rehearsal_the_step_would_have_compiled_as_many(made: dict[str, dict[str, Any]]) -> None:
    """Nothing was compiled in vain: what the plan that was assumed launches is launched, too."""
    for case, found in made.items():
        if case not in ("qlora", "subset", "full_int8"):  # these get another plan than was assumed
            assert found["needed"] == found["told"], case


@pytest.mark.parametrize("case", NAMES)
def test_sizes_that_rows_are_filled_up_to_compile_the_same_kernels(made: dict[str, dict[str, Any]], case: str) -> None:
    """So a capture of another size has nothing to load, which would wait until the device is idle."""
    found = made[case]
    assert all(len(set(column)) == len(column) for column in zip(*found["shared"], strict=True)), "tokens, documents, rows: all differ"
    assert found["noted"] >= len(NAMES[case]), "hardly anything was launched: the test is void"
    assert found["otherwise"] == {}


def test_threads_that_upload_wait_less_for_the_interpreter_meanwhile(made: dict[str, dict[str, Any]]) -> None:
    for found in made.values():
        meanwhile, afterwards = found["switched"]
        assert meanwhile < afterwards == pytest.approx(sys.getswitchinterval())


def test_the_engine_rehearses_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Recorded:
        def __init__(self, piece: Piece) -> None:
            told.append((piece.recompute, piece.loss_chunk, piece.extent().largest, len(list(piece.batches()))))

        def __enter__(self) -> Recorded:
            return self

        def __exit__(self, *error: object) -> None:
            told.append("closed")

        def finish(self, plans: tuple[Plan, ...], loss_chunk: int) -> int:
            told.append((plans, loss_chunk))
            return 16

    monkeypatch.setattr(rehearsal, "Rehearsal", Recorded)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *given: "a GPU without a table")
    load = checkpoint.load_weights
    monkeypatch.setattr(checkpoint, "load_weights", lambda *given: [told.append("loaded"), load(*given)][1])
    job = make_job(tmp_path, steps=3, samples_per_step=4)
    knobs = parse(engines.fused.Knobs, {**KNOBS, "operations": "fused", "compute_dtype": "bfloat16", "recompute": "full"})
    *_, chosen = engines.fused._load(job, knobs, 0)
    assert told == [("full", knobs.loss_chunk, None, 6), "loaded", ((KEEP_INPUT,) * 2, knobs.loss_chunk), "closed"]
    assert chosen["kernels_compiled_ahead"] == 16
    told.clear()
    *_, chosen = engines.fused._load(job, parse(engines.fused.Knobs, KNOBS), 0)
    assert told == ["loaded"]
    assert "kernels_compiled_ahead" not in chosen


def test_one_size_for_each_number_of_tokens() -> None:
    """Twice for documents that go to kernels of their own and for those that do not, here because they are equal."""

    def batch(*lengths: int) -> Batch:
        ids = np.zeros((1, sum(lengths)), np.int64)
        labels = ids.copy()
        labels[0, :2] = IGNORE
        return Batch(ids, labels, (lengths,))

    batches = [batch(100, 60), batch(80, 80), batch(60, 100), batch(100, 63)]
    assert [size.num_tokens for size in sizes_of(batches, extent(batches, shared=False))] == [160, 160, 163]
    shared = sizes_of(batches, extent(batches, shared=True))
    assert [(size.num_tokens, size.num_rows) for size in shared] == [(192, 192), (160, 158)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_on_a_gpu_too(tmp_path: Path) -> None:
    """Real addresses, attention's own strides, the launchers: the first step finds everything, from an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join([str(TREE), *sys.path])}
    command = [sys.executable, "-m", "tests.engines.rehearsed_gpu", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {case: late for case, (_, late) in found.items() if late} == {}
    assert min(ahead for ahead, _ in found.values()) >= 12
