"""The model as Unsloth makes it of a job: loaded through its API, filled with the shared adapters, and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.native.hf_nf4 import computing_in
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.spec import Lora, QLora

if TYPE_CHECKING:
    from engines.unsloth import Knobs


def switches(job: Job, knobs: Knobs) -> dict[str, str]:
    """The environment variables by which Unsloth is told what its functions have no argument for."""
    found = {
        "UNSLOTH_COMPILE_LOCATION": str(job.out.parent / "unsloth_compiled_cache"),
        "UNSLOTH_BLOCK_COMPILE": "0" if knobs.block_compile == "off" else "1",
        "UNSLOTH_BLOCK_COMPILE_LEGACY": {"auto": "auto", "off": "0", "forced": "1"}[knobs.block_compile],
        "UNSLOTH_BLOCK_CUDAGRAPHS": "1" if knobs.cuda_graphs else "0",
    }
    return found if job.device == "cuda" else {**found, "UNSLOTH_FORCE_CPU": "1"}


def load(job: Job, knobs: Knobs) -> Any:
    """The model, ready to train. ``Any``: of a library that rewrites its classes as it goes."""
    import torch
    import unsloth  # before transformers and PEFT, which it patches

    if knobs.compute_dtype == "float32":  # TF32 would round products to 10 bits
        torch.set_float32_matmul_precision("highest")
    torch.manual_seed(job.workload.train.seed)
    fast, method = unsloth.FastLanguageModel, job.workload.method
    config = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    checkpointing = {"unsloth": "unsloth", "full": True, "none": False}[knobs.recompute]
    model, _ = fast.from_pretrained(
        str(folder(job, computing_in(config, knobs.compute_dtype))),
        max_seq_length=job.workload.data.sequence_length,
        load_in_4bit=isinstance(method, QLora),  # by default it is
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


def save(model: Any, job: Job) -> None:
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


def folder(job: Job, config: dict[str, Any]) -> Path:
    """The base beside a tokenizer of three tokens.

    Unsloth repairs the tokenizer it loads: it adds a padding token, grows the embedding, or blanks its row of it. Tokens come from the
    harness, so it gets one that needs no repair, whose padding token is not the one that the model names.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = job.out.parent / "unsloth_base"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for file in job.base.iterdir():
        if file.name == "model.safetensors.index.json" or file.suffix == ".safetensors":
            (made / file.name).symlink_to(file.resolve())
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    padding = 1 if config.get("pad_token_id") == 0 else 0
    words = Tokenizer(WordLevel({"<pad>": padding, "<unk>": 1 - padding, "<eos>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    tokenizer.save_pretrained(str(made))
    return made


def _precision(job: Job, knobs: Knobs) -> dict[str, Any]:
    """LoRA: the frozen base in the compute type. Full: weights in it, or masters in float32, which Unsloth makes of such on a GPU."""
    import torch

    compute, method = getattr(torch, knobs.compute_dtype), job.workload.method
    if isinstance(method, Lora):
        return {"dtype": compute}
    if job.device == "cpu":
        return {"dtype": getattr(torch, method.dtype), "full_finetuning": True}
    return {"dtype": compute, "full_finetuning": True, "float32_mixed_precision": method.dtype == "float32"}


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


def _write_config(name: str, source: Path, target: Path, **changed: str) -> None:
    config = {**json.loads((source / name).read_text(encoding="utf-8")), **changed}
    (target / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
