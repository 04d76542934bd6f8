"""``python -m engines.native.ahead``: compile every kernel for every kind of GPU, without one; refuse spills and too much shared memory."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engines.native.specimens import Specimen, candidates, specimens

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
class Compiled:
    """What one kernel takes on one target; ``problem`` says why that is too much."""

    name: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    problem: str | None


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
