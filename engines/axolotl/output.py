"""What Axolotl saved, as the harness wants it: a PEFT adapter or a checkpoint that names no path of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from harness.engine import Job
from harness.spec import Lora


def keep(saved: Path, job: Job) -> None:
    """Move the weights and their configuration from ``saved`` into ``job.out``. Raises RuntimeError when there are none."""
    pattern = "adapter_model*" if isinstance(job.workload.method, Lora) else "model*.safetensors*"
    found = sorted(saved.glob(pattern))
    if not found:
        raise RuntimeError(f"axolotl saved no {pattern}, only {', '.join(sorted(path.name for path in saved.iterdir()))}")
    for path in found:
        shutil.move(path, job.out / path.name)
    if isinstance(job.workload.method, Lora):
        config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
        _write(job.out / "adapter_config.json", {**config, "base_model_name_or_path": job.workload.model.name})
    else:
        _keep_checkpoint(job)


def _keep_checkpoint(job: Job) -> None:
    """In the stored type, with the base's configuration: the trainer gave it the special tokens of the tokenizer that only pads."""
    import torch
    from safetensors.torch import load_file, save_file

    stored = job.workload.model.dtype
    for path in job.out.glob("*.safetensors"):
        weights = {name: tensor.to(getattr(torch, stored)) for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    base = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    _write(job.out / "config.json", {**base, "dtype": stored})


def _write(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
