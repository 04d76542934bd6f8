"""Every kernel as the Llama-3.1-8B shape launches it: what is compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton.language as tl

from engines.native import eight_bit
from engines.native.kernels import (
    adamw,
    adamw_full,
    attention,
    attention_backward,
    cross_entropy,
    embedding,
    fp8,
    fp8_inputs,
    head_norms,
    nf4,
    norm_weight,
    outer,
    parts,
    rms_norm,
    rotary,
    swiglu,
    swiglu_gradients,
)  # fmt: skip
from engines.native.kernels.launching import OF_TOKENS, Tile


@dataclass(frozen=True, slots=True)
class Specimen:
    """A kernel as the Llama-3.1-8B shape launches it.

    ``pointers``: argument name -> a letter of ``_DTYPES``, h bf16 and f fp32 among them; ``scalars`` are fp32, every other an int32,
    a multiple of 16 unless ``odd``. ``has_dot``: it multiplies matrices, so it needs tensor cores (not on sm_75: Triton has none there).
    ``contracts``: products and sums may become one operation, rounded once. ``num_stages``: null for the usual number of the target.
    """

    name: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    scalars: Sequence[str] = ()
    odd: Sequence[str] = ()
    has_dot: bool = False
    contracts: bool = True
    num_stages: int | None = None


def specimens() -> tuple[Specimen, ...]:
    """Every kernel of engines.native.kernels."""
    row = {"BLOCK": 4096, "P": 64, "PAD": 64}
    columns = {"BLOCK": 1024, "P": 64, "PAD": 64}
    heads = {"HALF": 64, "BLOCK": 64, "HEADS": 8}
    thin = dict.fromkeys(("x", "thin", "weight"), "h") | {"inverse": "f", "partial": "f", "arrived": "i", "gradient": "f"}
    sums = dict.fromkeys(("partial", "d_input", "d_outputs"), "f") | {"arrived": "i"}
    tile = {"AT_ONCE": outer.PARTIALS_AT_ONCE, "BT": 128, "BN": 64, "BR": 16}
    split = {"P": 16, "PAD": 16, "LIMIT": 448.0, "GAIN": 16.0, "BY_HAND": False}
    flat = dict.fromkeys(("master", "gradient", "first", "second", "scalars"), "f") | {"anchor": "h", "plan": "l"}
    return (
        Specimen(
            "rms_norm", rms_norm._rms_norm_forward, {"x": "h", "delta": "h", "w": "h", "sums": "h", "y": "h", "inverse": "f"},
            {**row, "HAS_DELTA": True}, 8, ("epsilon",),
        ),
        Specimen(
            "rms_norm_backward", rms_norm._rms_norm_backward,
            {"dy": "h", "x": "h", "w": "h", "inverse": "f", "residual": "h", "dx": "h"}, {**row, "HAS_RESIDUAL": True}, 8,
        ),
        Specimen("embed", embedding._embed, {"embedding": "h", "tokens": "l", "out": "h"}, {"BLOCK": 2048}, 4),
        Specimen("swiglu", swiglu._swiglu_forward, {"gate_up": "h", "h": "h"}, columns, 4),
        Specimen("swiglu_backward", swiglu._swiglu_backward, {"dh": "h", "gate_up": "h"}, columns, 4),
        Specimen(
            "swiglu_gradients", swiglu_gradients._swiglu_gradients, dict.fromkeys(("dh", "gate_up", "thin", "low"), "h") | sums,
            {**tile, "BT": swiglu_gradients.TILE.tokens, "P": 64, "PAD": 64}, swiglu_gradients.TILE.warps,
            odd=(*OF_TOKENS, "R", "input_column_stride"), has_dot=True,
        ),
        Specimen("rotate", rotary._rotate, {"x": "h", "cosine": "f", "sine": "f"}, heads, 2, odd=("num_heads",)),
        Specimen(
            "rotate_back", rotary._rotate_back, {"dq": "h", "dk": "h", "dv": "h", "cosine": "f", "sine": "f", "out": "h"},
            {**heads, "P": 64, "PAD": 64}, 2, odd=("C", "G", "query_programs", "key_programs"),
        ),
        Specimen(
            "norm_rotate", head_norms._norm_rotate,
            dict.fromkeys(("x", "query_weight", "key_weight", "out"), "h") | {"cosine": "f", "sine": "f"}, heads, 4,
            ("epsilon",), odd=("C", "num_heads"),
        ),
        Specimen(
            "norm_rotate_back", head_norms._norm_rotate_back,
            dict.fromkeys(("dq", "dk", "dv", "x", "query_weight", "key_weight", "out"), "h") | {"cosine": "f", "sine": "f"},
            {**heads, "P": 64, "PAD": 64}, 4, ("epsilon",), odd=("C", "G", "query_programs", "key_programs"),
        ),
        Specimen(
            "cross_entropy", cross_entropy._cross_entropy, {"logits": "h", "targets": "l", "losses": "f", "scale": "f"},
            {"BLOCK": cross_entropy.SWEEP.block, "LOWEST": -3.0e38, "FIRST": "", "SECOND": ""}, cross_entropy.SWEEP.warps,
        ),
        Specimen("outer", outer._outer, thin, {"NORMED": False, **tile}, 4, odd=(*OF_TOKENS, "R", "rank_stride"), has_dot=True),
        Specimen("outer_normed", outer._outer, thin, {"NORMED": True, **tile}, 4, odd=(*OF_TOKENS, "R", "rank_stride"), has_dot=True),
        Specimen(
            "adamw", adamw._adamw, flat, {"CHUNK": 1024, "FIELDS": adamw._FIELDS, "ALIGNED": True}, 4,
            ("beta1", "beta2", "epsilon", "weight_decay", "ratio"),
        ),
        Specimen(
            "adamw_float32", adamw_full._adamw_float32,
            dict.fromkeys(("masters", "gradients", "first", "second", "scalars", "squares"), "f") | {"values": "h"}, {"CHUNK": 1024}, 4,
            ("beta1", "beta2", "epsilon", "weight_decay"),
        ),
        Specimen(
            "adamw_eight_bit", adamw_full._adamw_eight_bit,
            dict.fromkeys(("gradients", "first_scale", "second_scale", "scalars", "squares"), "f")
            | {"weights": "s", "first": "c", "second": "b"},
            {
                "BLOCKS": adamw_full._BLOCKS, "BLOCK": 256, "ROUNDS": eight_bit.ROUNDS, "SIGNED": eight_bit.SIGNED,
                "UNSIGNED": eight_bit.UNSIGNED, "LOWEST": eight_bit.LEAST,
            },
            4, ("beta1", "beta2", "epsilon", "weight_decay"), odd=("seed", "first_block", "num_blocks"),
        ),
        Specimen(
            "norm_weight", norm_weight._norm_weight, {"dy": "h", "x": "h", "inverse": "f", "partial": "f"},
            {"BT": norm_weight.TILE.tokens, "BN": norm_weight.COLUMNS}, norm_weight.TILE.warps, odd=OF_TOKENS,
        ),
        Specimen("normed_again", norm_weight._normed_again, {"x": "h", "w": "h", "inverse": "f", "y": "h"}, {"BLOCK": 4096}, 8),
        Specimen(
            "decode_nf4", nf4._decode_nf4,
            {"words": "i", "absmax": "b", "nested": "f", "code": "f", "levels": "f", "out": "h"},
            {"PARTS": nf4.CUT.parts, "WORDS": nf4.CUT.words, "BLOCK": 64, "NESTED": 256, "KEPT": tl.bfloat16}, nf4.CUT.warps,
            ("offset",), odd=("num_words",), contracts=False,
        ),
        Specimen(
            "decode_nf4_by_values", nf4._decode_nf4_by_values,
            {"packed": "b", "absmax": "b", "nested": "f", "code": "f", "levels": "f", "out": "h"},
            {"VALUES": nf4._AT_ONCE, "BLOCK": 64, "NESTED": 256, "KEPT": tl.bfloat16}, 4, ("offset",), odd=("count", "K", "stride"),
            contracts=False,
        ),
        Specimen(
            "copy_parts", parts._copy_parts, {f"{kind}{index}": "h" for kind in ("value", "place") for index in range(parts.MOST)},
            {"BLOCK": 1024}, 4, odd=("end0", "end1", "end2"),
        ),
        *(
            Specimen(
                f"quantise_{block}{'' if single else '_twice'}", fp8._quantise_wide, {"x": "h", "codes": "e", "scales": "f"},
                {"BLOCK": block, "SINGLE": single, "MOST": 16.0, **split}, block // 1024,
            )
            for block, single in ((4096, True), (16384, True), (32768, True), (32768, False))
        ),
        Specimen(
            "write_tail", fp8._write_tail, {"thin": "h", "codes": "e", "scales": "f"},
            {"ROWS": 64, **split, "FIRST": 2, "SECOND": 1, "rank_stride": 1}, 4,
        ),
        Specimen(
            "write_tail_turned", fp8._write_tail, {"thin": "h", "codes": "e", "scales": "f"},
            {"ROWS": 64, **split, "FIRST": 2, "SECOND": 1, "row_stride": 1}, 4,
        ),
        Specimen(
            "rms_norm_codes", fp8_inputs._rms_norm_codes,
            {"x": "h", "delta": "h", "w": "h", "sums": "h", "y": "h", "inverse": "f", "codes": "e", "scales": "f"},
            {"BLOCK": 4096, "HAS_DELTA": True, "MOST": 16.0, "BY_HAND": False}, 8, ("epsilon",),
        ),
        Specimen(
            "swiglu_codes", fp8_inputs._swiglu_codes, {"gate_up": "h", "h": "h", "codes": "e", "scales": "f"},
            {"BLOCK": 16384, "MOST": 16.0, "BY_HAND": False}, 16,
        ),
        Specimen("decode_rows", fp8._decode_rows, {"codes": "e", "scales": "f", "out": "h"}, {"BLOCK": 2048}, 4),
        *(each for head in attention.HEADS for each in _attending(head)),
    )  # fmt: skip


def _attending(head: int) -> tuple[Specimen, ...]:
    """The kernels of attention for heads of so many columns."""
    inputs, kept = {"q": "h", "k": "h", "v": "h"}, {"sums": "f", "deltas": "f"}

    def specimen(name: str, kernel: Any, pointers: Mapping[str, str], scalars: Sequence[str], **constants: float) -> Specimen:
        cut = attention.CUTS[f"{name}_{head}"]
        sizes = {"STACK": 4, "D": head, "BD": head, "BM": cut.queries, "BN": cut.keys, **constants}
        return Specimen(f"{name}_{head}", kernel, pointers, sizes, cut.warps, scalars, (*OF_TOKENS, "group"), True, num_stages=cut.stages)

    return (
        specimen("attend", attention._attend, {**inputs, "begins": "i", "y": "h", "sums": "f"}, ("scale",), LOWEST=-3.0e38, APART=True),
        specimen(
            "attend_backward_queries", attention_backward._attend_backward_queries,
            {**inputs, **kept, "y": "h", "dy": "h", "begins": "i", "dq": "h"}, ("scale", "factor"), APART=True,
        ),
        specimen(
            "attend_backward_keys", attention_backward._attend_backward_keys,
            {**inputs, **kept, "dy": "h", "ends": "i", "dk": "h", "dv": "h"}, ("scale", "factor"),
        ),
    )  # fmt: skip


def candidates() -> tuple[Specimen, ...]:
    """Every cut that bench_kernels --tune may choose."""
    known = {one.name: one for one in specimens()}

    def tiled(name: str, tile: Tile) -> Specimen:
        one = known[name]
        label = f"{name}/{tile.tokens}t{tile.warps}w{tile.stages}s"
        return replace(one, name=label, constants={**one.constants, "BT": tile.tokens}, num_warps=tile.warps, num_stages=tile.stages)

    def swept(sweep: cross_entropy.Sweep) -> Specimen:
        one = known["cross_entropy"]
        constants = {**one.constants, "BLOCK": sweep.block, "FIRST": sweep.first, "SECOND": sweep.second}
        label = f"cross_entropy/{sweep.block}c{sweep.warps}w{'h' if sweep.first else ''}"
        return replace(one, name=label, constants=constants, num_warps=sweep.warps)

    def cut(each: nf4.Cut) -> Specimen:
        one = known["decode_nf4"]
        constants = {**one.constants, "PARTS": each.parts, "WORDS": each.words}
        return replace(one, name=f"decode_nf4/{each.parts}p{each.warps}w", constants=constants, num_warps=each.warps)

    def attending(name: str, cut: attention.Cut) -> Specimen:
        one = known[name]
        label = f"{name}/{cut.queries}q{cut.keys}k{cut.warps}w{cut.stages}s{'a' if cut.apart else ''}"
        constants = {**one.constants, "BM": cut.queries, "BN": cut.keys} | ({"APART": cut.apart} if "APART" in one.constants else {})
        return replace(one, name=label, constants=constants, num_warps=cut.warps, num_stages=cut.stages)

    return (
        *(tiled("swiglu_gradients", tile) for tile in swiglu_gradients.TILES),
        *(tiled(name, tile) for name in ("outer", "outer_normed") for tile in outer.TILES),
        *map(swept, cross_entropy.SWEEPS),
        *map(cut, nf4.CUTS),
        *(attending(name, each) for name, cuts in attention.CANDIDATES.items() for each in cuts),
    )
