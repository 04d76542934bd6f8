"""Real training on a CPU: every known mistake is caught and named, other kernels, splits and sums are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import engines.fused
import engines.hf
from harness import prepare, score
from harness.anchors import Anchor
from harness.comparable import Run, measured
from harness.data.tokens import TokenFile
from harness.deviations import TESTS
from harness.engine import Job
from harness.parity import judge_against
from harness.places import PairItem, Prepared, ScoreItem, ScoreRequest, Sources
from harness.record import Artifacts, Measurement, Record, Startup, Steps, loads_score
from harness.spec import Cell, EngineSpec, Workload, parse
from harness.store import read_pair
from harness.updates import pair_key
from harness.verdict import Verdict
from harness.weights import adapter_sha256, resolve_source
from harness.weights.base_model import prepare_base
from tests import records
from tests.engines.tiny import RecordingProbe
from tests.fakes import wrong
from tests.real_files import SAMPLE, conf, model, request

HF = {**conf("engine", "hf")["knobs"], "compute_dtype": "float32", "attention": "eager"}
FUSED = {**conf("engine", "fused")["knobs"], "compute_dtype": "float32", "operations": "reference", "replay": False}
HARMLESS: dict[str, tuple[Any, dict[str, Any]]] = {
    "another split": (wrong, {"micro_batch": 8}),
    "another attention": (wrong, {"attention": "eager"}),
    "sums in float64": (wrong, {"sums": "float64", "micro_batch": 1}),
    "explicit backward, packed": (engines.fused, FUSED),
    "the yardstick's recompute": (engines.hf, {**HF, "recompute": "full"}),
}
STREAM = "the token stream differs from step 1"
FIRST_LOSS = "loss of step 1: off by"
LYING = ("truncate", "shuffle", "no_mask", "skip_micro_batch")  # would be caught by its losses, if it reported the tokens of the file
WRONG: dict[str, tuple[str, str, str]] = {
    # the fault: the verdict, what is said of the worst, what is suspected
    "truncate": ("not comparable", STREAM, "truncated rows?"),
    "shuffle": ("not comparable", STREAM, "shuffled"),
    "no_mask": ("not comparable", STREAM, "prompt mask dropped?"),
    "skip_micro_batch": ("not comparable", STREAM, "a micro-batch skipped?"),
    "micro_mean": ("different", FIRST_LOSS, "micro-batch means"),
    "leak": ("different", FIRST_LOSS, "attention across documents"),
    "no_schedule": ("different", "update norm of step 1: 4.0", "the schedule skipped (no warm-up)?"),
    "rate_1_percent": ("different", "update norm of step 1: 1.0100 x", "learning rate?"),
    "no_scale": ("different", "gradient norm of step 1: 0.5000 x", "the LoRA scale forgotten"),
    "train_nothing": ("different", "update norm of step 1: 0.0000 x", "nothing was trained"),
    "zero_loss": ("different", FIRST_LOSS, "every loss is 0.0"),
}


@dataclass(frozen=True)
class Arena:
    """One workload, small but with power: SmolLM2 cut to two of its layers, real text, masked prompts."""

    workload: Workload
    prepared: Prepared
    folder: Path

    def train(self, name: str, engine: Any, knobs: dict[str, Any]) -> tuple[Record, Record | None]:
        """The whole run and its first step alone; not of those that are caught before any update is looked at."""
        whole = self._run(name, engine, knobs, self.workload)
        return whole, None if name in LYING else self._run(f"{name}, first", engine, knobs, self.workload.first_step)

    def _run(self, name: str, engine: Any, knobs: dict[str, Any], workload: Workload) -> Record:
        out = self.folder / name
        out.mkdir()
        place, probe = self.prepared, RecordingProbe()
        tokens = TokenFile.open(Path(place.tokens))
        job = Job(
            workload=workload, tokens=tokens, base=Path(place.base), adapter_init=Path(str(place.adapter_init)), out=out, device="cpu"
        )
        engine.train(job, parse(engine.Knobs, knobs), probe)
        steps = Steps(
            seconds=(1.0,) * len(probe.losses),
            losses=tuple(probe.losses),
            grad_norms=tuple(probe.grad_norms),
            tokens_input=tuple(one.input for one in probe.tokens),
            tokens_loss=tuple(one.loss for one in probe.tokens),
            tokens_processed=tuple(one.processed for one in probe.tokens),
            stream_sha256=tuple(one.sha256 for one in probe.tokens),
        )
        made = Artifacts(
            tokens_sha256=tokens.sha256,
            base_sha256=place.base_sha256,
            adapter_init_sha256=place.adapter_init_sha256,
            adapter_sha256=adapter_sha256(out),
        )
        module = engine.__name__
        spec = EngineSpec(
            name=module.rpartition(".")[2], module=module, processes=1, environment={}, knobs={"compute_dtype": "float32", **knobs}
        )
        like = records.record()
        measurement = Measurement(startup=Startup(process_seconds=0.0, setup_seconds=0.0), steps=steps, memory=(), artifacts=made)
        return like.model_copy(update={"cell": Cell(workload=workload, engine=spec, repeat=0), "measurement": measurement})


@pytest.fixture(scope="module")
def arena(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    folder = tmp_path_factory.mktemp("arena")
    smollm2 = model("smollm2_135m")
    gguf = str(resolve_source(smollm2.weights))
    whole = prepare_base(smollm2, Sources(weights=gguf, tokenizer=gguf), cache)
    cut: Any = AutoModelForCausalLM.from_pretrained(whole.path, dtype=torch.float32)
    cut.model.layers = cut.model.layers[:2]
    cut.config.num_hidden_layers, cut.config.layer_types = 2, None
    cut.save_pretrained(folder / "cut")
    rows = SAMPLE.read_text(encoding="utf-8").splitlines()[:240]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    raw = {
        "model": conf("model", "local", weights=f"dir:{folder / 'cut'}", tokenizer=smollm2.tokenizer, dtype="float32"),
        "data": conf("data", "jsonl", path="rows.jsonl", sequence_length=56, held_out_fraction=0.1, held_out_samples=16),
        "method": conf("method", "lora", rank=8, alpha=16),
        "train": conf("train", "parity", steps=6, samples_per_step=8, warmup_steps=4, learning_rate=5e-4, max_grad_norm=0.2),
    }
    workload = parse(Workload, raw)
    sources = {"weights": str(folder / "cut"), "tokenizer": gguf, "data": (str(folder / "rows.jsonl"),)}
    prepared = prepare.prepare(request(workload, cache, folder / "unused", **sources))
    return Arena(workload, prepared, folder)


@pytest.fixture(scope="module")
def verdicts(arena: Arena) -> dict[str, Verdict]:
    """Every candidate trained, scored by the real door in one go, and judged against the truth."""
    candidates = HARMLESS | {fault: (wrong, {"fault": fault}) for fault in WRONG}
    trained = {"truth": arena.train("truth", engines.hf, HF)}
    trained |= {name: arena.train(name, engine, knobs) for name, (engine, knobs) in candidates.items()}
    runs = _judged_weights(arena, trained)
    runs |= {f"{fault}, lying": _lying(runs[fault], runs["truth"]) for fault in LYING}
    return {name: judge_against(run, Anchor("fp32", runs["truth"])) for name, run in runs.items()}


def _lying(run: Run, truth: Run) -> Run:
    """The same training, by an engine that reports the tokens it should have seen."""
    mine, theirs = measured(run), measured(truth).steps
    told = {name: getattr(theirs, name) for name in ("tokens_input", "tokens_loss", "tokens_processed", "stream_sha256")}
    measurement = mine.model_copy(update={"steps": mine.steps.model_copy(update=told)})
    return replace(run, record=run.record.model_copy(update={"measurement": measurement}))


def _judged_weights(arena: Arena, trained: dict[str, tuple[Record, Record | None]]) -> dict[str, Run]:
    folder = arena.folder

    def sha(record: Record) -> str:
        assert record.measurement is not None
        return str(record.measurement.artifacts.adapter_sha256)

    def items() -> Iterator[ScoreItem]:
        yield ScoreItem(adapter=None, adapter_sha256=None, out=str(folder / "base.json"))
        for name, (whole, _) in trained.items():
            yield ScoreItem(adapter=str(folder / name), adapter_sha256=sha(whole), out=str(folder / f"{name}.json"))

    def pairs() -> Iterator[PairItem]:
        for name, both in trained.items():
            for mine, theirs, suffix in zip(both, trained["truth"], ("", ", first"), strict=True):
                if mine is None or theirs is None:
                    continue
                places = str(folder / f"truth{suffix}"), str(folder / f"{name}{suffix}")
                yield PairItem(trained=places, trained_sha256=(sha(theirs), sha(mine)), out=str(folder / f"{name}{suffix}.pair"))

    asked = ScoreRequest(workload=arena.workload, prepared=arena.prepared, items=tuple(items()), pairs=tuple(pairs()), device="cpu")
    score.score(asked)
    known = [read_pair(Path(pair.out), pair.out) for pair in asked.pairs]
    updates = {pair_key(pair.start_sha256, *pair.trained_sha256): pair for pair in known}
    base, *scores = (loads_score(Path(item.out).read_text(), item.out) for item in asked.items)
    return {name: Run(whole, one, base, first, updates) for (name, (whole, first)), one in zip(trained.items(), scores, strict=True)}


def test_the_workload_is_one_that_parity_can_be_judged_on(arena: Arena, verdicts: dict[str, Verdict]) -> None:
    """Label counts of micro-batches that differ, active clipping, alpha other than rank, warm-up, masked prompts."""
    tokens, schedule = TokenFile.open(Path(arena.prepared.tokens)), arena.workload.train
    samples = [sample for index in range(schedule.steps) for sample in tokens.step(schedule, index)]
    counts = [sum(sample.num_labels for sample in samples[start : start + 4]) for start in range(0, len(samples), 4)]
    assert max(counts) > 1.5 * min(counts)
    assert all(sample.num_labels < len(sample) - 1 for sample in samples)
    assert all(len(verdicts[name].tests) == len(TESTS) for name in HARMLESS)


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_changes_are_the_same(name: str, verdicts: dict[str, Verdict]) -> None:
    found = verdicts[name]
    assert found.label == "same: fp32", json.dumps(found.reasons)
    assert max(test.excess for test, _ in found.tests) < 0.5, "a harmless change should not come near the floor"


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_caught_and_named(name: str, verdicts: dict[str, Verdict]) -> None:
    kind, said, suspected = WRONG[name]
    found = verdicts[name]
    assert found.kind == kind, found.detail
    assert not found.can_win
    assert any(said in reason for reason in found.reasons), found.detail
    assert suspected in found.detail


@pytest.mark.parametrize("fault", LYING)
def test_an_engine_that_lies_about_its_tokens_is_caught_by_what_it_learnt(fault: str, verdicts: dict[str, Verdict]) -> None:
    found = verdicts[f"{fault}, lying"]
    assert found.kind == "different", found.detail
    assert any(FIRST_LOSS in reason for reason in found.reasons), found.detail
    assert "other labels" in found.hint
