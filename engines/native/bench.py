"""``python -m engines.native.bench``: time whole optimizer steps of a decoder with random weights, and where the time goes, on one GPU."""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml

from engines.native.buckets import Row
from engines.native.checkpoint import build_weights
from engines.native.decoder import Decoder
from engines.native.footprint import Load, MemoryModel
from engines.native.fp8 import RANK_MULTIPLE
from engines.native.fp8_ops import FUSED_FP8
from engines.native.fp8_reasons import Mode
from engines.native.full import full_optimizer
from engines.native.full_ops import FUSED_FULL
from engines.native.fused_ops import FILLING, FUSED
from engines.native.host import Host, usable_bytes
from engines.native.kernels.adamw import FlatAdamW
from engines.native.loader import Placement
from engines.native.lora import Adapter
from engines.native.optimizer import Optimizer, step_scalars
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL, described
from engines.native.planner import choose
from engines.native.random_files import RandomFile, RandomNf4File
from engines.native.replay import ReplayedSteps
from engines.native.shape import LlamaShape, read_shape
from engines.native.steps import Steps
from engines.native.store import Store, Training
from engines.native.weights import DecoderWeights, trained_weights
from harness.data.tokens import IGNORE, Batch
from harness.errors import UnsupportedError
from harness.nf4 import PARTS, STATE
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
    ("bus, beside the others", r"Memcpy (DtoH|HtoD)"),
    ("attention", r"cudnn|flash|fmha"),
    ("products", r"nvjet|gemm|cutlass|splitK|cublas|sm90_xmma"),
    ("torch", r"at::|elementwise|Memcpy|Memset|reduce_kernel|index"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each combination of model and batch, and its breakdown."""
    parser = argparse.ArgumentParser(prog="python -m engines.native.bench", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["llama3_1b"], help="names of conf/model")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--batch", nargs="+", default=["4x2048"], help="documents x tokens of each; 64x80-354: between so many")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of each document, its end, that is supervised")
    parser.add_argument("--memory-gib", type=float, nargs="+", default=[None], help="budgets; without one everything is kept")
    parser.add_argument("--no-offload", action="store_true", help="keep or make again, send nothing to the host")
    parser.add_argument("--nf4", action="store_true", help="linear layers in NF4, as method=qlora has them")
    parser.add_argument("--fp8", choices=get_args(Mode), help="linear layers in e4m3 for these products, as method=lora_fp8 has them")
    parser.add_argument("--full", choices=["fp32", "int8"], help="train every weight, with these moments, updated inside backward")
    parser.add_argument("--clip", action="store_true", help="of --full: hold all gradients and clip them")
    parser.add_argument("--chunk", type=int, default=2048, help="rows of logits at one time, fewer where a budget asks for it")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="launch every step instead of replaying a graph")
    parser.add_argument("--breakdown", action="store_true")
    options = parser.parse_args(arguments)
    try:
        rows = {batch: lengths_of(batch) for batch in options.batch}
    except ValueError as error:
        parser.error(str(error))
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name in options.model:
        shape = model_shape(name, options.layers)
        training = None if options.full is None else Training(options.full, in_backward=not options.clip)
        decoder = random_decoder(shape, options.chunk, nf4=options.nf4, fp8=options.fp8, training=training)
        for batch, lengths in rows.items():
            row = random_row(shape, lengths, options.supervised)
            for budget in options.memory_gib:
                _time(f"{name} layers {shape.num_layers} {batch}", decoder, row, budget, options)
        del decoder
        torch.cuda.empty_cache()


def model_shape(name: str, num_layers: int | None) -> LlamaShape:
    """The shape of conf/model/``name``.yaml, perhaps cut to fewer layers."""
    config: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())["config"]
    shape = read_shape(config, 1)
    return shape if num_layers is None else replace(shape, num_layers=num_layers)


def random_decoder(
    shape: LlamaShape, loss_chunk: int, *, nf4: bool = False, fp8: Mode | None = None, training: Training | None = None
) -> Decoder:
    """A decoder on the GPU that keeps everything; ``training``: of all weights instead of LoRA."""
    multiple = RANK_MULTIPLE if fp8 else 64
    place = Placement(torch.device("cuda"), torch.bfloat16, torch.float32, multiple, FILLING, fp8, training or Training())
    if training is None:
        weights = random_weights(shape, place, nf4=nf4)
    else:
        sizes = dict(tensor_sizes(shape))
        weights = build_weights(dict.fromkeys(sizes, RandomFile(sizes)), shape, place, None)
    ops = FUSED_FULL if training is not None else FUSED_FP8 if fp8 else FUSED
    return Decoder(shape=shape, weights=weights, ops=ops, plans=(KEEP_ALL,) * shape.num_layers, loss_chunk=loss_chunk)


def random_weights(shape: LlamaShape, placement: Placement, *, nf4: bool = False) -> DecoderWeights:
    """A decoder's weights with LoRA of rank 16 on all seven linears, which may be in NF4."""
    sizes = dict(tensor_sizes(shape))
    names = adapter_sizes(sizes)
    adapters = {name: 0.02 * torch.randn(size) for name, size in names.items()}
    file = RandomFile(sizes, placement.device.type)
    files: dict[str, RandomFile | RandomNf4File] = dict.fromkeys(sizes, file)
    if nf4:
        linears = [name for name in sizes if f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" in names]
        files |= dict.fromkeys((f"{name}{part}" for name in linears for part in ("", *PARTS, STATE)), RandomNf4File(file))
    return build_weights(files, shape, placement, Adapter({}, adapters, RANK, 2.0))


def adapter_sizes(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The name and size of every adapter tensor beside the checkpoint tensors ``sizes``."""
    adapters: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        if any(linear in name for linear in _LINEARS) and len(size) == 2:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapters[f"{stem}.lora_A.weight"] = (RANK, size[1])
            adapters[f"{stem}.lora_B.weight"] = (size[0], RANK)
    return adapters


def tensor_sizes(shape: LlamaShape) -> list[tuple[str, tuple[int, ...]]]:
    """The name and size of every tensor of a checkpoint."""
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


def random_load(documents: int, tokens: int, loss_chunk: int) -> Load:
    """So many documents of so many tokens, all of them supervised."""
    return Load(documents * tokens, tokens, documents * (tokens - 1), loss_chunk)


def lengths_of(batch: str) -> tuple[int, ...]:
    """Tokens of each document of ``batch``: 4x2048, or 64x80-354 (drawn evenly from 80 to 354, always the same).

    Raises ValueError where it is neither.
    """
    found = re.fullmatch(r"(\d+)x(\d+)(?:-(\d+))?", batch)
    if found is None:
        raise ValueError(f"--batch {batch}: expected documents x tokens, such as 4x2048 or 64x80-354")
    documents, least, most = int(found[1]), int(found[2]), int(found[3] or found[2])
    return tuple(np.random.default_rng(0).integers(least, most + 1, size=documents).tolist())


def random_row(shape: LlamaShape, lengths: Sequence[int], supervised: float = 1.0) -> Batch:
    """One packed row of documents of these ``lengths``, always the same tokens; the last of each are ``supervised``, never its first."""
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, size=(1, sum(lengths)))
    masked = [np.arange(length) < max(1, round(length * (1 - supervised))) for length in lengths]
    return Batch(ids, np.where(np.concatenate(masked)[None], IGNORE, ids), (tuple(lengths),))


def random_steps(decoder: Decoder, documents: int, tokens: int, *, replay: bool) -> Callable[[int], torch.Tensor]:
    """``steps_over`` so many documents of so many tokens, all of them supervised."""
    return steps_over(decoder, random_row(decoder.shape, (tokens,) * documents), replay=replay)


def steps_over(decoder: Decoder, batch: Batch, *, replay: bool) -> Callable[[int], torch.Tensor]:
    """An optimizer step over ``batch`` (one packed row), by its index; it returns a copy of the loss."""
    arena = decoder.weights.arena
    max_norm = None if isinstance(arena, Store) and arena.training.in_backward else 1.0
    plain = Steps(decoder, Angles.of(decoder.shape, max(batch.lengths[0]), torch.device("cuda")), _optimizer(decoder), max_norm)
    steps = ReplayedSteps(plain) if replay else plain
    rows, supervised = [Row(batch)], batch.num_labels

    def step(index: int) -> torch.Tensor:
        return steps.run(rows, step_scalars(SCHEDULE, index, supervised)).loss.clone()

    return step


def _optimizer(decoder: Decoder) -> Optimizer:
    arena = decoder.weights.arena
    if isinstance(arena, Store):
        return full_optimizer(arena, SCHEDULE, kernels=True)
    values = [weight.value for weight in trained_weights(decoder.weights)]
    return FlatAdamW(arena.masters, values, (0.9, 0.999), 1e-8, 0.01)


def _time(name: str, decoder: Decoder, batch: Batch, budget: float | None, options: argparse.Namespace) -> None:
    lengths, supervised = batch.lengths[0], batch.num_labels
    model = MemoryModel.of(decoder.shape, decoder.weights, Load(sum(lengths), max(lengths), supervised, options.chunk))
    if budget is not None:
        try:
            choice = choose(model, budget * 2**30, 0.0 if options.no_offload else usable_bytes())
        except UnsupportedError as error:  # the next budget may do
            print(f"{name}: {error}", flush=True)
            return
        decoder = replace(decoder, plans=choice.plans, loss_chunk=choice.loss_chunk, host=Host())
    run = steps_over(decoder, batch, replay=not options.eager)
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    losses = []

    def step(index: int) -> None:
        losses.append(run(index))

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
    print(
        f"{name} {_kept(decoder)}: {milliseconds:.2f} ms, "
        f"{sum(lengths) / milliseconds * 1000:,.0f} tokens/s, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated "
        f"({model.peak(decoder.plans, decoder.loss_chunk) / 2**30:.2f} predicted), "
        f"first step {first:.1f} s, second {second:.1f} s, losses {losses[0]:.4f} {losses[1]:.4f} {losses[-1]:.4f}",
        flush=True,
    )
    if options.breakdown:
        _breakdown(lambda: step(100))


def _kept(decoder: Decoder) -> str:
    """The plans in words, pinned memory and rows of logits."""
    pinned = f"; {decoder.host.num_bytes / 2**30:.2f} GiB pinned" if decoder.host.num_bytes else ""
    return f"{described(decoder.plans)}{pinned}; {decoder.loss_chunk} rows of logits"


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
