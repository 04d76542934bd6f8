"""Linear modules whose frozen weight stays packed in NF4: decoded for each product, in forward and again in backward, and never kept.

A module holds its weight as one flat parameter: all bytes of it, viewed as float32. FSDP2 shards and gathers that as any other (before
torch 2.13 it takes floating point only), and nothing rounds it, because nobody computes in it. Not as bfloat16: what FSDP2 gathers it
copies by ``_foreach_copy_``, which on a GPU takes 16-bit values through float32, so that bytes that look like a NaN come back as those of
another (pytorch/pytorch#159333). What was gathered is whole again, so a shard may end anywhere, inside a block too. The products are
operations of torch's dispatcher: compilers and checkpointing see one product where decoding and multiplying are two.

Legend: N output and K input columns of a linear module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UnsupportedError
from harness.nf4 import BLOCK, NESTED_BLOCK, PARTS, STATE, Quantised, decode, from_tensors, stored_tensors

_ALIGNED = 16  # bytes: parts begin at multiples of it, for kernels that load many at once
_CARRIER = torch.float32  # what bytes are viewed as


@dataclass(frozen=True, slots=True)
class Form:
    """What the bytes of a weight [N, K] do not say themselves. ``stored``: the type that values are rounded to."""

    rows: int
    columns: int
    offset: float
    stored: torch.dtype

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where each part begins and ends, in bytes: codes, nested scales, levels of scales, levels of values, scales."""
        count = self.rows * self.columns
        blocks = -(-count // BLOCK)
        sizes = (-(-count // 2), 4 * -(-blocks // NESTED_BLOCK), 4 * 256, 4 * 16, blocks)
        starts = [sum(_aligned(size) for size in sizes[:place]) for place in range(len(sizes))]
        return tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Packed:
    """All bytes of a weight as one flat tensor of float32, and what it takes to read them."""

    data: Tensor
    form: Form


def joined(weight: Quantised) -> Packed:
    """The bytes of ``weight`` in one tensor."""
    rows, columns = weight.shape
    form = Form(rows, columns, weight.offset, weight.dtype)
    data = torch.zeros(_aligned(form.spans[-1][1]), dtype=torch.uint8, device=weight.packed.device)
    numbers = (each.float().view(torch.uint8) for each in (weight.nested_absmax, weight.levels, weight.code))
    for part, (start, stop) in zip((weight.packed, *numbers, weight.absmax), form.spans, strict=True):
        data[start:stop] = part
    return Packed(data.view(_CARRIER), form)


def parted(packed: Packed) -> Quantised:
    """The weight whose bytes these are, as views of them."""
    form, data = packed.form, packed.data.view(torch.uint8)
    codes, nested, levels, code, absmax = (data[start:stop] for start, stop in form.spans)
    large, eight, four = (each.view(torch.float32) for each in (nested, levels, code))
    return Quantised(codes, absmax, large, form.offset, four, eight, (form.rows, form.columns), form.stored)


def decoded(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The values [N, K] in ``dtype``, by way of the type that they were stored in; on a GPU in one launch."""
    weight = parted(packed)
    if weight.packed.device.type != "cuda":
        return decode(weight).to(dtype)
    from engines.native.kernels.nf4 import decode_nf4

    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    decode_nf4(weight, out)
    return out


@torch.library.custom_op("engine_room::nf4_linear", mutates_args=())
def _linear(x: Tensor, data: Tensor, bias: Tensor | None, rows: int, columns: int, offset: float, stored: torch.dtype) -> Tensor:
    """``x`` [..., K] times the weight, transposed: [..., N]."""
    weight = decoded(Packed(data, Form(rows, columns, offset, stored)), x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # the type of x says it all; autocast reaches this far or not, by what is around
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("engine_room::nf4_input_gradient", mutates_args=())
def _input_gradient(dy: Tensor, data: Tensor, rows: int, columns: int, offset: float, stored: torch.dtype) -> Tensor:
    """``dy`` [..., N] times the weight: [..., K]."""
    return dy @ decoded(Packed(data, Form(rows, columns, offset, stored)), dy.dtype)


@_linear.register_fake
def _(x: Tensor, data: Tensor, bias: Tensor | None, rows: int, columns: int, offset: float, stored: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@_input_gradient.register_fake
def _(dy: Tensor, data: Tensor, rows: int, columns: int, offset: float, stored: torch.dtype) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The bytes, which are there anyway: FSDP frees them after forward and has gathered them again when backward asks."""
    _, data, _, *ctx.form = inputs
    ctx.save_for_backward(data)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of the input alone: weight and bias are frozen."""
    (data,) = ctx.saved_tensors
    return _input_gradient(dy, data, *ctx.form), *(None,) * 6


_linear.register_autograd(_backward, setup_context=_keep)


class Nf4Linear(nn.Module):
    """A frozen linear module, like a plain one whose weight, decoded, is of ``dtype``."""

    def __init__(self, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed.data, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.form, self.dtype = packed.form, dtype
        self.in_features, self.out_features = packed.form.columns, packed.form.rows

    @property
    def weight(self) -> Tensor:
        """Decoded, for models that read it past the module (Mamba's): autograd keeps what is made of it until backward."""
        return decoded(Packed(self.packed, self.form), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in ``dtype`` or in that of autocast."""
        form, device = self.form, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        y: Tensor = _linear(x.to(dtype), self.packed, self.bias, form.rows, form.columns, form.offset, form.stored)
        return y

    def extra_repr(self) -> str:
        """What it is, in a print of the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def load_packed(folder: Path, config: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[nn.Module, Packed]]:
    """The model of an NF4 checkpoint, in ``dtype``, and the packed weights of its linear modules, which :func:`pack_linears` is to replace:
    until then each has one zero for a weight, which takes no memory. Raises UnsupportedError where something else is packed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    tensors = dict(stored_tensors(folder))
    weights = {}
    for name in [key.removesuffix(STATE) for key in tensors if key.endswith(STATE)]:
        weights[name] = joined(from_tensors(name, tensors.__getitem__))
        form = weights[name].form
        tensors[name] = torch.zeros((), dtype=dtype).expand(form.rows, form.columns)
        for part in (*PARTS, STATE):
            del tensors[f"{name}{part}"]
    del config.quantization_config
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = architecture.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)
    found = {model.get_submodule(name.removesuffix(".weight")): weight for name, weight in weights.items()}
    if others := sorted({type(module).__name__ for module in found if not isinstance(module, nn.Linear)}):
        raise UnsupportedError(f"the base stores weights of {', '.join(others)} in NF4; only those of linear modules can be trained on")
    return model, found


def pack_linears(model: nn.Module, weights: Mapping[nn.Module, Packed], dtype: torch.dtype) -> None:
    """Put a module of packed weights in the place of each of these. After PEFT, which knows adapters of plain linear modules only."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in weights:
                setattr(parent, name, Nf4Linear(weights[child], child.bias, dtype))  # type: ignore[arg-type]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
