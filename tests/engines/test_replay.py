"""Replayed steps: what is launched, captured and replayed when, and that gradients, losses and weights are those of launched ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import engines.fused
from engines.native import reference, replay, steps
from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.data.write import write_token_file
from harness.engine import Job
from harness.spec import parse
from tests.engines.recorded import Recording, attention, attention_backward
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import FULL, LORA, QLORA, VOCABULARY, RecordingProbe, make_job, with_train

STEPS = 7


def job_of(folder: Path, method: dict[str, Any], lengths: list[int], **train: Any) -> Job:
    """Samples of these lengths, again and again, of which all tokens but three are supervised; three of them are a step."""
    random = np.random.default_rng(5)
    samples = []
    for length in lengths * (12 // len(lengths)):
        ids = random.integers(0, VOCABULARY, size=length).astype(np.int32)
        samples.append(Sample(ids, np.where(np.arange(length) < 3, IGNORE, ids).astype(np.int32)))
    job = make_job(folder, "tied" if method is FULL else "llama", method, steps=STEPS, samples_per_step=3, **train)
    return replace(job, tokens=TokenFile.open(write_token_file(folder / "given", samples, [], {})))


def trained(job: Job, name: str, **knobs: Any) -> tuple[RecordingProbe, dict[str, torch.Tensor]]:
    probe, mine = RecordingProbe(), replace(with_train(job, name), tokens=job.tokens)
    engines.fused.train(mine, parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
    return probe, load_file(next(mine.out.glob("*.safetensors")))


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    found = Recording()
    monkeypatch.setattr(replay, "_ByCuda", lambda mode: found)
    return found


@pytest.mark.parametrize("method", [LORA, QLORA, FULL], ids=["lora", "qlora", "full"])
def test_steps_whose_micro_batches_come_in_any_order_are_those_that_are_launched(
    tmp_path: Path, recording: Recording, method: dict[str, Any]
) -> None:
    """To the bit. Of two lengths in three places hardly two steps are alike, but few pieces have to be captured for all of them."""
    job = job_of(tmp_path, method, [16, 24, 16, 16, 24, 24])
    launched, mine = trained(job, "launched", micro_batch=1, replay=False)
    replayed, other = trained(job, "replayed", micro_batch=1, replay=True)
    assert len({tuple(len(sample.input_ids) for sample in job.tokens.step(job.workload.train, index)) for index in range(STEPS)}) > 2
    assert (replayed.losses, replayed.grad_norms, replayed.tokens) == (launched.losses, launched.grad_norms, launched.tokens)
    assert all(value.equal(other[name]) for name, value in mine.items())
    # Two lengths and the update. Where all weights are trained the first micro-batch of a step overwrites, so it is another sort of piece.
    assert len(recording.sizes) == (5 if method is FULL else 3)
    assert min(recording.sizes) > 0
    assert sum(recording.replays) == 4 * STEPS - (3 if method is FULL else 2), "the first of each sort was launched"
    assert recording.after_launches[0]
    assert not recording.after_launches[-1], "nothing was launched between the last two captures"


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_uneven_rows_are_filled_up_and_replayed_from_the_first_on(
    tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    """The largest row is made room for before the first step, and the first rows are filled up to it; filling changes no gradient."""
    table = replace(reference.REFERENCE, attention=attention, attention_backward=attention_backward)
    monkeypatch.setattr(reference, "REFERENCE", table)
    job = job_of(tmp_path, method, [3, 9, 60, 24, 100, 70])
    data = job.workload.data.model_copy(update={"sequence_length": 128})
    job = replace(job, workload=job.workload.model_copy(update={"data": data}))
    launched, mine = trained(job, "launched", micro_batch=2, replay=False)
    replayed, other = trained(job, "replayed", micro_batch=2, replay=True)
    assert replayed.losses == pytest.approx(launched.losses, rel=2e-6)
    assert replayed.grad_norms == pytest.approx(launched.grad_norms, rel=1e-5)
    assert len(set(launched.losses)) == STEPS
    for name, value in mine.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-6)
    pieces = 2 * STEPS + STEPS + (2 if method is FULL else 1)  # micro-batches, updates, room for the largest
    assert sum(recording.replays) == pieces - 2, "by hand: the first update, and the first row of one document, which is not filled up"
    found = {tokens.processed for tokens in replayed.tokens}
    assert all(tokens.processed > tokens.input for tokens in replayed.tokens)
    assert len(found) > 1, "some rows have come to sizes of their own"


def test_an_update_inside_backward_makes_one_piece_of_a_step(tmp_path: Path, recording: Recording) -> None:
    job = job_of(tmp_path, FULL, [16], max_grad_norm=None)
    launched, mine = trained(job, "launched", micro_batch=3, replay=False)
    replayed, other = trained(job, "replayed", micro_batch=3, replay=True)
    assert replayed.losses == launched.losses
    assert all(value.equal(other[name]) for name, value in mine.items())
    assert recording.replays == [STEPS - 1]


def test_no_more_graphs_than_there_is_room_for(tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is launched, and right."""
    job = job_of(tmp_path, LORA, [16, 24, 16, 16, 24, 24])
    launched, _ = trained(job, "launched", micro_batch=1, replay=False)
    monkeypatch.setattr(replay, "MOST_GRAPHS", 2)
    replayed, _ = trained(job, "replayed", micro_batch=1, replay=True)
    assert replayed.losses == launched.losses
    assert len(recording.sizes) == 2


def test_ranks_meet_over_the_gradients_of_the_step(tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed pass fills the buffer without a word to Python, whose last news is that an update has used it."""
    met: list[float] = []
    monkeypatch.setattr(steps.Steps, "meet", lambda self: met.append(float(self.arena.gradients.norm())))
    job = job_of(tmp_path, FULL, [16])
    trained(job, "launched", micro_batch=3, replay=False)
    launched = met[:]
    met.clear()
    trained(job, "replayed", micro_batch=3, replay=True)
    assert met == launched
    assert min(met) > 0
    assert recording.replays == [STEPS - 1] * 2


class _Graph:
    """As CUDA's, where a copy goes on beside the stream that is captured: it cannot be ended."""

    ended = 0

    def capture_begin(self, pool: tuple[int, int], mode: str) -> None:
        assert (pool, mode) == ((0, 1), "global")

    def capture_end(self) -> None:
        self.ended += 1
        raise torch.AcceleratorError("CUDA error: capturing stream has unjoined work")


def test_what_breaks_a_capture_off_is_raised_and_not_that_the_graph_could_not_be_ended() -> None:
    """A run out of memory is recorded as such by its error alone (``harness.worker``)."""
    graph = _Graph()
    with pytest.raises(torch.OutOfMemoryError, match="114"), replay.recording(graph, (0, 1), "global"):  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 114.00 MiB")
    assert graph.ended == 1
    with pytest.raises(torch.AcceleratorError, match="unjoined"), replay.recording(graph, (0, 1), "global"):  # type: ignore[arg-type]
        pass
    assert graph.ended == 2
