"""The sweeps of the peers' tables: on an 80 GB GPU every cell is accepted, the table is whole, and what is refused says why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from harness import plan as planner
from harness.config import requests
from harness.engine import Machine
from harness.plan import Planned, plan

H100 = Machine(device="cuda", name="Test H100", count=1, memory_gib=80, power_limit_watts=700)
PEERS = {"fused", "hf/ckpt", "hf/liger", "unsloth/default"}
ON_DENSE = {*PEERS, "unsloth/nockpt+padded", "unsloth/nockpt+graphs", "axolotl/kernels+liger"}
TABLES = {
    "peers": {*ON_DENSE, "hf/default", "hf/best+padded"},
    "peers_qlora": ON_DENSE,
    "peers_gsm8k": {
        *PEERS, "hf/default", "hf/best", "unsloth/nockpt", "unsloth/nockpt+padded+grouped", "unsloth/nockpt+graphs+grouped+to-64",
        "axolotl/kernels+liger+packed",
    },
}  # fmt: skip


GSM8K = "data.fields={prompt: question, completion: answer}"
QUESTIONS = ("data=jsonl", GSM8K, "data.sequence_length=1024", "train.samples_per_step=64")
# What docs and comments in the sweeps tell people to type beside the tables above: sweep, overrides, engines in a block, workloads.
COMMANDS: list[tuple[str, tuple[str, ...], int, int]] = [
    ("shapes", (), 3, 4),
    ("shapes", ("data.sequence_length=4096", "train.samples_per_step=4"), 3, 2),
    ("within", (), 2, 1),
    ("within", ("method=qlora", "engine=fused/within-8.05,unsloth/default+padded"), 2, 1),
    ("within", ("method=qlora", "engine=fused/within-2.31,unsloth/default+padded", "model=llama3_1b"), 2, 1),
    ("within", ("method=qlora", "engine=fused,unsloth/default+padded", "train.samples_per_step=1"), 2, 1),
    ("peers_full", (), 6, 1),
    ("peers_full", ("engine=unsloth/nockpt+padded", "method.dtype=bfloat16"), 1, 1),
    ("peers_gsm8k", ("engine=fused,unsloth/nockpt", "engine.knobs.micro_batch=64", "train.steps=88"), 2, 1),
    ("peers_gsm8k", ("method=qlora", "engine=fused,unsloth/nockpt+padded+grouped,axolotl/kernels+liger+packed"), 3, 1),
    ("gpus", (), 11, 1),
    ("gpus", ("engine.processes=8", "train.samples_per_step=32"), 11, 1),
    ("gpus", ("engine=fused,fsdp/replicate,deepspeed/zero2", "engine.processes=1", "train.samples_per_step=4"), 3, 1),
    ("gpus", QUESTIONS, 11, 1),
    ("gpus", ("method=qlora", "engine=fused,axolotl/kernels+liger+ddp"), 2, 1),
    ("gpus", ("method=full", "engine=fsdp/full_shard,deepspeed/zero3"), 2, 1),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    return path


@pytest.fixture(autouse=True)
def _an_h100_with_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *given: Any) -> Any:
        return "found" if name in ("liger_kernel", "bitsandbytes") else found(name, *given)

    monkeypatch.setattr(planner, "detect", lambda device, count=1, **kwargs: H100.model_copy(update={"count": count}))
    monkeypatch.setattr(planner, "lack", lambda python, required: None)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def planned(sweep: str, rows: Path, cache: Path, *overrides: str) -> list[Planned]:
    data = [f"data.path={rows}"] if sweep == "peers_gsm8k" or "data=jsonl" in overrides else []
    return plan(requests([f"+sweep={sweep}", *data, "machine=cuda", *overrides, f"cache={cache}"], multirun=True)[1], [], "stale")


@pytest.mark.parametrize("model", ["llama3_1b", "llama3_8b"])
@pytest.mark.parametrize("sweep", TABLES)
def test_every_cell_is_accepted_and_the_table_is_whole(sweep: str, model: str, rows: Path, cache: Path) -> None:
    cells = planned(sweep, rows, cache, f"model={model}")
    assert [(cell.request.cell.engine.title, cell.reason) for cell in cells if cell.action != "run"] == []
    blocks = [[cell.request.cell.engine.title for cell in cells if cell.request.cell.repeat == repeat] for repeat in range(3)]
    assert TABLES[sweep] <= set(blocks[0])
    assert blocks[1] == blocks[0][::-1]
    assert blocks[2] == blocks[0]


@pytest.mark.parametrize(("sweep", "overrides", "engines", "workloads"), COMMANDS)
def test_every_command_of_a_table_is_accepted(
    sweep: str, overrides: tuple[str, ...], engines: int, workloads: int, rows: Path, cache: Path
) -> None:
    cells = planned(sweep, rows, cache, *overrides)
    assert [(cell.request.cell.engine.title, cell.reason) for cell in cells if cell.action != "run"] == []
    blocks: dict[tuple[str, int], list[str]] = {}
    for cell in cells:
        cell_ = cell.request.cell
        blocks.setdefault((cell_.workload.key, cell_.repeat), []).append(cell_.engine.title)
    assert {len(block) for block in blocks.values()} == {engines}
    keys = {key for key, _ in blocks}
    assert len(keys) == workloads
    for key in keys:
        assert blocks[key, 1] == blocks[key, 0][::-1]
        assert blocks[key, 2] == blocks[key, 0]


def test_every_variant_of_a_table_of_adapters_has_its_verdict(rows: Path, cache: Path) -> None:
    """hf/ckpt and hf/default are what is judged by, the others are candidates; QLoRA's one more variant only keeps less."""
    judged = {cell.request.cell.engine.title for cell in planned("parity_peers", rows, cache) if cell.action == "run"}
    timed = set().union(*TABLES.values()) | {cell.request.cell.engine.title for cell in planned("shapes", rows, cache)}
    assert timed - judged == {"hf/ckpt"}


def test_what_is_within_a_budget_is_called_so(rows: Path, cache: Path) -> None:
    named = {cell.request.cell.engine.title: cell.request.cell.engine.knobs for cell in planned("within", rows, cache, "repeat=0")}
    assert named["fused/within-17.7"]["memory_gib"] == 17.7
    (by_hand,) = planned("within", rows, cache, "repeat=0", "engine=fused", "engine.knobs.memory_gib=6.6")
    assert by_hand.request.cell.engine.title == "fused/within-6.6"


def test_the_questions_are_64_a_step_in_micro_batches_that_every_engine_takes(rows: Path, cache: Path) -> None:
    cells = planned("peers_gsm8k", rows, cache, "repeat=0")
    assert {cell.request.cell.workload.train.samples_per_step for cell in cells} == {64}
    assert {cell.request.cell.engine.knobs["micro_batch"] for cell in cells} == {16}


def test_what_is_refused_says_why(rows: Path, cache: Path) -> None:
    """All weights: padded batches only in Unsloth, the compute type and no LoRA kernels in Axolotl."""
    cells = planned("peers", rows, cache, "repeat=0", "method=full", "method.dtype=bfloat16")
    refused = {cell.request.cell.engine.title: cell.reason for cell in cells if cell.action == "unsupported"}
    assert "use layout=padded" in (refused["unsloth/default"] or "")
    assert refused["axolotl/kernels+liger"] == "lora_kernels are for method=lora; set lora_kernels=[]"
    assert not {"unsloth/nockpt+padded", "hf/ckpt"} & set(refused)
    (plain,) = planned("peers", rows, cache, "repeat=0", "method=full", "method.dtype=bfloat16", "engine=axolotl/plain")
    assert plain.action == "run"


def test_what_tells_the_suspects_of_a_lost_run_apart_is_accepted(rows: Path, cache: Path) -> None:
    cells = planned("axolotl_nan", rows, cache)
    assert [cell.reason for cell in cells if cell.action != "run"] == []
    assert sorted(cell.request.cell.engine.title for cell in cells) == [
        "axolotl/kernels+ckpt", "axolotl/kernels+liger+ckpt", "axolotl/plain+ckpt", "axolotl/plain+liger+ckpt",
    ]  # fmt: skip
    single = planned(
        "axolotl_nan", rows, cache, "engine.knobs.lora_kernels=[mlp],[qkv],[o]", "engine.knobs.liger=[]",
        "model.name=llama3_8b_2", "model.config.num_hidden_layers=2", "engine.knobs.recompute=none",
    )  # fmt: skip
    assert [cell.action for cell in single] == ["run"] * 3
    other = planned("axolotl_nan", rows, cache, "engine.knobs.lora_kernels=[mlp,qkv,o]", "engine.knobs.attention=eager,flex_attention")
    assert [cell.reason for cell in other if cell.action != "run"] == []
