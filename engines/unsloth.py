"""Unsloth, the installed package in its own environment, driven through its own API in a plain training loop."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engines.native.lora_variants import variant_reasons
from harness.data.tokens import Batch, Sample, StepTokens, chunks, pack, pad
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, QLora, Spec, Workload

if TYPE_CHECKING:
    from torch import Tensor


loss_norm = "token_global"
requires = ("unsloth", "unsloth_zoo", "bitsandbytes")  # without the last, Unsloth does not load 16-bit weights either
TRIED = ("llama", "mistral", "qwen2", "qwen3")  # each compared with a plain loop in tests/engines/test_unsloth.py


class Knobs(Spec):
    """What an Unsloth user turns; conf/engine/unsloth.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    recompute: Literal["unsloth", "full", "none"]
    checkpoint_skip_layers: Positive | Literal["auto"] | None
    layout: Literal["packed", "padded"]
    block_compile: Literal["auto", "off", "forced"]
    cuda_graphs: bool
    compute_dtype: Literal["float32", "bfloat16"]


def variant(knobs: Knobs) -> str:
    """Named by what differs from what Unsloth's own trainer does by default on a GPU that it has not measured: offloaded
    checkpoints, batches without padding. ``nockpt+graphs`` is on padded batches: Unsloth compiles no others.
    """
    names = [{"unsloth": "default", "full": "ckpt", "none": "nockpt"}[knobs.recompute]]
    if knobs.checkpoint_skip_layers is not None:
        names.append(f"skip-{knobs.checkpoint_skip_layers}")
    if knobs.cuda_graphs:
        names.append("graphs")
    elif knobs.layout == "padded":
        names.append("padded")
    if knobs.block_compile != "auto":
        names.append({"off": "eager", "forced": "legacy"}[knobs.block_compile])
    return "+".join(names)


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    config = workload.model.config
    reasons = [*_knob_reasons(workload, knobs, machine), *(_model_reasons(config, workload) if config else [])]
    reasons += variant_reasons(workload, rank_stabilised=False, ratio=False)
    if isinstance(workload.method, QLora):
        reasons.append("this adapter does not load 4-bit bases through Unsloth yet; use method=lora, or engine=hf")
    if workload.method.dtype != "float32":
        reasons.append(f"Unsloth keeps what it trains in float32, method.dtype is {workload.method.dtype}; use method.dtype=float32")
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float | None:
    """Of the layers' forward pass, what the backward pass does again; how many layers ``auto`` keeps shows only when it runs."""
    if knobs.recompute == "none":
        return 0.0
    if knobs.checkpoint_skip_layers is None:
        return 1.0
    layers = (workload.model.config or {}).get("num_hidden_layers")
    if not isinstance(layers, int) or not isinstance(knobs.checkpoint_skip_layers, int):
        return None
    return max(0.0, 1.0 - knobs.checkpoint_skip_layers / layers)


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train with AdamW on every trained tensor, and save into ``job.out``. Unsloth patches this process for good."""
    if job.processes != 1:
        raise UnsupportedError(f"engine.processes is {job.processes}; unsloth trains in one process here, use engine.processes=1")
    schedule = job.workload.train
    os.environ.update(_switches(job, knobs))  # Unsloth reads them when it is imported
    model = _load(job, knobs)
    from engines.native import plain_loop

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = plain_loop.adamw(parameters, schedule, job.device)
    lay_out: Callable[[Sequence[Sample]], Batch] = pack if knobs.layout == "packed" else pad
    probe.ready()
    for index in range(schedule.num_steps):
        batches = [lay_out(samples) for samples in chunks(job.tokens.step(schedule, index), knobs.micro_batch)]
        tokens = StepTokens.of(batches)
        loss = _accumulate(model, batches, tokens.loss, knobs, job.device)
        grad_norm = plain_loop.update(optimizer, parameters, schedule, index)
        probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)
    _save(model, job)


def _knob_reasons(workload: Workload, knobs: Knobs, machine: Machine) -> list[str]:
    reasons = []
    compiles = knobs.cuda_graphs or knobs.block_compile != "auto"
    if compiles and machine.device == "cpu":
        reasons.append("Unsloth compiles blocks on a GPU only; use cuda_graphs=false and block_compile=auto")
    elif compiles and knobs.layout == "packed":
        reasons.append("Unsloth compiles no packed batches; use layout=padded, or cuda_graphs=false and block_compile=auto")
    if knobs.cuda_graphs and knobs.block_compile == "off":
        reasons.append("cuda_graphs=true captures compiled blocks; use block_compile=auto")
    if knobs.checkpoint_skip_layers is not None and knobs.recompute == "none":
        reasons.append("checkpoint_skip_layers says which layers recompute=unsloth|full leaves out; with recompute=none use null")
    if knobs.checkpoint_skip_layers is not None and machine.device == "cpu":
        reasons.append("checkpoint_skip_layers is for a GPU; use null")
    if knobs.layout == "packed" and not isinstance(workload.method, Lora):
        reasons.append(
            "method=full runs transformers' layers, whose documents Unsloth keeps apart in its own trainer only; use layout=padded"
        )
    return reasons


def _model_reasons(config: dict[str, Any], workload: Workload) -> list[str]:
    """A workload has no dropout and the rotary embedding of its config: Unsloth stretches it for longer samples than that allows."""
    names = [name for name, value in config.items() if name.endswith(("dropout", "pdrop")) and value]
    reasons = [f"the model's {name} is {config[name]}, training here has no dropout; set it to 0" for name in names]
    kind = config.get("model_type")
    if kind not in TRIED:
        reasons.append(f"model_type={kind} is not one that this adapter has been compared with hf on ({', '.join(TRIED)}); use engine=hf")
    length, most = workload.data.sequence_length, config.get("max_position_embeddings")
    if isinstance(most, int) and length > most:
        reasons.append(
            f"samples of {length} tokens make Unsloth rescale the positions of a model made for {most}; shorten data.sequence_length"
        )
    return reasons


def _switches(job: Job, knobs: Knobs) -> dict[str, str]:
    """The environment variables by which Unsloth is told what its functions have no argument for."""
    switches = {
        "UNSLOTH_COMPILE_LOCATION": str(job.out.parent / "unsloth_compiled_cache"),
        "UNSLOTH_BLOCK_COMPILE": "0" if knobs.block_compile == "off" else "1",
        "UNSLOTH_BLOCK_COMPILE_LEGACY": {"auto": "auto", "off": "0", "forced": "1"}[knobs.block_compile],
        "UNSLOTH_BLOCK_CUDAGRAPHS": "1" if knobs.cuda_graphs else "0",
    }
    return switches if job.device == "cuda" else {**switches, "UNSLOTH_FORCE_CPU": "1"}


def _load(job: Job, knobs: Knobs) -> Any:
    """The model, ready to train. ``Any``: of a library that rewrites its classes as it goes."""
    config: dict[str, Any] = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    if reasons := _model_reasons(config, job.workload):
        raise UnsupportedError("; ".join(reasons))
    import torch
    import unsloth  # before transformers and PEFT, which it patches

    if knobs.compute_dtype == "float32":  # TF32 would round products to 10 bits
        torch.set_float32_matmul_precision("highest")
    torch.manual_seed(job.workload.train.seed)
    fast, method = unsloth.FastLanguageModel, job.workload.method
    checkpointing = {"unsloth": "unsloth", "full": True, "none": False}[knobs.recompute]
    model, _ = fast.from_pretrained(
        str(_folder(job, config)),
        max_seq_length=job.workload.data.sequence_length,
        load_in_4bit=False,  # by default it is
        use_exact_model_name=True,
        local_files_only=True,
        use_gradient_checkpointing=checkpointing,
        random_state=job.workload.train.seed,
        **_precision(job, knobs),
    )
    if isinstance(method, Lora):
        model = _with_adapter(fast, model, job, method, checkpointing, knobs)
    fast.for_training(model, use_gradient_checkpointing=checkpointing)
    return model


def _precision(job: Job, knobs: Knobs) -> dict[str, Any]:
    """LoRA: the frozen base in the compute type. Full: masters in float32, which on a GPU Unsloth makes of a model in the compute type."""
    import torch

    compute = getattr(torch, knobs.compute_dtype)
    if isinstance(job.workload.method, Lora):
        return {"dtype": compute}
    if job.device == "cpu":
        return {"dtype": torch.float32, "full_finetuning": True}
    return {"dtype": compute, "full_finetuning": True, "float32_mixed_precision": True}


def _folder(job: Job, config: dict[str, Any]) -> Path:
    """The base beside a tokenizer of three tokens.

    Unsloth repairs the tokenizer it loads: it adds a padding token, grows the embedding, or blanks its row of it. Tokens come from the
    harness, so it gets one that needs no repair, whose padding token is not the one that the model names.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = job.out.parent / "unsloth_base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in job.base.iterdir():
        if file.name in ("config.json", "model.safetensors.index.json") or file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
    padding = 1 if config.get("pad_token_id") == 0 else 0
    words = Tokenizer(WordLevel({"<pad>": padding, "<unk>": 1 - padding, "<eos>": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    made.save_pretrained(str(folder))
    return folder


def _with_adapter(fast: Any, model: Any, job: Job, method: Lora, checkpointing: Any, knobs: Knobs) -> Any:
    """Unsloth's own adapters, filled with the shared initial ones."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    assert job.adapter_init is not None
    skip = {} if knobs.checkpoint_skip_layers is None else {"checkpoint_skip_layers": knobs.checkpoint_skip_layers}
    model = fast.get_peft_model(
        model,
        r=method.rank,
        lora_alpha=int(method.alpha) if method.alpha.is_integer() else method.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(method.targets),
        use_gradient_checkpointing=checkpointing,
        random_state=job.workload.train.seed,
        **skip,
    )
    initial = load_file(job.adapter_init / "adapter_model.safetensors")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = set_peft_model_state_dict(model, initial)
    if len(initial) != len(trained) or result.unexpected_keys:
        raise UnsupportedError(f"Unsloth made {len(trained)} adapter tensors, the initial adapter has {len(initial)}; see method.targets")
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return model


def _accumulate(model: Any, batches: Sequence[Batch], num_labels: int, knobs: Knobs, device: str) -> Tensor:
    """Add the step's gradients, micro-batch by micro-batch; returns the loss, a mean over the step's supervised tokens.

    Padded batches have no mask: Unsloth itself drops it in training, padding stands on the right.
    """
    import torch

    from engines.native.plain_loop import to_device

    total = torch.zeros((), device=device)
    for batch in batches:
        documents = _documents(batch, device) if knobs.layout == "packed" else {}
        with torch.autocast(device, dtype=torch.bfloat16, enabled=knobs.compute_dtype == "bfloat16"):
            output = model(
                input_ids=to_device(batch.input_ids, device),
                labels=to_device(batch.labels, device),
                num_items_in_batch=num_labels,
                use_cache=False,
                **documents,
            )
        output.loss.backward()
        total += output.loss.detach()
    return total


def _documents(batch: Batch, device: str) -> dict[str, Tensor]:
    """Where the documents of a packed row begin and end. The lengths stay on the host: from there Unsloth needs no synchronisation."""
    import torch

    from engines.native.plain_loop import to_device

    lengths = [length for row in batch.lengths for length in row]
    return {"position_ids": to_device(batch.position_ids, device), "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}


def _save(model: Any, job: Job) -> None:
    """The trained tensors; the configuration beside them is the one that the initial ones came with, whatever Unsloth made of its own."""
    import torch

    if not isinstance(job.workload.method, Lora):
        model.to(getattr(torch, job.workload.model.dtype)).save_pretrained(str(job.out))
        _write_config("config.json", job.base, job.out, dtype=job.workload.model.dtype)
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    assert job.adapter_init is not None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, job.out / "adapter_model.safetensors")
    _write_config("adapter_config.json", job.adapter_init, job.out, base_model_name_or_path=job.workload.model.name)


def _write_config(name: str, source: Path, target: Path, **changed: str) -> None:
    config = {**json.loads((source / name).read_text(encoding="utf-8")), **changed}
    (target / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
