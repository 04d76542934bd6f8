"""Which activations of transformers' layers are computed again for backward: none, what is cheap, or whole layers; light to import."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from harness.spec import Workload

EveryNth = Annotated[int, Field(ge=2)]
Recompute = Literal["none", "selective", "full"] | EveryNth
"""``full``: all of every layer; a number: all of every so-many-th layer, beginning with the first; ``selective``: of every layer all but
the results of products and of attention, which are kept.
"""


def recompute_name(recompute: Recompute) -> str:
    """Its part of a variant's name, empty for ``none``."""
    if isinstance(recompute, int):
        return f"ckpt-every-{recompute}"
    return {"none": "", "selective": "ckpt-selective", "full": "ckpt"}[recompute]


def fraction(recompute: Recompute, workload: Workload, attention: str) -> float | None:
    """Of the layers' forward pass, in operations of products and attention, what backward does again; None where that depends on lengths,
    or on a number of layers that only the weights say.

    ``selective`` counts as nothing. Of products it repeats the thin ones, adapters' B: at rank 16 0.3 % of the parameters of the layers of
    Llama-3.1-8B.
    """
    if isinstance(recompute, int):
        layers = (workload.model.config or {}).get("num_hidden_layers")
        return -(-layers // recompute) / layers if isinstance(layers, int) else None
    if recompute == "selective":
        return None if attention == "eager" else 0.0
    return 1.0 if recompute == "full" else 0.0


def compiled_reasons(recompute: Recompute, compiled: bool) -> list[str]:
    """Why a choice of operations is none where layers are compiled."""
    if recompute == "selective" and compiled:
        why = "a compiled layer chooses by itself what it keeps, and is one operation to a selection"
        return [f"recompute=selective: {why}; set compile=false, or recompute to none or full"]
    return []


def checkpoint_layers(model: Any, recompute: Recompute) -> None:
    """Make the layers of a model of transformers recompute what is asked for, by torch's checkpointing."""
    if recompute == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        from engines.native.kept_products import contexts

        how["context_fn"] = contexts
    every = recompute if isinstance(recompute, int) else 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how, every_n_layers=every)
