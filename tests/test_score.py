"""The neutral evaluator: the loss is the plain one, whatever the batching, and adapters leave the base as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness import prepare
from harness import score as door
from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.data.write import write_token_file
from harness.errors import ConfigError, DataError, WeightsError
from harness.places import PairItem, Prepared, ScoreItem, ScoreRequest
from harness.record import Score, loads_score
from harness.spec import Workload
from tests.real_files import conf, request, workload


@pytest.fixture(scope="module")
def prepared(cache: Path) -> Prepared:
    return prepare.prepare(request(workload(data=DATA), cache, cache / "unused"))


DATA = conf("data", "python_docs", held_out_samples=24)


def trained(prepared: Prepared, folder: Path, spread: float = 0.05) -> Path:
    """An adapter moved away from its start by seeded noise."""
    shutil.copytree(str(prepared.adapter_init), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = np.random.default_rng(0)
    moved = {name: (value + spread * generator.standard_normal(value.shape)).astype(np.float32) for name, value in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    return folder


def run(prepared: Prepared, folder: Path, *adapters: Path | None, work: Workload | None = None) -> list[Score]:
    items = tuple(
        ScoreItem(adapter=str(adapter) if adapter else None, adapter_sha256="a" * 64 if adapter else None, out=str(folder / f"{i}.json"))
        for i, adapter in enumerate(adapters)
    )
    asked = ScoreRequest(workload=work or workload(data=DATA), prepared=prepared, items=items, device="cpu")
    (folder / "request.json").write_text(asked.model_dump_json())
    assert door.main([str(folder / "request.json")]) == 0
    return [loads_score(Path(item.out).read_text(), item.out) for item in items]


def plain_loss(model: Any, tokens: TokenFile) -> float:
    """One sample at a time, no padding, every position through the head, in fp64."""
    import torch

    total, count = 0.0, 0
    for sample in tokens.held_out:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0, :-1]
        likelihoods = torch.log_softmax(logits.double(), dim=-1).numpy()
        targets = sample.labels[1:]
        rows = np.flatnonzero(targets != IGNORE)
        total -= float(likelihoods[rows, targets[rows]].sum())
        count += len(rows)
    return total / count


def test_base_and_adapters_get_the_plain_loss_in_any_order(prepared: Prepared, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    moved = trained(prepared, tmp_path / "moved")
    initial = Path(str(prepared.adapter_init))
    base, first, same, second, again = run(prepared, tmp_path, None, moved, initial, moved, None)
    tokens = TokenFile.open(Path(prepared.tokens))
    model = AutoModelForCausalLM.from_pretrained(prepared.base)
    assert base.held_out_loss == pytest.approx(plain_loss(model, tokens), abs=2e-6)
    assert base.held_out_loss == pytest.approx(math.log(4096), abs=0.2)  # a random model guesses
    assert base.held_out_tokens == sum(sample.num_labels for sample in tokens.held_out)
    assert same.held_out_loss == again.held_out_loss == base.held_out_loss
    assert first == second
    assert first.held_out_loss == pytest.approx(plain_loss(PeftModel.from_pretrained(model, str(moved)), tokens), abs=2e-6)
    assert abs(first.held_out_loss - base.held_out_loss) > 1e-3
    assert (base.update_norm, same.update_norm) == (None, 0.0)
    assert (base.adapter_sha256, first.adapter_sha256) == (None, "a" * 64)
    assert (base.tokens_sha256, base.base_sha256) == (tokens.sha256, prepared.base_sha256)
    assert base.evaluator.startswith("engine-room 1, torch 2.")
    assert base.evaluator.endswith(", cpu, float32")


def test_batching_does_not_change_the_loss(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    model = door.load_model(Path(prepared.base), "cpu")
    held_out = TokenFile.open(Path(prepared.tokens)).held_out
    whole, count = door.held_out_loss(model, held_out, "cpu")
    for most in (1, 100, 333):
        monkeypatch.setattr(door, "BATCH_TOKENS", most)
        assert door.held_out_loss(model, held_out, "cpu") == (pytest.approx(whole, abs=2e-6), count)


def test_batches_hold_every_sample_once_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "BATCH_TOKENS", 50)
    samples = [Sample(np.full(n, n, np.int32), np.full(n, n, np.int32)) for n in (3, 60, 7, 12, 12, 49, 2)]
    split = TokenFile.open(write_token_file(tmp_path, samples[:1], samples, {})).held_out
    made = list(door.batches(split, 100))
    assert sorted(len(sample) for batch in made for sample in batch) == [2, 3, 7, 12, 12, 49, 60]
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 50 for batch in made)
    assert len(made) < len(samples)


def test_the_update_norm_is_over_all_a_and_b(prepared: Prepared, tmp_path: Path) -> None:
    moved = trained(prepared, tmp_path / "moved")
    after, before = (load_file(Path(str(f)) / "adapter_model.safetensors") for f in (moved, prepared.adapter_init))
    expected = np.sqrt(sum(float(((after[name].astype(np.float64) - before[name]) ** 2).sum()) for name in before))
    assert door.update_norm(moved, Path(str(prepared.adapter_init))) == pytest.approx(expected, rel=1e-12)
    (score,) = run(prepared, tmp_path, moved)
    assert score.update_norm == pytest.approx(expected, rel=1e-12)


def test_two_updates_are_compared_exactly(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, moved, longer = Path(str(prepared.adapter_init)), trained(prepared, tmp_path / "moved"), tmp_path / "longer"
    shutil.copytree(moved, longer)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, moved))
    turned = {name: before[name] + np.float32(1.01) * np.roll(after[name] - before[name], 1) for name in before}
    save_file(turned, longer / "adapter_model.safetensors")
    a, b = (np.concatenate([(one[name] - before[name]).astype(np.float64).ravel() for name in before]) for one in (after, turned))
    for chunk in (door.CHUNK, 100):
        monkeypatch.setattr(door, "CHUNK", chunk)
        pair = door.compare_updates(prepared, PairItem(trained=(str(longer), str(moved)), trained_sha256=("b", "a"), out=""))
        assert (pair.start_sha256, pair.trained_sha256) == (prepared.adapter_init_sha256, ("a", "b"))
        assert pair.norms == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)), rel=1e-9)
        assert pair.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    still = door.compare_updates(prepared, PairItem(trained=(str(start), str(moved)), trained_sha256=("a", "b"), out=""))
    assert (still.norms[0], still.cosine) == (0.0, None)


def test_an_adapter_of_another_shape_or_name_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    moved = trained(prepared, tmp_path / "moved")
    tensors = load_file(moved / "adapter_model.safetensors")
    tensors["surplus"] = np.ones(3, np.float32)
    save_file(tensors, moved / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"differing in name or shape: surplus \(of 1\)"):
        door.update_norm(moved, Path(str(prepared.adapter_init)))
    with pytest.raises(WeightsError, match=r"its tensors are not those its adapter_config.json describes: surplus"):
        door.with_adapter(door.load_model(Path(prepared.base), "cpu"), moved)
    (moved / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="not an adapter that PEFT can load"):
        door.with_adapter(door.load_model(Path(prepared.base), "cpu"), moved)


def test_full_weights_are_scored_as_they_are(prepared: Prepared, cache: Path, tmp_path: Path) -> None:
    work = workload(data=DATA, method=conf("method", "full"))
    full = prepare.prepare(request(work, cache, tmp_path / "unused"))
    other = prepare.prepare(
        request(workload(data=DATA, method=conf("method", "full"), config=work.model.config, name="x"), cache, tmp_path / "u")
    )
    assert other.base == full.base
    shutil.copytree(full.base, tmp_path / "weights")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    save_file({name: value * np.float32(1.5) for name, value in tensors.items()}, tmp_path / "weights" / "model.safetensors")
    base, moved = run(full, tmp_path, None, tmp_path / "weights", work=work)
    expected = np.sqrt(sum(float(np.sum((0.5 * value.astype(np.float64)) ** 2)) for value in tensors.values()))
    assert moved.update_norm == pytest.approx(expected, rel=1e-6)
    assert moved.held_out_loss != base.held_out_loss


def test_nothing_held_out_is_a_message(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = workload(data=conf("data", "dense", num_samples=2, sequence_length=8))
    made = prepare.prepare(request(work, cache, tmp_path / "unused"))
    asked = ScoreRequest(workload=work, prepared=made, items=(), device="cpu")
    with pytest.raises(DataError, match=r"no held-out rows; set data.held_out_fraction above 0"):
        door.score(asked)
    (tmp_path / "request.json").write_text(asked.model_dump_json())
    assert door.main([str(tmp_path / "request.json")]) == 2
    assert "nothing to score" in capsys.readouterr().err
    assert door.main([]) == 2


def test_weights_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not weights that transformers can load"):
        door.load_model(tmp_path, "cpu")
    (tmp_path / "request.json").write_text("[")
    with pytest.raises(ConfigError, match="not a readable request"):
        door.read_request(tmp_path / "request.json")


def test_scores_are_written_as_json(prepared: Prepared, tmp_path: Path) -> None:
    run(prepared, tmp_path, None)
    raw = json.loads((tmp_path / "0.json").read_text())
    assert set(raw) == set(Score.model_fields)
