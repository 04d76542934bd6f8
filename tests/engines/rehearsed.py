"""``python -m tests.engines.rehearsed FOLDER``: rehearse tiny steps without a GPU, make them, and print what each compiled.

Triton's driver has a stand-in whose launches do nothing; the steps after the rehearsal run on real tensors of the CPU, so that their
addresses, sizes and strides decide what is asked for. Run in a process of its own: the tests' own defines kernels for the interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engines.native import attention, fp8_ops, loader, reference
from engines.native.buckets import shared_sizes
from engines.native.checkpoint import load_weights, read_config
from engines.native.compiling import noted
from engines.native.decoder import Decoder
from engines.native.divided import Division
from engines.native.fp8_ops import FUSED_FP8
from engines.native.full_ops import FUSED_FULL
from engines.native.fused_ops import FILLING, FUSED
from engines.native.loader import Placement
from engines.native.lora import read_adapter
from engines.native.nf4 import moved
from engines.native.ops import Attended, Heads, Ops
from engines.native.optimizer import step_scalars
from engines.native.optimizers import optimizer_for
from engines.native.packed import Angles, Packed
from engines.native.plan import KEEP_ALL, KEEP_INPUT, Plan
from engines.native.rehearsal import Piece, Rehearsal, packed_as, sizes_of, without_memory
from engines.native.replicas import Shares
from engines.native.shape import read_shape
from engines.native.steps import Steps
from engines.native.store import Training
from engines.native.weights import Linear
from harness.data.tokens import IGNORE, Batch
from harness.engine import Job
from harness.syntax_trees import one_tree_at_a_time
from tests.engines import tiny

CPU = torch.device("cpu")
IN_PIECES = Plan(KEEP_ALL.kept - {"gate_up", "middle"}, pieces=2)
BIASED: dict[str, Any] = {**tiny.FAMILIES["llama_biases"], "intermediate_size": 96, "hidden_size": 64}
QWEN3: dict[str, Any] = {**tiny.FAMILIES["qwen3"], "intermediate_size": 96, "hidden_size": 64}


def both_alike(part: torch.Tensor, whole: torch.Tensor) -> None:
    whole.view(2, -1).copy_(part.reshape(1, -1))


# Documents of micro-batches that fill up to other sizes (their lengths), and how many tokens of each are supervised.
SHARED = (
    ([*range(200, 262), 300, 410], 90),
    ([*range(202, 268)], 130),
    ([*range(180, 218)], 101),
    ([150, 160, 171, 202], 77),
    ([151], 40),
)
HALF = {"division": Division(0, 2, both_alike)}
INT8 = Training("int8", in_backward=True)
# name: configuration, method, table, what the knobs say, the plan that is found once the weights are there
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Ops, dict[str, Any], Plan]] = {
    "lora": (BIASED, tiny.LORA, FUSED, {}, KEEP_ALL),
    "subset": (QWEN3, {**tiny.LORA, "targets": ("v_proj", "down_proj")}, FUSED, {}, KEEP_INPUT),
    "qlora": (BIASED, tiny.QLORA, FUSED, {}, IN_PIECES),
    "sharded": (BIASED, tiny.LORA, FUSED, HALF, KEEP_ALL),
    "sharded_qlora": (BIASED, tiny.QLORA, FUSED, HALF, KEEP_INPUT),
    "fp8": (BIASED, {**tiny.LORA, "name": "lora_fp8"}, FUSED_FP8, {"fp8": "forward_and_input_gradients", "rank_multiple": 16}, KEEP_ALL),
    "fp8_forward": (BIASED, {**tiny.LORA, "name": "lora_fp8"}, FUSED_FP8, {"fp8": "forward", "rank_multiple": 16}, KEEP_ALL),
    "full": (BIASED, tiny.FULL, FUSED_FULL, {"training": Training("fp32")}, KEEP_ALL),
    "full_int8": (QWEN3, tiny.FULL, FUSED_FULL, {"training": INT8}, KEEP_INPUT),
}


class NoGpu:
    """Triton's driver for an H100 that does nothing with what it is given."""

    launches = 0
    launched: ClassVar[set[str]] = set()

    @property
    def utils(self) -> NoGpu:
        return self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *given: Any) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*given: Any) -> None:
            NoGpu.launches += 1
            NoGpu.launched.add(metadata.hash)

        return launch


class Compilations:
    """Counts what is compiled or fetched from Triton's cache on disk: either way somebody waits."""

    def __init__(self) -> None:
        self.names: list[str] = []
        knobs.compilation.listener = lambda **told: self.names.append(told["src"].name)

    def since(self) -> list[str]:
        names, self.names = self.names, []
        return names


def on_a_cpu(ops: Ops) -> Ops:
    """Attention that is not Triton's in plain torch, its gradients contiguous as the GPU's are."""

    def forward(heads: Heads, packed: Packed, linear: Linear) -> Attended:
        return (attention.attention if attention.by_own_kernels(heads, packed) else reference.attention)(heads, packed, linear)

    def backward(dy: torch.Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
        if attention.by_own_kernels(heads, packed):
            return attention.attention_backward(dy, heads, attended, packed)
        made = reference.attention_backward(dy, heads, attended, packed)
        return Heads(*(each.contiguous() for each in (made.queries, made.keys, made.values)))

    return replace(ops, attention=forward, attention_backward=backward)


def batch_of(lengths: list[int], supervised: int) -> Batch:
    """One packed row; every document's last ``supervised`` tokens have labels."""
    ids = np.zeros((1, sum(lengths)), np.int64)
    labels = np.full_like(ids, IGNORE)
    for end in np.cumsum(lengths):
        labels[0, end - supervised : end] = 1
    return Batch(ids, labels, (tuple(lengths),))


def apart(piece: Piece, plans: tuple[Plan, ...]) -> tuple[dict[str, list[str]], list[tuple[int, ...]], int]:
    """(kernels that some of ``SHARED`` compile otherwise than others, and how; what those sizes are; launches that differ, of one).

    Each micro-batch adds to gradients that are there, as all but the first of a step do.
    """
    decoder = without_memory(piece, tuple(replace(plan, kept=plan.held, offloaded=frozenset()) for plan in plans), loss_chunk=1024)
    optimizer_for(decoder.weights, piece.job.workload, kernels=True)
    made = [shared_sizes(batch_of(*each)) for each in SHARED]
    found = []
    for sizes in (made[0], *made):
        with noted() as launches:
            decoder.accumulate(packed_as(sizes, piece.shape.head_dim), torch.empty((), device="meta"))
        found.append({key: f"{launch.kernel.fn.__name__} {launch.specialisation}" for key, launch in launches.items()})
    _, *found = found
    common = set.intersection(*map(set, found))
    others: dict[str, list[str]] = {}
    for said in sorted({said for each in found for key, said in each.items() if key not in common}):
        others.setdefault(said.split()[0], []).append(said)
    return others, [(each.num_tokens, each.num_documents, each.num_rows) for each in made], len(found[0])


def rehearse(job: Job, table: Ops, options: dict[str, Any], plan: Plan, counted: Compilations) -> dict[str, Any]:
    shape = read_shape(read_config(job.base), tiny.LONGEST)
    adapter = None if job.adapter_init is None else read_adapter(job.adapter_init)
    placement = Placement(CPU, torch.bfloat16, torch.float32, **{"rank_multiple": 64, "filling": FILLING, **options})
    shares = Shares(job, shape, 0, micro_batch=5 if job.adapter_init is None else 2, shared=False)
    piece = Piece(
        job=job, shape=shape, placement=placement, adapter=adapter, ops=table, batches=shares.every, extent=lambda: shares.extent,
        recompute="fit", loss_chunk=16,
    )  # fmt: skip
    plans = (plan,) * shape.num_layers
    with Rehearsal(piece) as rehearsal:
        weights = load_weights(job.base, shape, placement, adapter)
        told, switched = rehearsal.finish(plans, 16), sys.getswitchinterval()
    otherwise, shared, noted_launches = apart(piece, plans)
    ahead, launches = counted.since(), NoGpu.launches
    decoder = Decoder(shape=shape, weights=weights, ops=on_a_cpu(table), plans=plans, loss_chunk=16)
    train = job.workload.train
    steps = Steps(decoder, Angles.of(shape, 128, CPU), optimizer_for(weights, job.workload, kernels=True), train.max_grad_norm)
    for index in range(train.steps):
        rows, tokens = shares.of(index)
        packed, scalars = steps.place(rows, step_scalars(train, index, tokens.loss))
        steps.compute(packed, scalars)
    return {
        "sizes": len(sizes_of(shares.every(), shares.extent)),
        "told": told,
        "ahead": sorted(ahead),
        "rehearsed": launches,
        "launches": NoGpu.launches - launches,
        "needed": len(NoGpu.launched),
        "late": counted.since(),
        "otherwise": otherwise,
        "shared": shared,
        "noted": noted_launches,
        "switched": (switched, sys.getswitchinterval()),
    }


def main(folder: Path, only: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    one_tree_at_a_time()
    driver.set_active(NoGpu())  # type: ignore[arg-type]
    fp8_ops._product = lambda codes, scales, rows, count: codes.new_zeros(len(codes), count, dtype=torch.bfloat16)  # type: ignore[assignment]
    loader.moved = lambda weight, place: moved(weight, torch.clone)  # out of the file, whose parts lie at odd addresses
    counted = Compilations()
    for name in only or list(CASES):
        config, method, table, options, plan = CASES[name]
        tiny.FAMILIES[name] = {**config, "num_hidden_layers": 3}
        (folder / name).mkdir()
        clip = None if options.get("training") == INT8 else 0.5
        NoGpu.launches = 0
        NoGpu.launched.clear()
        yield name, rehearse(tiny.make_job(folder / name, name, method, max_grad_norm=clip), table, options, plan, counted)


if __name__ == "__main__":
    print(json.dumps(dict(main(Path(sys.argv[1]), sys.argv[2:]))))
