"""A model and its tokenizer out of one .gguf file: dequantised values, configuration, and a tokenizer that cuts text as the file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import WeightsError
from harness.weights.gguf_header import read_metadata
from harness.weights.tensors import Floats

UNQUANTISED = frozenset({"ALL_F32", "MOSTLY_F16", "MOSTLY_BF16"})
GPT2_CUT = None  # the tokenizers library's own regular expression for GPT-2
LLAMA3_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_CUT = LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> (each digit alone before all else, cut, whole words first, starts with bos unless the file says otherwise)
CUTS: dict[str, tuple[bool, str | None, bool, bool]] = {
    "gpt-2": (False, GPT2_CUT, False, False),
    "smollm": (True, GPT2_CUT, False, False),
    "llama-bpe": (False, LLAMA3_CUT, True, True),
    "qwen2": (False, QWEN2_CUT, False, False),
}


def gguf_weights(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Callable[[str, int, int], Floats], str]:
    """Configuration, shapes (tied tensors once), values in float32, and a description such as ``Q4_1-dequantised``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        raise WeightsError(f"{path.name}: transformers cannot read it: {error}; use the model's safetensors (dir: or hub:)") from error
    flat = {name: parameter.detach().reshape(-1).numpy() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # what is stored from here on is not quantised
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    return config, shapes, lambda name, start, stop: flat[name][start:stop], _description(path)


def write_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of ``path`` to ``folder`` as tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Not through transformers: its 5.17 takes the bos token for eos and cuts runs of digits and spaces in its own way.
    """
    fields = read_metadata(path)
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in CUTS:
        raise WeightsError(
            f"{path.name}: its tokenizer is of kind {kind!r}, cut {pre!r}; known are byte-level BPE (gpt2) with {', '.join(CUTS)}; "
            "set model.tokenizer to a dir: or hub: source that holds the original tokenizer.json"
        )
    names: list[str] = fields["tokenizer.ggml.tokens"]
    special = {role: names[fields[key]] for role, key in _special_keys().items() if fields.get(key) is not None}
    tokenizer = _tokenizer(fields, names, CUTS[pre], special.get("bos_token"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    length = next((value for key, value in fields.items() if key.endswith(".context_length")), None)
    if length:
        settings["model_max_length"] = int(length)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True))
    template = fields.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template)


def _special_keys() -> dict[str, str]:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {role: f"tokenizer.ggml.{name}_token_id" for role, name in roles.items()}


def _tokenizer(fields: dict[str, Any], names: list[str], cut: tuple[bool, str | None, bool, bool], bos: str | None) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    digits, pattern, whole_words, starts_with_bos = cut
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(names)
    control = [AddedToken(name, normalized=False, special=kind == 3) for name, kind in zip(names, kinds, strict=True) if kind in (3, 4)]
    tokenizer.add_tokens([token for token in control if not token.special])
    tokenizer.add_special_tokens([token for token in control if token.special])
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", starts_with_bos):
        pieces = [(bos, vocabulary[bos])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=pieces)
    return tokenizer


def _description(path: Path) -> str:
    import gguf

    number = read_metadata(path).get("general.file_type")
    if number is None:
        return "GGUF of unstated type"
    name = gguf.LlamaFileType(number).name
    kind = name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return kind if name in UNQUANTISED else f"{kind}-dequantised"
