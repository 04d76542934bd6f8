"""The initial adapter that all engines start from: a PEFT folder with seeded A and zero B, made once per model, method and seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import ConfigError, WeightsError, nearest
from harness.spec import Lora, Workload, content_key
from harness.weights.base_model import Base
from harness.weights.building import building
from harness.weights.random_init import kaiming_uniform
from harness.weights.sources import write_atomically
from harness.weights.tensors import ADAPTER_FILE, Floats, adapter_sha256, write_tensors

FORMAT = 1  # raise when the same workload would get another adapter
Shape = tuple[int, int]
# The kernels of these read the weights of these modules past an adapter; PEFT (0.21) refuses to put one there.
_READ_PAST = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
_PAST_ADAPTERS = frozenset({"out_proj", "conv1d"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """The folder of an initial adapter and its content hash."""

    path: Path
    sha256: str


def prepare_adapter(workload: Workload, base: Base, cache: Path) -> Adapter | None:
    """Make (or find) the initial adapter of ``workload``; None when every weight is trained. Raises ConfigError for unknown targets."""
    method = workload.method
    if not isinstance(method, Lora):
        return None
    folder = _folder(workload, method, base, cache)
    if not _manifest(folder).is_file():
        with building(folder) as partial:
            _write(partial, method, base, workload)
    return _read(folder)


def find_adapter(workload: Workload, base: Base, cache: Path) -> Adapter | None:
    """The adapter that ``prepare_adapter`` would find; None where it must be made, or none is needed."""
    method = workload.method
    if not isinstance(method, Lora):
        return None
    folder = _folder(workload, method, base, cache)
    return _read(folder) if _manifest(folder).is_file() else None


def target_modules(targets: Iterable[str], linears: Iterable[str]) -> list[str]:
    """The linear modules that ``targets`` name by their last part or parts. Raises ConfigError for a target that matches none."""
    names = list(linears)
    found = {target: [name for name in names if name == target or name.endswith(f".{target}")] for target in targets}
    known = {name.rpartition(".")[2] for name in names}
    problems = [f"method.targets: no linear layer is called '{target}'; {nearest(target, known)}" for target in found if not found[target]]
    if problems:
        raise ConfigError("\n".join(problems))
    chosen = {name for matched in found.values() for name in matched}
    return [name for name in names if name in chosen]


def adaptable(targets: Iterable[str], linears: Mapping[str, Shape], model_type: str) -> dict[str, Shape]:
    """Those of ``linears`` that PEFT can adapt in a ``model_type``. Raises ConfigError for ``targets`` that it cannot."""
    past = _PAST_ADAPTERS if model_type in _READ_PAST else frozenset()
    if refused := sorted(past & {target.rpartition(".")[2] for target in targets}):
        raise ConfigError(f"method.targets: PEFT adapts no {' and no '.join(refused)} of a {model_type} model; leave {_it(refused)} out")
    return {name: shape for name, shape in linears.items() if name.rpartition(".")[2] not in past}


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _folder(workload: Workload, method: Lora, base: Base, cache: Path) -> Path:
    name = f"{workload.model.name}-{base.config_sha256[:12]}-{content_key(method)}-seed{workload.train.seed}-{FORMAT}"
    return cache / "adapter" / name


def _manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def _read(folder: Path) -> Adapter:
    try:
        return Adapter(folder, str(json.loads(_manifest(folder).read_text())["adapter_sha256"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder}: its manifest cannot be read; delete the folder and run again") from error


def _write(folder: Path, method: Lora, base: Base, workload: Workload) -> None:
    from harness.weights.structure import folder_config, structure

    config = folder_config(base.path)
    linears = adaptable(method.targets, structure(config).linears, config.model_type)
    shapes: dict[str, tuple[int, ...]] = {}
    for module in target_modules(method.targets, linears):
        rows, columns = linears[module]
        shapes[f"base_model.model.{module}.lora_A.weight"] = (method.rank, columns)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (rows, method.rank)
    seed = workload.train.seed

    def values(name: str, start: int, stop: int) -> Floats:
        if ".lora_B." in name:
            return np.zeros(stop - start, np.float32)
        return kaiming_uniform(name, seed, (shapes[name][0], shapes[name][1])).reshape(-1)[start:stop]

    write_tensors(folder / ADAPTER_FILE, shapes, method.dtype, values)
    _write_config(folder, method, workload.model.name)
    write_atomically(_manifest(folder), json.dumps({"adapter_sha256": adapter_sha256(folder)}))


def _write_config(folder: Path, method: Lora, model_name: str) -> None:
    from peft import LoraConfig, TaskType

    alpha = int(method.alpha) if method.alpha.is_integer() else method.alpha
    config = LoraConfig(
        r=method.rank,
        lora_alpha=alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rank_stabilised,
        use_dora=method.dora,
        bias="none",
        target_modules=list(method.targets),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model_name,
    )
    config.save_pretrained(str(folder))
