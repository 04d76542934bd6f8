"""A source that bitsandbytes has quantised already: its values for a plain base, its own bytes for one in NF4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import WeightsError
from harness.spec import Model
from harness.weights.structure import folder_config, structure
from harness.weights.tensors import Floats, read_tensors, write_model

if TYPE_CHECKING:
    from torch import Tensor

    from harness.nf4 import Quantised

GIVEN = "given"  # inside the folder of a plain base: links to the files that its values were decoded from


def is_given(config: Mapping[str, Any]) -> bool:
    """Whether a source with this ``config`` was quantised by bitsandbytes."""
    return (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def from_given(model: Model, source: Path, config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """Write the decoded values of ``source`` into ``folder``, and links to its files; returns the plain configuration and a description.

    Raises WeightsError for what ``method=qlora`` does not mean: other blocks or types, linear layers left out, another stored type.
    """
    from harness.nf4 import PARTS, STATE, stored_tensors

    read_tensors(source)  # a torn file is named
    tensors = dict(stored_tensors(source))
    packed = {name.removesuffix(STATE) for name in tensors if name.endswith(STATE)}
    _check_names(source, packed)
    read = given_weights(tensors)
    weights = {name: read(name) for name in packed}
    for name, weight in weights.items():
        if (stored := str(weight.dtype).removeprefix("torch.")) != model.dtype:
            raise WeightsError(
                f"{source.name}: {name} was {stored} before it was quantised; set model.dtype={stored} (it is {model.dtype})"
            )
    parts = {f"{name}{part}" for name in packed for part in (*PARTS, STATE)}
    shapes = {name: weights[name].shape if name in packed else tuple(tensor.shape) for name, tensor in tensors.items() if name not in parts}

    def values(name: str, start: int, stop: int) -> Floats:
        found = _decoded(weights[name], start, stop) if name in packed else tensors[name].flatten()[start:stop]
        made: Floats = found.float().numpy()
        return made

    write_model(folder, shapes, model.dtype, values)
    (folder / GIVEN).mkdir()
    for file in source.glob("*.safetensors"):
        (folder / GIVEN / file.name).symlink_to(file.resolve())
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return plain, f"{source.name}, NF4 of bitsandbytes, decoded to {model.dtype}"


def given_weights(tensors: Mapping[str, Tensor]) -> Callable[[str], Quantised]:
    """The packed weights among ``tensors``, by name."""
    from harness.nf4 import from_tensors

    return lambda name: from_tensors(name, tensors.__getitem__)


def _check_names(source: Path, packed: set[str]) -> None:
    config = folder_config(source)
    del config.quantization_config
    linears = {f"{name}.weight" for name in structure(config).linears if "." in name}  # a head stands at the top
    if others := sorted(packed ^ linears):
        kind = "is no linear layer but in NF4" if others[0] in packed else "is not in NF4"
        raise WeightsError(
            f"{source.name}: {others[0]} {kind}; expected every linear layer but the head in NF4, and nothing else "
            f"({len(others)} differ): take the weights that were not quantised"
        )


def _decoded(weight: Quantised, start: int, stop: int) -> Tensor:
    """Values ``start``, a multiple of all blocks, to ``stop`` of the flat weight."""
    from harness.nf4 import BLOCK, NESTED_BLOCK, decode

    def part(tensor: Tensor, size: int) -> Tensor:
        return tensor[start // size : -(-stop // size)]

    return decode(
        replace(
            weight,
            packed=part(weight.packed, 2),
            absmax=part(weight.absmax, BLOCK),
            nested_absmax=part(weight.nested_absmax, BLOCK * NESTED_BLOCK),
            shape=(stop - start,),
        )
    )
