"""Packages, and whether torch and Triton work: found out in a child process, so that a broken one cannot take the doctor with it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from harness.doctor.finding import Finding
from harness.doctor.hardware import driver_cuda
from harness.machine import nvml

TREE = Path(__file__).resolve().parent.parent.parent
PROBE_SECONDS = 300  # importing torch from a cold network disk has taken two minutes
REINSTALL = "run: make clean, then make demo"
_FEW = 0.05  # of the modules that torch imports: ours may lie where nothing can be written
OPTIONAL: Mapping[str, str] = {
    "liger-kernel": "engine.knobs.kernels=liger of hf",
    "flash-attn": "engine.knobs.attention=flash_attention_2 of hf",
    "bitsandbytes": "method=qlora of hf in bfloat16, and its optimizer=adamw_8bit",
    "deepspeed": "sharded training over several GPUs",
}


def software_findings(python: str = sys.executable) -> list[Finding]:
    """Torch and Triton as ``python`` runs them, and this environment's packages."""
    return [*torch_findings(python), triton_finding(python), *package_findings()]


def torch_findings(python: str) -> list[Finding]:
    """Torch's build, and whether it fits the driver and the GPUs."""
    facts = _probe(python, "torch")
    if isinstance(facts, str):
        return [Finding("software", "torch", "problem", f"does not work: {facts}", REINSTALL, blocks=True)]
    with nvml() as library:
        speaks = driver_cuda(library) if library and library.nvmlDeviceGetCount() else None
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "a CPU build"
    found = f"{facts['version']}, {build}"
    works = Finding("software", "torch", "ok", found) if speaks is None else _torch_on_gpu(facts, found, speaks)
    return [works, *_bytecode_finding(facts)]


def _bytecode_finding(facts: Mapping[str, Any]) -> list[Finding]:
    """Images are made smaller by leaving bytecode out, and forbid to write it; then every start of an engine compiles all it imports."""
    if facts["without_bytecode"] <= _FEW * facts["sources"]:
        return []
    found = (
        f"{facts['without_bytecode']:,} of the {facts['sources']:,} modules that torch imports are compiled again in every process: "
        "imports take two to three times as long"
    )
    remedy = "unset PYTHONDONTWRITEBYTECODE, and export PYTHONPYCACHEPREFIX=FOLDER where the packages' own folders cannot be written"
    return [Finding("software", "bytecode", "note", found, remedy)]


def _torch_on_gpu(facts: Mapping[str, Any], found: str, speaks: tuple[int, int]) -> Finding:
    newest = f"{speaks[0]}.{speaks[1]}"
    install = (
        f"make clean, then make demo TORCH='torch --index-url URL' with a build for CUDA {newest} or older (see pytorch.org/get-started)"
    )
    if not facts["cuda"]:
        return Finding("software", "torch", "problem", f"{found}, but there is a GPU", f"{install}, or choose machine=cpu", blocks=True)
    if int(facts["cuda"].split(".")[0]) > speaks[0]:
        text = f"{found}, newer than the driver, which speaks CUDA {newest}"
        return Finding("software", "torch", "problem", text, f"update NVIDIA's driver, or {install}", blocks=True)
    if not facts["usable"]:
        remedy = "look at CUDA_VISIBLE_DEVICES, at the rights on /dev/nvidia*, and at nvidia-smi; machine=cpu runs without the GPU"
        return Finding("software", "torch", "problem", f"{found}, but it finds no GPU that NVML sees", remedy, blocks=True)
    return _torch_for_devices(facts, f"{found}, uses {len(facts['devices'])} GPU(s)", install)


def _torch_for_devices(facts: Mapping[str, Any], found: str, install: str) -> Finding:
    """``sm_…`` code runs on later devices of the same major number; ``compute_…`` is compiled on the spot for any later one."""
    kinds = [name.partition("_") for name in facts["architectures"]]
    built = [(kind, int(number[:-1]), int(number[-1])) for kind, _, number in kinds if number.isdigit()]
    for major, minor in facts["devices"]:
        here = [
            one
            for one in built
            if (one[0] == "compute" and one[1:] <= (major, minor)) or (one[0] == "sm" and one[1] == major and one[2] <= minor)
        ]
        if built and not here:
            text = f"{found}, but has no code for compute capability {major}.{minor}"
            return Finding("software", "torch", "problem", text, install, blocks=True)
    return Finding("software", "torch", "ok", found)


def triton_finding(python: str) -> Finding:
    """Whether a kernel runs: compiled on a GPU, in Triton's interpreter without one."""
    with nvml() as library:
        on_gpu = bool(library and library.nvmlDeviceGetCount())
    facts = _probe(python, "triton", {} if on_gpu else {"TRITON_INTERPRET": "1"})
    remedy = (
        "compiled kernels (engine=fused) do not work without it: install the version that torch names, and a C compiler for its launcher"
    )
    if isinstance(facts, str):
        return Finding("software", "triton", "problem", f"does not work: {facts}", remedy)
    how = (
        "compiles and runs a kernel on the GPU" if facts["device"] == "cuda" else "runs a kernel in its interpreter (no GPU to compile for)"
    )
    if not facts["right"]:
        return Finding("software", "triton", "problem", f"{facts['version']} {how}, but computes it wrong", remedy)
    return Finding("software", "triton", "ok", f"{facts['version']} {how}")


def package_findings() -> list[Finding]:
    """What the project requires, in one line when all is there; what it can use besides, each in its own."""
    return [_required(), *(_optional(name, use) for name, use in OPTIONAL.items())]


def _required() -> Finding:
    wanted = [one for one in map(Requirement, _requirements()) if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [text for one in wanted if (text := _unmet(one))]
    if wrong:
        remedy = "pip install --editable . --constraint requirements/constraints.txt"
        return Finding("software", "packages", "problem", "; ".join(wrong), remedy, blocks=True)
    shown = ", ".join(f"{name} {_version(name)}" for name in ("transformers", "peft", "accelerate"))
    return Finding("software", "packages", "ok", f"all {len(wanted)} that are required; {shown}")


def _requirements() -> list[str]:
    """Of the tree we run from; what was installed may be older than it. A wheel has no tree."""
    project = TREE / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return importlib.metadata.requires("engine-room") or []


def _unmet(wanted: Requirement) -> str | None:
    version = _version(wanted.name)
    if version is None:
        return f"{wanted.name} is missing"
    return None if wanted.specifier.contains(version, prereleases=True) else f"{wanted.name} is {version}, required {wanted.specifier}"


def _optional(name: str, use: str) -> Finding:
    version = _version(name)
    if version:
        return Finding("software", name, "ok", version)
    return Finding("software", name, "note", "not installed", f"only for {use}: pip install {name}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(python: str, what: str, environment: Mapping[str, str] | None = None) -> dict[str, Any] | str:
    """The facts that ``python`` finds, or in a line why it finds none."""
    path = os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command: Sequence[str] = [python, "-m", "harness.doctor.probes", what]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
    except OSError as error:
        return f"{python} does not start ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"no answer after {PROBE_SECONDS} s"
    if done.returncode == 0:
        return _facts(done.stdout)
    said = done.stderr.strip().splitlines()
    return (
        said[-1]
        if said and done.returncode > 0
        else f"its process ended with {'signal' if done.returncode < 0 else 'exit code'} {abs(done.returncode)}"
    )


def _facts(said: str) -> dict[str, Any] | str:
    """The last line as facts: warnings may stand above it."""
    try:
        return dict(json.loads(said.splitlines()[-1]))
    except (ValueError, IndexError):
        return "its process said nothing that can be read"
