"""The shape of a Llama-family decoder as a ``config.json`` tells it, or the reason why it is not of that family (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UnsupportedError

# What transformers assumes where a config.json is silent; keys that are the same in all four families stand in _DEFAULTS.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
}
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_WINDOW = 4096  # of qwen2 and qwen3, only when use_sliding_window is true
_DEFAULT_FIRST_WINDOWED_LAYER = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): base ``theta`` and how the frequencies are scaled."""

    kind: str  # default | linear | llama3
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Everything a decoder of this family needs to know besides its weights."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_epsilon: float
    rope: Rope
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def query_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of the linear modules of one layer, biases left out."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_size + 3 * self.intermediate_size)

    @property
    def key_size(self) -> int:
        """Columns of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim


def read_shape(config: Mapping[str, Any], longest: int) -> LlamaShape:
    """The shape of ``config`` (a parsed config.json) for samples of at most ``longest`` tokens.

    Raises UnsupportedError that names every property the native layer does not have.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UnsupportedError(f"model_type '{family}' is not one of the native decoder's: {', '.join(_FAMILIES)}")
    values = {**_DEFAULTS, **_FAMILIES[family], **config}
    reasons = [*_unknown_parts(values), *_sliding_window(values, longest), *_rope_problems(values)]
    if reasons:
        raise UnsupportedError(f"the native decoder cannot train this {family} model: {'; '.join(reasons)}")
    heads = values["num_attention_heads"]
    bias = bool(values["attention_bias"]) and family in ("llama", "qwen3")
    return LlamaShape(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=values["head_dim"] or values["hidden_size"] // heads,
        intermediate_size=values["intermediate_size"],
        norm_epsilon=values["rms_norm_eps"],
        rope=_rope(values),
        tied_head=bool(values["tie_word_embeddings"]),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=bool(values["mlp_bias"]) and family == "llama",
        qk_norm=family == "qwen3",
    )


def _unknown_parts(values: Mapping[str, Any]) -> list[str]:
    reasons = []
    if values["hidden_act"] not in ("silu", "swish"):
        reasons.append(f"hidden_act is '{values['hidden_act']}', only silu is known")
    reasons += [f"{key} is {values[key]}, training has no dropout" for key in values if key.endswith("dropout") and values[key]]
    quantised = values.get("quantization_config") or {}
    if quantised and not (quantised.get("quant_method") == "bitsandbytes" and quantised.get("bnb_4bit_quant_type") == "nf4"):
        reasons.append("its weights are quantised (quantization_config) by other means than bitsandbytes' NF4")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"] or values["num_attention_heads"]
    if heads % kv_heads:
        reasons.append(f"{heads} attention heads cannot share {kv_heads} key-value heads")
    return reasons


def _sliding_window(values: Mapping[str, Any], longest: int) -> list[str]:
    """A window that is at least as long as every sample changes nothing; a shorter one is not implemented."""
    first_windowed = 0
    window = values.get("sliding_window")
    if values["model_type"] in ("qwen2", "qwen3"):
        window = values.get("sliding_window", _DEFAULT_WINDOW) if values.get("use_sliding_window") else None
        first_windowed = values.get("max_window_layers", _DEFAULT_FIRST_WINDOWED_LAYER)
    elif values["model_type"] == "llama":
        window = None
    kinds = values.get("layer_types") or [
        "sliding_attention" if index >= first_windowed else "full_attention" for index in range(values["num_hidden_layers"])
    ]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        return [f"layer_types has {', '.join(unknown)}"]
    if window is not None and window < longest and "sliding_attention" in kinds:
        return [f"its sliding window ({window}) is shorter than data.sequence_length ({longest})"]
    return []


def _rope_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes ``rope_parameters``; before that ``rope_scaling`` stood beside a top-level ``rope_theta``."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)
    return rope


def _rope_problems(values: Mapping[str, Any]) -> list[str]:
    rope = _rope_values(values)
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if rope["rope_type"] not in needed:
        return [f"rope type '{rope['rope_type']}' is not one of {', '.join(needed)}"]
    reasons = [f"rope type {rope['rope_type']} lacks {key}" for key in needed[rope["rope_type"]] if key not in rope]
    if rope["partial_rotary_factor"] != 1.0:
        reasons.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}, only whole heads are rotated")
    return reasons


def _rope(values: Mapping[str, Any]) -> Rope:
    rope = _rope_values(values)
    kind = rope["rope_type"]
    if kind == "default":
        return Rope(kind=kind, theta=float(rope["rope_theta"]))
    if kind == "linear":
        return Rope(kind=kind, theta=float(rope["rope_theta"]), factor=float(rope["factor"]))
    trained_length = values.get("max_position_embeddings") or _MAX_POSITIONS[values["model_type"]]
    return Rope(
        kind=kind,
        theta=float(rope["rope_theta"]),
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope.get("original_max_position_embeddings") or trained_length),
    )
