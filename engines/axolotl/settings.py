"""A job as Axolotl's YAML, with the rows and the tokenizer that it names, in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.native.hf_nf4 import computing_in
from harness.data.tokens import Sample, chunks
from harness.engine import Job
from harness.spec import Lora, QLora, Train

if TYPE_CHECKING:
    from engines.axolotl import Knobs

PLUGIN = "engines.axolotl.plugin.Reporting"


def settings(job: Job, knobs: Knobs, folder: Path) -> dict[str, Any]:
    """Every key whose default could change the function or the data, set; what is left out is Axolotl's own choice of how.

    ``folder`` receives the rows, the tokenizer, its caches, and (in ``out``) what Axolotl saves.
    """
    return {
        "base_model": str(_base(job, knobs, folder / "base")),
        "tokenizer_config": str(_write_tokenizer(folder / "tokenizer")),
        "output_dir": str(folder / "out"),
        "plugins": [PLUGIN, *(["axolotl.integrations.liger.LigerPlugin"] if knobs.liger else [])],
        "strict": False,
        "use_wandb": False,
        **_data(job, knobs, folder),
        **_method(job),
        **_schedule(job.workload.train, job, knobs),
        **_compute(job, knobs),
        **_distributed(knobs, folder),
    }


def not_taken(values: dict[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Keys of ``values`` that Axolotl's ``config``, made of them, lacks or holds otherwise: it is silent about both. Sections that it
    rewrites are not compared.
    """
    plain = {key: value for key, value in values.items() if key not in ("datasets", "fsdp_config", "deepspeed") and value is not None}
    return [f"{key}={value!r} became {config.get(key)!r}" for key, value in plain.items() if config.get(key) != value]


def write_settings(folder: Path, values: dict[str, Any]) -> Path:
    """The YAML file; JSON is YAML."""
    path = folder / "axolotl.yml"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def _base(job: Job, knobs: Knobs, folder: Path) -> Path:
    """The base, or one in NF4 beside a configuration that has bitsandbytes compute in the type of the others."""
    config: dict[str, Any] = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    if not isinstance(job.workload.method, QLora):
        return job.base
    folder.mkdir()
    for file in job.base.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").write_text(json.dumps(computing_in(config, knobs.compute_dtype)), encoding="utf-8")
    return folder


def _data(job: Job, knobs: Knobs, folder: Path) -> dict[str, Any]:
    """The token file's samples in the order of the steps, as rows that need no preparation (which would drop those without a label).

    Packed, a row is one micro-batch: which samples a step has is given, so Axolotl packs within groups of ``micro_batch`` of them, and
    a row has room for the longest group.
    """
    rows = folder / "tokens.jsonl"
    longest, room = 0, 0
    with rows.open("w", encoding="utf-8") as file:
        for group in chunks(list(_samples(job)), knobs.micro_batch):
            file.writelines(_row(sample, packed=knobs.layout == "packed") for sample in group)
            lengths = [len(sample) for sample in group]
            longest, room = max(longest, *lengths), max(room, sum(lengths))
    values: dict[str, Any] = {
        "datasets": [{"path": str(rows), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "skip_prepare_dataset": True,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in the order of the file
        "val_set_size": 0,
        "pad_to_sequence_len": False,  # null would pad to multiples of 64
    }
    if knobs.layout == "padded":
        return {**values, "sequence_len": longest, "sample_packing": False}
    groups = {"sample_packing_group_size": knobs.micro_batch, "sample_packing_bin_size": knobs.micro_batch}
    return {**values, **groups, "sequence_len": room, "sample_packing": True, "eval_sample_packing": False}


def _samples(job: Job) -> Iterator[Sample]:
    schedule = job.workload.train
    return (sample for index in range(schedule.num_steps) for sample in job.tokens.step(schedule, index))


def _row(sample: Sample, *, packed: bool) -> str:
    ids, labels = (np.asarray(values).tolist() for values in (sample.input_ids, sample.labels))
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    if packed:
        row |= {"position_ids": list(range(len(ids))), "length": len(ids)}  # what its preparation adds for packing
    return json.dumps(row) + "\n"


def _write_tokenizer(folder: Path) -> Path:
    """All that Axolotl's tokenizer does here is pad, to the right, with 0; one with more entries than the model would resize it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<pad>", padding_side="right").save_pretrained(folder)
    return folder


def _method(job: Job) -> dict[str, Any]:
    method = job.workload.method
    if not isinstance(method, Lora):
        return {}
    quantised = {"load_in_4bit": True} if isinstance(method, QLora) else {}
    return {
        "adapter": method.name,
        **quantised,
        "lora_model_dir": str(job.adapter_init),  # its own start is not seeded
        "lora_r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(method.targets),
    }


def _schedule(train: Train, job: Job, knobs: Knobs) -> dict[str, Any]:
    """The rates come from the plugin: here a warm-up of 1 step becomes 2, and no schedule is ours to the last bit."""
    per_step = train.samples_per_step // (knobs.micro_batch * job.processes)
    return {
        "micro_batch_size": 1 if knobs.layout == "packed" else knobs.micro_batch,
        "gradient_accumulation_steps": per_step,
        "num_epochs": 1,
        "max_steps": train.num_steps,
        "optimizer": "adamw_torch_fused" if job.device == "cuda" else "adamw_torch",
        "learning_rate": train.learning_rate,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.beta1,
        "adam_beta2": train.beta2,
        "adam_epsilon": train.epsilon,
        "max_grad_norm": train.max_grad_norm or 0.0,
        "seed": train.seed,
        "save_strategy": "no",
        "logging_steps": train.num_steps,  # reading its loss would wait for the GPU; the probe has it without
        "include_tkps": False,  # waits for the GPU at every micro-batch
    }


def _compute(job: Job, knobs: Knobs) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bf16": knobs.compute_dtype == "bfloat16",
        "fp16": False,
        "tf32": False,
        "attn_implementation": knobs.attention,
        "gradient_checkpointing": knobs.recompute == "full",
        **{f"liger_{name}": True for name in knobs.liger},
    }
    chosen = knobs.lora_kernels
    if chosen is None and job.device == "cpu":
        chosen = ()  # left to itself it would turn them on, and they need a GPU
    if chosen is not None:
        values |= {f"lora_{name}_kernel": name in chosen for name in ("mlp", "qkv", "o")} | {"lora_embedding_kernel": False}
    return values


def _distributed(knobs: Knobs, folder: Path) -> dict[str, Any]:
    if knobs.distributed == "fsdp2":
        fsdp = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
            "offload_params": False,
        }
        return {"fsdp_version": 2, "fsdp_config": fsdp}
    if knobs.distributed.startswith("zero"):
        return {"deepspeed": str(_write_deepspeed(folder / "deepspeed.json", int(knobs.distributed[-1]), knobs))}
    return {}


def _write_deepspeed(path: Path, stage: int, knobs: Knobs) -> Path:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero |= {f"stage3_{name}": "auto" for name in ("prefetch_bucket_size", "param_persistence_threshold")}
        zero |= {"reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    auto = dict.fromkeys(sizes, "auto")
    values = {"zero_optimization": zero, "bf16": {"enabled": knobs.compute_dtype == "bfloat16"}, **auto}
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path
