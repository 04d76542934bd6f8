"""Uneven documents: layers and the loss are compiled for the kinds of call that need code of their own, in the first step, and no more."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.fx.experimental import _config as symbols

import engines.fsdp
import engines.hf
from engines.native import hf_model
from engines.native.hf_batches import inputs, make_batch, row_multiple
from harness.compiles import CompileCounter
from harness.data.tokens import StepTokens, TokenFile, epoch_order
from harness.data.write import write_token_file
from harness.engine import Job
from harness.spec import parse
from tests.engines import test_fsdp
from tests.engines.test_hf import KNOBS
from tests.engines.tiny import FULL, LLAMA, LORA, RecordingProbe, Sample, make_job, make_samples

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own compiler, when it is imported
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor:UserWarning"
    ),  # which the compiler hides, but not from an error filter
]
SIZE, HEAD, ROWS = LLAMA["hidden_size"], LLAMA["hidden_size"] // LLAMA["num_attention_heads"], 4
LONGEST = (HEAD, SIZE, 23, ROWS)  # of each batch of ROWS samples: lengths that are also other sizes, divisible by 8 and not


class _Compiler:
    """In Inductor's place: runs graphs as they are, counts them, and asks of every number of positions what Inductor asks on a GPU."""

    def __init__(self) -> None:
        self.graphs: Counter[str] = Counter()

    def __call__(self, graph: Any, _: Any, options: dict[str, Any] | None = None) -> Callable[..., Any]:
        self.graphs["loss" if any("cross_entropy" in str(node.target) for node in graph.graph.nodes) else "layer"] += 1
        for node in graph.graph.nodes:
            given = node.meta.get("example_value") if node.op == "placeholder" else None
            if isinstance(given, torch.Tensor) and given.dim() == 3:
                bool(given.shape[1] % 8 == 0)  # a guard: other code where the answer is another
                if (options or {}).get("shape_padding") is not False:  # of products with the rank that an adapter has here
                    bool(given.shape[0] * given.shape[1] > ROWS * SIZE / 2)
        forward: Callable[..., Any] = graph.forward
        return forward


class _CompilesProbe(RecordingProbe):
    """Also what the harness would say was compiled, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.compiles: list[int] = []
        self._counter = CompileCounter()
        self._before = self._counter.count

    def step(self, *, loss: torch.Tensor | float, grad_norm: torch.Tensor | float | None, tokens: StepTokens) -> None:
        now = self._counter.count
        self.compiles.append(now - self._before)
        self._before = now
        super().step(loss=loss, grad_norm=grad_norm, tokens=tokens)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Compiler]:
    made = _Compiler()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=made))
    torch._dynamo.reset()
    # What the engine sets ends with the test.
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False), symbols.patch(use_duck_shape=True):
        yield made
    torch._dynamo.reset()


def uneven(folder: Path, left: int, method: dict[str, Any]) -> Job:
    """Steps of ROWS samples, the longest as LONGEST says, and ``left`` more, whose lengths are divisible by 8 or not by turns."""
    each = ROWS + left
    job = make_job(folder, "llama", method, samples_per_step=each)
    lengths = [length for place, most in enumerate(LONGEST) for length in (most, 2, most - 1, 3, *[15 + place % 2] * left)]
    order = epoch_order(job.workload.train.seed, 0, len(lengths))
    samples: list[Sample] = [make_samples(1)[0]] * len(lengths)
    for place, length in zip(order, lengths, strict=True):
        ids = torch.arange(1, length + 1, dtype=torch.int32).numpy()
        samples[place] = Sample(ids, ids)
    return replace(job, tokens=TokenFile.open(write_token_file(folder / "uneven", samples, [], {})))


@pytest.mark.parametrize(
    ("engine", "knobs", "left", "method", "layers", "losses"),
    [
        pytest.param(engines.hf, {}, 0, LORA, 1, 1, id="padded"),
        pytest.param(engines.hf, {"layout": "packed"}, 0, LORA, 1, 1, id="packed"),
        # One row alone is a size that torch knows at once, and one document alone needs no mask.
        pytest.param(engines.hf, {}, 1, LORA, 2, 2, id="padded, one left"),
        pytest.param(engines.hf, {"layout": "packed"}, 1, LORA, 2, 1, id="packed, one left"),
        pytest.param(engines.hf, {"recompute": "full"}, 0, FULL, 1, 1, id="all weights, recomputed"),
        pytest.param(engines.hf, {"compute_dtype": "bfloat16", "adapter_compute": "direct"}, 0, LORA, 1, 1, id="bfloat16, direct"),
        # The proof that documents are apart is called without gradients: it is not compiled.
        pytest.param(engines.fsdp, {"layout": "packed"}, 0, LORA, 1, 1, id="fsdp"),
    ],
)
def test_kinds_of_call(
    compiler: _Compiler,
    tmp_path: Path,
    engine: ModuleType,
    knobs: dict[str, Any],
    left: int,
    method: dict[str, Any],
    layers: int,
    losses: int,
) -> None:
    probe, usual = _CompilesProbe(), KNOBS if engine is engines.hf else test_fsdp.KNOBS
    engine.train(uneven(tmp_path, left, method), parse(engine.Knobs, {**usual, "micro_batch": ROWS, "compile": True, **knobs}), probe)
    assert compiler.graphs == {"layer": layers, "loss": losses}
    assert probe.compiles == [layers + losses, 0, 0, 0]


def test_more_kinds_than_there_should_be_end_the_run(compiler: _Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of going on with layers that are not compiled."""
    monkeypatch.setattr(hf_model, "_MOST_KINDS_OF_CALL", 1)
    knobs = parse(engines.hf.Knobs, {**KNOBS, "micro_batch": ROWS, "compile": True})
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        engines.hf.train(uneven(tmp_path, 1, LORA), knobs, RecordingProbe())
    assert compiler.graphs["layer"] == 1


def positions(samples: Sequence[Sample], multiple_of: int) -> list[int]:
    given = inputs(make_batch(samples, packed=True, multiple_of=multiple_of), "cpu", packed=True, bounds=False)
    found: list[int] = given["position_ids"][0].tolist()
    return found


def test_padding_of_a_packed_row_goes_on_with_the_last_document() -> None:
    """So a row of one document stays one, and the rows before see nothing of it."""
    ids = torch.arange(5, dtype=torch.int32).numpy()
    one, other = Sample(ids, ids), Sample(ids[:2], ids[:2])
    assert positions([one], 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert positions([one, other], 8) == [0, 1, 2, 3, 4, 0, 1, 2]
    assert positions([one, other], 1) == [0, 1, 2, 3, 4, 0, 1]
    filled, usual = (make_batch([one, other], packed=True, multiple_of=multiple) for multiple in (8, 1))
    assert filled.labels[0, 7:].tolist() == [-100]
    assert (StepTokens.of([filled]).sha256, StepTokens.of([filled]).processed) == (StepTokens.of([usual]).sha256, 8)


def test_rows_are_filled_up_only_where_it_saves_code(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    even = TokenFile.open(write_token_file(tmp_path / "even", [make_samples(1)[0]] * 3, [], {}))
    assert row_multiple(job.tokens, "sdpa", compiled=True) == 8
    assert row_multiple(job.tokens, "sdpa", compiled=False) == 1
    assert row_multiple(job.tokens, "varlen", compiled=True) == row_multiple(job.tokens, "cudnn", compiled=True) == 1
    assert row_multiple(even, "sdpa", compiled=True) == 1
