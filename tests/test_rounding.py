"""How far rounding moves a first loss: orders that change nothing in fp32, facts kept beside the scores, and allowances drawn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, MambaConfig, Phi3Config, Qwen2Config, Qwen3Config

from harness import prepare
from harness import score as door
from harness.anchors import anchors
from harness.comparable import Run, runs
from harness.data.tokens import IGNORE, Sample, StepTokens, TokenFile
from harness.errors import RecordError
from harness.orders import NUM_ORDERS, UNCHANGED, first_losses, mean_loss, reorder
from harness.parity import verdict
from harness.places import Prepared, RoundingItem, ScoreRequest
from harness.promote import promote
from harness.record import Record
from harness.rounding import Rounding
from harness.scoring import Trained, rounding_to_make
from harness.spec import Workload
from harness.store import load, read_rounding, save, save_rounding
from tests import records
from tests.real_files import conf, request, workload

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = [
    pytest.param(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True), id="biases"),
    pytest.param(LlamaConfig(**SHAPE, tie_word_embeddings=True), id="tied"),
    pytest.param(Qwen2Config(**SHAPE), id="biases of q, k and v"),
    pytest.param(Qwen3Config(**SHAPE, head_dim=8), id="normed heads"),
]
TRUTH = records.losses()[0]


def model(config: Any) -> Any:
    """One whose norms and biases are not ones and zeros, its weights exact in bf16."""
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in made.parameters():
        weight.data = (weight + 0.1 * torch.randn_like(weight)).to(torch.bfloat16).float()
    return made


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    made = []
    for length in (17, 40):
        ids = generator.integers(1, 97, length).astype(np.int32)
        labels = np.where(np.arange(length) < 5, IGNORE, ids)
        made.append(Sample(ids, labels.astype(np.int32)))
    return made


@pytest.mark.parametrize("config", FAMILIES)
def test_another_order_is_the_same_function(config: Any) -> None:
    of = model(config)
    before = {name: weight.detach().clone() for name, weight in of.named_parameters()}
    exact = mean_loss(of, samples())
    reorder(of, torch.Generator().manual_seed(1))
    assert mean_loss(of, samples()) == pytest.approx(exact, rel=UNCHANGED / 4)
    still = [name for name, weight in of.named_parameters() if torch.equal(weight, before[name])]
    assert all(part in name for name in still for part in ("self_attn",)), still


def test_in_bf16_orders_round_otherwise() -> None:
    of = model(LlamaConfig(**{**SHAPE, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4, "initializer_range": 0.05}))
    expected = mean_loss(of, samples())
    exact, rounded = first_losses(of, samples())
    assert (exact, len(rounded)) == (expected, NUM_ORDERS)
    assert len(set(rounded)) > NUM_ORDERS / 2, "sums of few values round alike in most orders"
    assert 0 < max(abs(one - exact) for one in rounded) < 0.02 * exact
    assert of.lm_head.weight.dtype == torch.bfloat16
    assert of.model.rotary_emb.inv_freq.dtype == torch.float32, "positions are not rounded"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(Phi3Config(**SHAPE), id="q, k and v in one product"),
        pytest.param(FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), id="other names"),
        pytest.param(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4), id="no attention"),
    ],
)
def test_nothing_is_said_of_layers_that_are_not_known(config: Any) -> None:
    assert first_losses(model(config), samples())[1] == ()


def test_the_judge_measures_it(cache: Path, tmp_path: Path) -> None:
    work = workload(data=conf("data", "python_docs"))
    prepared = prepare.prepare(request(work, cache, cache / "unused"))
    out = tmp_path / "rounding.json"
    item = RoundingItem(out=str(out))
    asked = ScoreRequest(workload=work, prepared=prepared, items=(), device="cpu", rounding=item)
    (tmp_path / "request.json").write_text(asked.model_dump_json())
    assert door.main([str(tmp_path / "request.json")]) == 0
    found = read_rounding(out, "here")
    step = TokenFile.open(Path(prepared.tokens)).step(work.train, 0)
    assert (found.base_sha256, found.stream_sha256) == (prepared.base_sha256, StepTokens.expected(step).sha256)
    assert found.exact == pytest.approx(mean_loss(door.load_model(Path(prepared.base), "cpu"), step), rel=1e-6)
    assert len(set(found.rounded)) > 1


def rounding(of: Record, *off: float) -> Rounding:
    assert of.measurement is not None
    base, stream = of.measurement.artifacts.base_sha256, of.measurement.steps.stream_sha256[0]
    return Rounding(base_sha256=base, stream_sha256=stream, exact=TRUTH, rounded=tuple(TRUTH + one for one in off), evaluator="torch, cpu")


def trained(name: str, dtype: str, off: float = 0.0, later: float = 0.0, **knobs: Any) -> Record:
    losses = (TRUTH + off, *(loss + later for loss in records.losses()[1:]))
    return records.record(records.engine(name, compute_dtype=dtype, **knobs), losses=losses)


REFERENCE = trained("hf", "float32")
# Three that agree to the bit are one draw, and what they allow is 0.002: hardly more than the floor, 0.00167.
VARIANTS = [trained("fused", "bfloat16", 0.001, later=0.004, operations="reference", micro_batch=size) for size in (1, 2, 4)]


def judged(candidate: Record, known: Rounding | None) -> str:
    all_runs = [Run(one, records.score(one), records.score(one, base=True), rounding=known) for one in (REFERENCE, *VARIANTS, candidate)]
    return verdict(all_runs[-1], anchors(all_runs, REFERENCE.cell.workload.key, REFERENCE.machine.key)).kind


@pytest.mark.parametrize(
    ("off", "known", "kind"),
    [
        pytest.param(0.005, None, "not comparable", id="nobody knows"),
        pytest.param(0.005, rounding(REFERENCE, -0.003, 0.0012), "same", id="as far as rounding"),
        pytest.param(0.0061, rounding(REFERENCE, -0.003, 0.0012), "different", id="farther than rounding"),
        pytest.param(0.005, rounding(REFERENCE, 0.0012, -0.002), "different", id="rounding is small"),
        pytest.param(0.005, rounding(REFERENCE), "not comparable", id="orders that are not known"),
    ],
)
def test_a_first_loss_may_stray_twice_as_far_as_rounding_moves_it(off: float, known: Rounding | None, kind: str) -> None:
    assert judged(trained("fused", "bfloat16", off), known) == kind


def test_what_does_not_round_has_no_excuse() -> None:
    assert judged(trained("fused", "float32", 0.005), rounding(REFERENCE, -0.003, 0.0012)) == "different"


def test_it_travels_with_the_records_it_is_about(tmp_path: Path) -> None:
    known = rounding(REFERENCE, 0.001)
    save(REFERENCE, tmp_path / "runs")
    save_rounding(known, tmp_path / "runs")
    save_rounding(known.model_copy(update={"stream_sha256": "0" * 64}), tmp_path / "runs")
    promote(tmp_path / "runs", tmp_path / "results")
    (run,) = runs(load(tmp_path / "results"))
    assert run.rounding == known
    assert list(load(tmp_path / "results").roundings.values()) == [known], "of promoted records only"
    (tmp_path / "results" / "rounding" / "broken.json").write_text("{}")
    (problem,) = load(tmp_path / "results").problems
    assert problem.startswith("results/rounding/broken.json: not a valid rounding")
    with pytest.raises(RecordError, match="delete it and run the sweep again"):
        read_rounding(tmp_path / "results" / "rounding" / "broken.json", "here")


def asked(root: Path, *of: Record, work: Workload | None = None) -> list[RoundingItem]:
    base = records.made(REFERENCE.cell)["base_sha256"]
    place = Prepared(tokens="tokens", base="base", adapter_init=None, base_sha256=base, adapter_init_sha256=None)
    return list(rounding_to_make(Trained(root, work or REFERENCE.cell.workload, place, of, "cpu"), root / "work"))


def test_it_is_measured_only_where_it_decides(tmp_path: Path) -> None:
    near, far = trained("fused", "bfloat16", 0.001), trained("fused", "bfloat16", 0.002)
    assert len(asked(tmp_path, REFERENCE, near, far)) == 1
    assert asked(tmp_path, REFERENCE, near) == []
    assert asked(tmp_path, near, far) == [], "without the truth"
    assert asked(tmp_path, REFERENCE, trained("fused", "float32", 0.002)) == []
    assert asked(tmp_path, REFERENCE, far, work=REFERENCE.cell.workload.first_step) == []
    save_rounding(rounding(REFERENCE, 0.001), tmp_path)
    assert asked(tmp_path, REFERENCE, far) == [], "it is known"
