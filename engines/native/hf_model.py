"""What is done to a loaded model of transformers before it trains: PEFT's adapter, compilation, an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def with_adapter(model: Any, adapter: Path, dtype: Any, *, cast_inputs: bool) -> Any:
    """``model`` with the PEFT adapter of a folder, to be trained in ``dtype``.

    ``cast_inputs``: whether PEFT casts the inputs of an adapter to its dtype, as it does by itself; under autocast they come back down at
    once, and the same numbers are multiplied without.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):  # what peft.helpers.disable_input_dtype_casting does for the length of a block
            module.cast_input_dtype_enabled = cast_inputs
    return model


def in_fp8(model: Any, dtype: Any) -> None:
    """Make a model in float32 compute, in ``dtype``, what its linear layers in e4m3 would."""
    from harness.fp8 import emulate

    emulate(model)
    for parameter in model.parameters():  # buffers stay: the rotary frequencies are float32 in every dtype
        parameter.data = parameter.data.to(dtype)


# What varies is one row or more, a mask or none: four kinds of call of a layer, and again for each kind of layer (sliding attention, full).
_MOST_KINDS_OF_CALL = 16


def compile_layers(model: Any, *, with_loss: bool, shapes_vary: bool) -> None:
    """Compile every decoder layer, and ``with_loss`` the loss from the logits, each by itself; layers of one shape share their code.

    ``shapes_vary``: make code for any number of positions at once, instead of for the first number and then for any. Of a layer its
    ``forward`` alone: what hangs on its call, as FSDP2's gathers do, stays outside (traced with it, two ranks of a CPU gave no answer).
    Not the model as a whole: when transformers is traced it makes a mask of positions x positions for what it otherwise leaves to causal
    attention, and no flash kernel takes one (``find_packed_sequence_indices`` of transformers 5.17).
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on without compiling, with a line in the log
    torch._dynamo.config.recompile_limit = _MOST_KINDS_OF_CALL
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    how = _for_any_shape(plain) if shapes_vary else {}
    for module in plain.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = torch.compile(module.forward, **how)
    if with_loss:
        plain.loss_function = torch.compile(plain.loss_function, **how)


def _for_any_shape(model: Any) -> dict[str, Any]:
    """How to compile so that no length is a kind of call of its own, nor the first layer one."""
    from torch.fx.experimental import _config as symbols

    symbols.use_duck_shape = False  # else a length that is also the size of a head, or of the model, is taken for that
    # The first layer's input as all others': for one more gradient, of its q, k and v (0.2 % of a step of Llama-3.1-8B's operations).
    model.enable_input_require_grads()
    # Where a size is no multiple of 8, as an adapter of rank 4, torch 2.11 asks for every product whether it is worth padding, and every
    # answer is a guard on the number of positions.
    return {"dynamic": True, "options": {"shape_padding": False}}


def exact_float32() -> None:
    """TF32 would round float32 products to 10 bits: not the truth others are judged by."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
