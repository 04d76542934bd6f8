"""``python -m engines.native.bench``: time whole optimizer steps of a decoder with random weights, and where the time goes, on one GPU."""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engines.native.checkpoint import Placement, build_weights
from engines.native.decoder import Decoder
from engines.native.fused_ops import FUSED
from engines.native.kernels.adamw import FlatAdamW
from engines.native.layer import KEEP_ALL
from engines.native.lora import Adapter
from engines.native.optimizer import step_scalars
from engines.native.packed import Angles
from engines.native.planner import Load, MemoryModel, plans_within
from engines.native.shape import LlamaShape, read_shape
from engines.native.steps import ReplayedSteps, Steps
from engines.native.weights import DecoderWeights, trained_weights
from harness.data.tokens import IGNORE, Batch
from harness.spec import Train

CONF = Path(__file__).parents[2] / "conf" / "model"
RANK = 16
SCHEDULE = Train(
    steps=1000, samples_per_step=1, learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.01, beta1=0.9, beta2=0.999,
    epsilon=1e-8, max_grad_norm=1.0, seed=0,
)  # fmt: skip
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# First match wins; the rest of the names are our own kernels.
_CATEGORIES = (
    ("attention", r"cudnn|flash|fmha"),
    ("products", r"nvjet|gemm|cutlass|splitK|cublas|sm90_xmma"),
    ("torch", r"at::|elementwise|Memcpy|Memset|reduce_kernel|index"),
)


@dataclass(frozen=True, slots=True)
class RandomFile:
    """Stands for an open safetensors file: every tensor drawn on the device when it is asked for."""

    sizes: dict[str, tuple[int, ...]]
    device: str = "cuda"

    def get_tensor(self, name: str) -> torch.Tensor:
        """Normal values, standard deviation 0.02; ones for norms."""
        size = self.sizes[name]
        return torch.ones(size, device=self.device) if len(size) == 1 else 0.02 * torch.randn(size, device=self.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each combination of model and batch, and its breakdown."""
    parser = argparse.ArgumentParser(prog="python -m engines.native.bench", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["llama3_1b"], help="names of conf/model")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--batch", nargs="+", default=["4x2048"], help="documents x tokens of each")
    parser.add_argument("--memory-gib", type=float, nargs="+", default=[None], help="budgets; without one everything is kept")
    parser.add_argument("--chunk", type=int, default=2048, help="rows of logits at one time")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="launch every step instead of replaying a graph")
    parser.add_argument("--breakdown", action="store_true")
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name in options.model:
        shape = model_shape(name, options.layers)
        weights = random_weights(shape, Placement(torch.device("cuda"), torch.bfloat16, torch.float32, 64))
        decoder = Decoder(shape=shape, weights=weights, ops=FUSED, plans=(KEEP_ALL,) * shape.num_layers, loss_chunk=options.chunk)
        for batch in options.batch:
            documents, tokens = (int(part) for part in batch.split("x"))
            for budget in options.memory_gib:
                _time(name, decoder, (documents, tokens), budget, options)
        del decoder
        torch.cuda.empty_cache()


def model_shape(name: str, num_layers: int | None) -> LlamaShape:
    """The shape of conf/model/``name``.yaml, perhaps cut to fewer layers."""
    config: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())["config"]
    shape = read_shape(config, 1)
    return shape if num_layers is None else replace(shape, num_layers=num_layers)


def random_weights(shape: LlamaShape, placement: Placement) -> DecoderWeights:
    """A decoder's weights with LoRA of rank 16 on all seven linears."""
    sizes = dict(_sizes(shape))
    adapters: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        if any(linear in name for linear in _LINEARS) and len(size) == 2:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapters[f"{stem}.lora_A.weight"] = 0.02 * torch.randn(RANK, size[1])
            adapters[f"{stem}.lora_B.weight"] = 0.02 * torch.randn(size[0], RANK)
    adapter = Adapter({}, adapters, RANK, 2.0)
    file = RandomFile(sizes, placement.device.type)
    return build_weights(dict.fromkeys(sizes, file), shape, placement, adapter)


def _sizes(shape: LlamaShape) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner, queries, keys = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_size
    sizes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (shape.vocab_size, hidden)), ("model.norm.weight", (hidden,))]
    if not shape.tied_head:
        sizes.append(("lm_head.weight", (shape.vocab_size, hidden)))
    for index in range(shape.num_layers):
        prefix = f"model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden), ("self_attn.k_proj", keys, hidden), ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            sizes.append((f"{prefix}.{name}.weight", (rows, columns)))
            bias = {"q": shape.qkv_bias, "k": shape.qkv_bias, "v": shape.qkv_bias, "o": shape.output_bias}
            if bias.get(name.split(".")[1][0], shape.mlp_bias):
                sizes.append((f"{prefix}.{name}.bias", (rows,)))
        sizes += [(f"{prefix}.{name}.weight", (hidden,)) for name in ("input_layernorm", "post_attention_layernorm")]
        if shape.qk_norm:
            sizes += [(f"{prefix}.self_attn.{name}.weight", (shape.head_dim,)) for name in ("q_norm", "k_norm")]
    return sizes


def _time(name: str, decoder: Decoder, size: tuple[int, int], budget: float | None, options: argparse.Namespace) -> None:
    documents, tokens = size
    model = MemoryModel.of(decoder.shape, decoder.weights, Load(documents * tokens, tokens, documents * (tokens - 1), options.chunk))
    if budget is not None:
        decoder = replace(decoder, plans=plans_within(model, budget * 2**30))
    arena = decoder.weights.arena
    values = [weight.value for weight in trained_weights(decoder.weights)]
    optimizer = FlatAdamW(arena.masters, values, (0.9, 0.999), 1e-8, 0.01)
    angles = Angles.of(decoder.shape, tokens, torch.device("cuda"))
    plain = Steps(decoder, angles, optimizer, 1.0)
    steps = plain if options.eager else ReplayedSteps(plain)
    ids = np.random.default_rng(0).integers(0, decoder.shape.vocab_size, size=(1, documents * tokens))
    labels = ids.copy()
    labels[0, ::tokens] = IGNORE
    batches = [Batch(ids, labels, ((tokens,) * documents,))]
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    losses = []

    def step(index: int) -> None:
        losses.append(steps.run(batches, step_scalars(SCHEDULE, index, documents * (tokens - 1))).outcome.loss.clone())

    step(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    step(1)
    torch.cuda.synchronize()
    second = time.perf_counter() - begin - first
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(options.steps + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for index in range(options.steps):
        step(index + 2)
        events[index + 1].record()
    torch.cuda.synchronize()
    milliseconds = statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(events))
    count = documents * tokens
    print(
        f"{name} layers {decoder.shape.num_layers} {documents}x{tokens} {_kept(decoder)}: {milliseconds:.2f} ms, "
        f"{count / milliseconds * 1000:,.0f} tokens/s, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated "
        f"({model.peak(decoder.plans) / 2**30:.2f} predicted), "
        f"first step {first:.1f} s, second {second:.1f} s, losses {losses[0]:.4f} {losses[1]:.4f} {losses[-1]:.4f}",
        flush=True,
    )
    if options.breakdown:
        _breakdown(lambda: step(100))


def _kept(decoder: Decoder) -> str:
    """How many layers make which tensors again."""
    dropped = {name: sum(name not in plan for plan in decoder.plans) for name in ("gate_up", "heads", "attended", "middle")}
    return "again " + ", ".join(f"{name} x{count}" for name, count in dropped.items() if count) if any(dropped.values()) else "all kept"


def _breakdown(step: Any) -> None:
    """Kernel time of one step by category and the twenty longest kernels, in ms."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type.name == "CUDA":
            kernels[event.name].append(event.device_time / 1000)
    totals: dict[str, float] = defaultdict(float)
    for kernel, times in kernels.items():
        totals[_category(kernel)] += sum(times)
    print(f"  kernels: {sum(totals.values()):.2f} ms in {sum(map(len, kernels.values()))} launches;", end=" ")
    print(", ".join(f"{name} {total:.2f}" for name, total in sorted(totals.items(), key=lambda item: -item[1])))
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:20]:
        print(f"    {sum(times):8.3f} ms {len(times):5d} x {statistics.median(times) * 1000:7.1f} us  {kernel[:110]}", flush=True)


def _category(kernel: str) -> str:
    for category, pattern in _CATEGORIES:
        if re.search(pattern, kernel):
            return category
    return kernel.removeprefix("_")


if __name__ == "__main__":
    main()
