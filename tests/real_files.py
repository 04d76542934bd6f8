"""The shipped configurations as workloads, and the requests that prepare and score read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness.places import PrepareRequest, Sources
from harness.spec import Model, Workload, parse

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "harness" / "data" / "tokenizers" / "tiny"
SAMPLE = ROOT / "harness" / "data" / "samples" / "python_docs.jsonl"


def conf(group: str, name: str, /, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
    if group == "train":
        assert raw.pop("epochs") is None  # a way to say steps, and no part of a workload
    return {**raw, **changes}


def model(name: str = "tiny_llama", /, **changes: Any) -> Model:
    return parse(Model, conf("model", name, **changes))


def workload(*, data: dict[str, Any] | None = None, method: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Workload:
    raw = {
        "model": conf("model", "tiny_llama", **changes),
        "data": data or conf("data", "python_docs"),
        "method": method or conf("method", "lora", rank=4, alpha=8),
        "train": conf("train", "short", seed=seed),
    }
    return parse(Workload, raw)


def request(work: Workload, cache: Path, out: Path, **sources: Any) -> PrepareRequest:
    return PrepareRequest(workload=work, sources=Sources(**sources), cache=str(cache), out=str(out))
