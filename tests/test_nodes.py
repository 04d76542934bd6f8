"""Several hosts, one cell: what each runs, what is refused, and two of them on this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.config import Limits, Request
from harness.endings import heard_from_afar
from harness.errors import ConfigError
from harness.launch import follow, run_cell
from harness.places import Nodes
from harness.plan import Rerun, plan
from harness.ranks import worker_command
from harness.record import in_a_line
from harness.spec import parse
from harness.store import load
from tests import workloads
from tests.workloads import Made

TREE = Path(__file__).resolve().parent.parent


def on(nodes: dict[str, Any], processes: int = 4, save_every: int | None = None) -> Request:
    request = workloads.request(workloads.workload(), processes=processes)
    machine = request.machine.model_copy(update={"nodes": parse(Nodes, nodes)})
    return request.model_copy(update={"machine": machine, "save_every": save_every})


TWO = {"count": 2, "rank": 1, "endpoint": "first:29500"}


def test_ranks_are_shared_node_by_node() -> None:
    command = " ".join(worker_command("python", Path("job.json"), 4, parse(Nodes, TWO)))
    assert "--nnodes 2 --node-rank 1 --master-addr first --master-port 29500 --nproc-per-node 2 -m harness.worker job.json" in command
    assert "--standalone" in worker_command("python", Path("job.json"), 4)


def test_two_nodes_are_another_machine() -> None:
    (planned,) = plan([on(TWO)], [], "all")
    assert planned.action == "run"
    assert planned.machine.nodes == 2
    assert planned.machine.key.endswith("-2nodes")


@pytest.mark.parametrize(
    ("processes", "rerun", "save_every", "reason"),
    [
        (3, "all", None, "engine.processes=3 cannot be shared evenly by 2 nodes; use a multiple of 2"),
        (4, "stale", None, "2 nodes must run the same cells, whatever each has recorded; set rerun=all"),
        (4, "all", 5, "set save_every=null"),
    ],
)
def test_what_nodes_cannot_share_is_refused(processes: int, rerun: Rerun, save_every: int | None, reason: str) -> None:
    request = on(TWO, processes, save_every)
    (planned,) = plan([request], [], rerun)
    assert planned.action == "unsupported"
    assert planned.reason is not None
    assert reason in planned.reason


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ({"count": 2}, "needs an endpoint: HOST:PORT of the node with rank 0"),
        ({"count": 2, "rank": 2, "endpoint": "first:29500"}, "rank=2 is not one of 2 nodes"),
        ({"count": 2, "endpoint": "first"}, "endpoint"),
    ],
)
def test_settings_that_do_not_agree_are_named(nodes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(Nodes, nodes)


def test_each_node_names_the_rank_that_died_on_it(prepared: Made, tmp_path: Path) -> None:
    endpoint = free_endpoint()

    def ended_on(rank: int) -> str | None:
        request = workloads.request(prepared.workload, processes=2, behaviour="kill")
        nodes = Nodes(count=2, rank=rank, endpoint=endpoint)
        request = request.model_copy(update={"machine": request.machine.model_copy(update={"nodes": nodes})})
        machine, root = workloads.MACHINE.model_copy(update={"nodes": 2}), tmp_path / f"node-{rank}"
        if rank == 0:
            return run_cell(request, machine, prepared.prepared, root, lambda event: None).reason
        return follow(request, machine, prepared.prepared, root, held=None)

    with ThreadPoolExecutor() as both:
        first, second = both.map(ended_on, range(2))
    assert first is not None
    assert first.startswith("rank 0 ended with SIGKILL and without a word")
    assert second is not None
    assert second.startswith("crash: rank 1 ended with SIGKILL and without a word")


def test_what_may_come_from_another_node_says_so() -> None:
    lost = "rank 0: Traceback (most recent call last):\n  ...\nRuntimeError: Connection closed by peer"
    heard = heard_from_afar(lost, "crash", 2, met=True)
    assert heard is not None
    assert in_a_line(heard) == (
        "rank 0: RuntimeError: Connection closed by peer (a rank that died on another of the 2 nodes is named there)"
    )
    alone = heard_from_afar("stopped", "no_progress", 2, met=False)
    assert alone is not None
    assert alone.startswith("the 2 nodes have not met: run the same command on each with its own machine.nodes.rank")
    for said, status, nodes, met in (
        (lost, "crash", 1, True),
        ("rank 0 ended with SIGKILL", "crash", 2, True),
        ("stopped", "no_progress", 2, True),
        ("stopped", "no_progress", 1, False),
        (None, "ok", 2, True),
    ):
        assert heard_from_afar(said, status, nodes, met=met) == said  # type: ignore[arg-type]


def test_a_node_that_nobody_meets_says_what_is_missing(prepared: Made, tmp_path: Path) -> None:
    request = workloads.request(prepared.workload, processes=2, limits=Limits(wall_seconds=4.0, no_progress_seconds=4.0))
    nodes = Nodes(count=2, rank=1, endpoint=free_endpoint())
    request = request.model_copy(update={"machine": request.machine.model_copy(update={"nodes": nodes})})
    said = follow(request, workloads.MACHINE.model_copy(update={"nodes": 2}), prepared.prepared, tmp_path, held=None)
    assert said is not None
    assert said.startswith("timeout: the 2 nodes have not met: ")
    assert said.endswith("stopped after limits.wall_seconds=4.0")


def free_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_two_nodes_of_one_process_make_one_record(cache: Path, tmp_path: Path) -> None:
    """Both on this host, with one folder of runs between them."""
    shared = [
        "engine=fsdp", "engine.processes=2", "engine.knobs.micro_batch=1", "machine=cpu", "model=tiny_llama", "data=dense",
        "data.sequence_length=32", "data.num_samples=8", "train.steps=3", "train.warmup_steps=1", "train.samples_per_step=2", "rerun=all",
        "machine.nodes.count=2", f"machine.nodes.endpoint={free_endpoint()}", f"runs={tmp_path / 'runs'}", f"cache={cache}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "harness", *shared, f"machine.nodes.rank={rank}"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert re.search(r"node 1 of 2: fsdp/replicate .* ended well", said[0])
    (stored,) = load(tmp_path / "runs").stored
    record = stored.record
    assert (record.status, record.reason, record.machine.nodes) == ("ok", None, 2)
    assert record.measurement is not None
    assert len(record.measurement.steps.losses) == 3
    assert record.measurement.steps.tokens_input == (64, 64, 64), "the tokens of both"
