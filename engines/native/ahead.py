"""``python -m engines.native.ahead``: compile every kernel for every kind of GPU, without one; refuse spills and too much shared memory."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engines.native import eight_bit
from engines.native.kernels import (
    adamw,
    adamw_full,
    cross_entropy,
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
from engines.native.kernels.launching import Tile

# Shared memory that one block may use, bytes (CUDA C++ Programming Guide, compute capabilities; CDNA 3 whitepaper).
TARGETS: Mapping[str, tuple[GPUTarget, int]] = {
    "sm_75": (GPUTarget("cuda", 75, 32), 64 * 1024),
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
_DTYPES = {"h": "*bf16", "f": "*fp32", "i": "*i32", "l": "*i64", "b": "*u8", "c": "*i8", "s": "*i16", "e": "*fp8e4nv"}
_WITHOUT_E4M3 = ("sm_75", "sm_80", "sm_86", "gfx942")  # gfx942 has another e4m3, with other bits


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


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel takes on one target; ``problem`` says why that is too much."""

    name: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    problem: str | None


def specimens() -> tuple[Specimen, ...]:
    """Every kernel of engines.native.kernels."""
    row = {"BLOCK": 4096, "P": 64, "PAD": 64}
    columns = {"BLOCK": 1024, "P": 64, "PAD": 64}
    heads = {"HALF": 64, "BLOCK": 64, "HEADS": 8}
    thin = dict.fromkeys(("x", "thin", "weight"), "h") | {"inverse": "f", "partial": "f", "arrived": "i", "gradient": "f"}
    sums = dict.fromkeys(("partial", "d_input", "d_outputs"), "f") | {"arrived": "i"}
    tile = {"BT": 128, "BN": 64, "BR": 16}
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
        Specimen("swiglu", swiglu._swiglu_forward, {"gate_up": "h", "h": "h"}, columns, 4),
        Specimen("swiglu_backward", swiglu._swiglu_backward, {"dh": "h", "gate_up": "h"}, columns, 4),
        Specimen(
            "swiglu_gradients", swiglu_gradients._swiglu_gradients, dict.fromkeys(("dh", "gate_up", "thin", "low"), "h") | sums,
            {"SPLITS": 3, **tile, "BT": swiglu_gradients.TILE.tokens, "P": 64, "PAD": 64}, swiglu_gradients.TILE.warps,
            odd=("R", "input_column_stride"), has_dot=True,
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
        Specimen("outer", outer._outer, thin, {"SPLITS": 2, "NORMED": False, **tile}, 4, odd=("R", "rank_stride"), has_dot=True),
        Specimen("outer_normed", outer._outer, thin, {"SPLITS": 9, "NORMED": True, **tile}, 4, odd=("R", "rank_stride"), has_dot=True),
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
            {"BT": norm_weight.TILE.tokens, "BN": norm_weight.COLUMNS}, norm_weight.TILE.warps,
        ),
        Specimen("normed_again", norm_weight._normed_again, {"x": "h", "w": "h", "inverse": "f", "y": "h"}, {"BLOCK": 4096}, 8),
        Specimen(
            "decode_nf4", nf4._decode_nf4,
            {"packed": "b", "absmax": "b", "nested": "f", "code": "f", "levels": "f", "out": "h"},
            {"BLOCKS": nf4.CUT.blocks, "BLOCK": 64, "NESTED": 256, "WHOLE": True, "KEPT": tl.bfloat16}, nf4.CUT.warps, ("offset",),
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
        return replace(
            one, name=f"decode_nf4/{each.blocks}b{each.warps}w", constants={**one.constants, "BLOCKS": each.blocks}, num_warps=each.warps
        )

    return (
        *(tiled("swiglu_gradients", tile) for tile in swiglu_gradients.TILES),
        *(tiled(name, tile) for name in ("outer", "outer_normed") for tile in outer.TILES),
        *map(swept, cross_entropy.SWEEPS),
        *map(cut, nf4.CUTS),
    )


def compile_for(specimen: Specimen, target: str) -> Compiled:
    """Compile one kernel. Raises what Triton raises when it cannot."""
    gpu, most_shared = TARGETS[target]
    names = specimen.kernel.arg_names
    signature = {name: _type(specimen, name) for name in names}
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    even = [name for name in names if (signature[name] == "i32" and name not in specimen.odd) or signature[name].startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    stages = specimen.num_stages or (3 if gpu.backend == "cuda" else 2)
    options = {"num_warps": specimen.num_warps, "num_stages": stages, "enable_fp_fusion": specimen.contracts}
    made = triton.compile(ASTSource(specimen.kernel, signature, constants, attributes), target=gpu, options=options)
    registers, spilled = _usage_of_cubin(made) if gpu.backend == "cuda" else _usage_of_hsaco(made)
    shared = int(made.metadata.shared)
    problem = f"spills {spilled} bytes" if spilled else None
    if shared > most_shared:
        problem = f"needs {shared} bytes of shared memory, there are {most_shared}"
    if "e" in specimen.pointers.values() and _unpacks_stack(made):
        problem = "unpacks e4m3 from R1, which is the stack's: a fault of ptxas; do not convert to e4m3 and back"
    return Compiled(specimen.name, target, registers, spilled, shared, problem)


def _type(specimen: Specimen, name: str) -> str:
    if name in specimen.constants:
        return "constexpr"
    if name in specimen.pointers:
        return _DTYPES[specimen.pointers[name]]
    return "fp32" if name in specimen.scalars else "i32"


def _usage_of_cubin(made: Any) -> tuple[int, int]:
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", ["-res-usage"], made))}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _unpacks_stack(made: Any) -> bool:
    return re.search(r"E4M3\.UNPACK_B\S* R\d+, R1\b", _tool("nvdisasm", ["-c"], made)) is not None


def _tool(name: str, options: Sequence[str], made: Any) -> str:
    """What one of Triton's own NVIDIA tools says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True).stdout


def _usage_of_hsaco(made: Any) -> tuple[int, int]:
    said = made.asm["amdgcn"]
    counts = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", said)}
    return counts["vgpr_count"], 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])


def compile_all(targets: Sequence[str], what: Sequence[Specimen]) -> Iterator[Compiled]:
    """Every kernel of ``what`` for each of ``targets`` that can run it."""
    for target in targets:
        for specimen in what:
            if not ((specimen.has_dot and target == "sm_75") or ("e" in specimen.pointers.values() and target in _WITHOUT_E4M3)):
                yield compile_for(specimen, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each kernel and target; returns 1 when one of them spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m engines.native.ahead", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all of them by default")
    parser.add_argument("--candidates", action="store_true", help="the cuts that bench_kernels --tune may choose, not the defaults")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    failed = 0
    for made in compile_all(options.targets or tuple(TARGETS), candidates() if options.candidates else specimens()):
        failed += made.problem is not None
        print(f"{made.target:<7} {made.name:<18} {made.registers:>4} registers {made.shared_bytes:>7} bytes shared  {made.problem or 'ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
