"""A prepared base whose linear modules are stored in NF4: made once from the base in ``model.dtype``, or the bytes that its source gave."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import WeightsError
from harness.weights.base_model import Base, read_base
from harness.weights.building import building
from harness.weights.given_nf4 import GIVEN, given_weights
from harness.weights.sources import TOKENIZER_FILES, write_atomically
from harness.weights.tensors import SHARD_BYTES, adapter_sha256

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # raise when the same base would be quantised differently
INDEX = "model.safetensors.index.json"


def prepare_nf4(base: Base, dtype: str, cache: Path) -> Base:
    """Make (or find) ``base``, stored as ``dtype``, in NF4: a folder that transformers loads through bitsandbytes."""
    folder = _folder(base, cache)
    if read_base(folder) is None:
        with building(folder) as partial:
            _build(base, dtype, partial)
    made = read_base(folder)
    if made is None:
        raise WeightsError(f"{folder}: its manifest cannot be read; delete the folder and run again")
    return made


def find_nf4(base: Base, cache: Path) -> Base | None:
    """The base that ``prepare_nf4`` would find; None where it must be made."""
    return read_base(_folder(base, cache))


def _folder(base: Base, cache: Path) -> Path:
    if (base.path / GIVEN).is_dir():  # the name of a base's folder tells the content of its source; scales are not told by decoded values
        return cache / "nf4" / f"{base.path.name}-given-{FORMAT}"
    return cache / "nf4" / f"{base.sha256[:20]}-{base.tokenizer_sha256[:8]}-{FORMAT}"


def _build(base: Base, dtype: str, folder: Path) -> None:
    from harness.weights.structure import folder_config, structure

    print(f"preparing {base.path.name}: linear layers in NF4 ...", flush=True)
    linears = [name for name in structure(folder_config(base.path)).linears if "." in name]  # a head stands at the top
    if not linears:
        raise WeightsError("method=qlora: the model has no linear layers to store in NF4; use method=lora")
    _write(base.path, {f"{name}.weight" for name in linears}, folder)
    config = {**base.config, "quantization_config": _quantisation(dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    for name in TOKENIZER_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)
    manifest = {
        "format": FORMAT,
        "base_sha256": replace(base, config=config).content_sha256(adapter_sha256(folder)),
        "description": f"{base.description}; linear layers in NF4{' as given' if (base.path / GIVEN).is_dir() else ''}",
        "dtype": dtype,
        "tokenizer_sha256": base.tokenizer_sha256,
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))


def _write(source: Path, quantised: set[str], folder: Path) -> None:
    """The tensors of ``source``, in files of about ``SHARD_BYTES``; packed ones as they were given, if they were."""
    from safetensors.torch import save_file

    from harness.nf4 import quantise, stored_tensors, to_tensors

    given = given_weights(dict(stored_tensors(source / GIVEN))) if (source / GIVEN).is_dir() else None
    shard: dict[str, Tensor] = {}
    placed: dict[str, str] = {}
    held = total = number = 0
    for name, tensor in stored_tensors(source):
        weight = None if name not in quantised else given(name) if given else quantise(tensor)
        made = {name: tensor} if weight is None else to_tensors(name, weight)
        size = sum(each.nbytes for each in made.values())
        if shard and held + size > SHARD_BYTES:
            save_file(shard, folder / _file(number), metadata={"format": "pt"})
            shard, held, number = {}, 0, number + 1
        shard.update(made)
        placed |= dict.fromkeys(made, _file(number))
        held, total = held + size, total + size
    save_file(shard, folder / _file(number), metadata={"format": "pt"})
    if missing := sorted(quantised - set(placed)):
        raise WeightsError(f"{missing[0]}: a linear layer of the model, but no tensor of its base; get the weights again")
    if number == 0:
        (folder / _file(0)).rename(folder / "model.safetensors")
    else:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=1))


def _file(number: int) -> str:
    return f"model-{number + 1:05}.safetensors"


def _quantisation(dtype: str) -> dict[str, Any]:
    """As transformers writes it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
