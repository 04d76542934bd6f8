"""Liger patches modules of transformers for the whole process: tests put them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

MODULES = {"llama": modeling_llama, "mistral": modeling_mistral, "qwen2": modeling_qwen2, "qwen3": modeling_qwen3}


@contextmanager
def unpatched_afterwards() -> Iterator[None]:
    """The modules of transformers that Liger patches are afterwards what they were."""
    before = {name: dict(vars(module)) for name, module in MODULES.items()}
    yield
    for name, module in MODULES.items():
        vars(module).update(before[name])
