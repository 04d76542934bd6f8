"""Epochs become steps before anything runs: every sample comes so many times, and the last step is filled up from the next epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from harness.config import Config, Request, requests
from harness.data.tokens import Sample, TokenFile
from harness.data.write import write_token_file
from harness.epochs import num_steps
from harness.errors import ConfigError
from harness.preparing import counting
from tests.records import workload

SMALL = ("model=tiny_llama", "data=dense", "data.sequence_length=8", "machine=cpu", "train.samples_per_step=4")


def ask(cache: Path, *overrides: str, samples: int = 10, multirun: bool = False) -> list[Request]:
    def count(_config: Config, _request: Request) -> int:
        return samples

    return requests([*SMALL, *overrides, f"cache={cache}"], multirun=multirun, count=count)[1]


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1, 10, 3), (2, 10, 5), (3, 8, 6), (0.5, 10, 2), (0.1, 10, 1), (0.7, 40, 7), (1, 1, 1)]
)
def test_steps_of_epochs(epochs: float, samples: int, steps: int) -> None:
    assert num_steps(epochs, samples, 4) == steps


@pytest.mark.parametrize(("samples", "epochs"), [(10, 3), (8, 1), (3, 2)])
def test_every_sample_comes_so_often_and_the_last_step_begins_the_next_epoch(tmp_path: Path, samples: int, epochs: int) -> None:
    made = [Sample(np.full(3, number, np.int32), np.full(3, number, np.int32)) for number in range(samples)]
    tokens = TokenFile.open(write_token_file(tmp_path, made, [], {}))
    train = workload().train.model_copy(update={"steps": num_steps(epochs, samples, 4), "samples_per_step": 4})
    seen = Counter(int(sample.input_ids[0]) for step in range(train.steps) for sample in tokens.step(train, step))
    assert set(seen) == set(range(samples))
    assert set(seen.values()) <= {epochs, epochs + 1}
    assert 0 <= sum(seen.values()) - epochs * samples < 4, "less than a step is filled up"


def test_the_cell_sees_steps_alone_and_the_schedule_follows(cache: Path) -> None:
    (by_epochs,), (by_steps,) = ask(cache, "train.epochs=6"), ask(cache, "train.steps=15")
    assert by_epochs.cell == by_steps.cell
    assert by_epochs.cell.workload.train.learning_rate_at(14) < 0.1 * by_epochs.cell.workload.train.learning_rate
    swept = ask(cache, "train.epochs=4,6", multirun=True)
    assert [one.cell.workload.train.steps for one in swept] == [10, 15]


def test_training_by_epochs_is_in_earnest(cache: Path) -> None:
    def settings(*overrides: str) -> tuple[str, float | None]:
        kept, (one,) = requests([*SMALL, *overrides, f"cache={cache}"], multirun=False, count=lambda *_: 40)
        return kept.keep, one.limits.wall_seconds

    assert settings() == ("none", 3600.0)
    assert settings("train.epochs=1") == ("adapters", None)
    assert settings("train.epochs=1", "keep=none", "limits.wall_seconds=60") == ("none", 60.0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.epochs=1", "train.steps=5"], "train.epochs=1 and train.steps=5: both say how long to train; give one of them"),
        (["train.steps=null"], "train.steps and train.epochs are both null"),
        (["train.epochs=0"], "train.epochs: got 0; expected a number above 0"),
        (["train.epochs=soon"], "train.epochs: got 'soon'"),
        (["train.epochs=0.1"], "train.epochs=0.1 of 10 samples: 1 step)"),
        (["train.epochs=0.1"], "warmup_steps"),
    ],
)
def test_mistakes_are_answered(overrides: list[str], says: str, cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, *overrides)
    assert says in str(caught.value)


def test_commands_that_tokenise_nothing_say_so(cache: Path) -> None:
    with pytest.raises(ConfigError, match="does not count samples"):
        requests([*SMALL, "train.epochs=1", f"cache={cache}"], multirun=False)


def test_samples_are_counted_once_for_all_engines_after_the_split(cache: Path, tmp_path: Path) -> None:
    """Rows held out are no part of an epoch."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{number} + 1?", "completion": "{number + 1}"}}\n' for number in range(40)))
    said: list[str] = []
    words = ["model=tiny_llama", "machine=cpu", "data=jsonl", f"data.path={rows}", "data.held_out_fraction=0.5", "train.epochs=2"]
    words += ["train.samples_per_step=1", f"cache={cache}", f"runs={tmp_path / 'runs'}"]
    _, found = requests(["engine=hf,fused", *words], multirun=True, count=counting(said.append), say=said.append)
    samples = {one.cell.workload.train.steps // 2 for one in found}
    assert len(samples) == 1
    assert 0 < samples.pop() < 40
    assert sum("to count its samples" in line for line in said) == 1


def test_rows_that_cannot_be_used_are_found_out_once(cache: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1?"}\n')
    said: list[str] = []
    words = ["model=tiny_llama", "machine=cpu", "data=jsonl", f"data.path={rows}", "train.epochs=1,2", f"cache={cache}"]
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: found the keys prompt; expected"):
        requests([*words, f"runs={tmp_path / 'runs'}"], multirun=True, count=counting(said.append))
    assert len(said) == 1


def test_nothing_is_counted_beside_another_mistake(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        requests(
            [*SMALL, "train.epochs=0,2", "engine.knobs.micro_batch=0", f"cache={cache}"],
            multirun=True,
            count=lambda *_: pytest.fail("tokenised for a sweep that cannot run"),
        )
    assert {line.partition(":")[0] for line in str(caught.value).splitlines()} == {"train.epochs", "engine.knobs.micro_batch"}


def test_a_sweep_says_its_steps_once(cache: Path) -> None:
    said: list[str] = []
    words = [*SMALL, "train.epochs=2,3", "engine=hf,fused", f"cache={cache}"]
    requests(words, multirun=True, count=lambda *_: 10, say=said.append)
    assert said == ["train.epochs=2: 5 steps of 4 samples", "train.epochs=3: 8 steps of 4 samples"]
