"""``python -m tests.engines.rehearsed_gpu FOLDER``: train tiny models on a GPU; print what was compiled before and in steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import engines.fused
from harness.compiles import CompileCounter
from harness.engine import Chosen
from harness.spec import parse
from tests.engines import tiny

KNOBS: dict[str, Any] = {
    "micro_batch": 5, "recompute": "fit", "memory_gib": None, "offload": True, "compute_dtype": "bfloat16", "operations": "fused",
    "replay": True, "loss_chunk": 16, "fp8": "forward", "optimizer_state": "fp32", "base": "replicated", "compile_ahead": True,
    "products": "torch",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama_biases", tiny.LORA, {}),
    "recompute": ("qwen3", tiny.LORA, {"recompute": "full"}),
    "qlora": ("llama", tiny.QLORA, {}),
    "full": ("llama", tiny.FULL, {}),
    "full_int8": ("qwen3", tiny.FULL, {"optimizer_state": "int8"}),
}


@dataclass
class CountingProbe(tiny.RecordingProbe):
    """Kernels that were compiled since set-up was over."""

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        super().ready(chosen)
        self.compiles = CompileCounter()
        self.before = self.compiles.count


def main(folder: Path) -> dict[str, tuple[Chosen, int]]:
    found = {}
    for name, (family, method, knobs) in CASES.items():
        (folder / name).mkdir()
        job = replace(tiny.make_job(folder / name, family, method), device="cuda")
        probe = CountingProbe()
        engines.fused.train(job, parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
        torch.cuda.synchronize()
        found[name] = probe.chosen["kernels_compiled_ahead"], probe.compiles.count - probe.before
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
