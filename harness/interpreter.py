"""The Python that runs an engine: where it lies, whether it is there, and what is installed in it."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError

TREE = Path(__file__).resolve().parent.parent
ABSENT = "absent"  # instead of a version, where there is no interpreter
_VERSIONS = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps([platform.python_version(), found]))
"""


@dataclass(frozen=True, slots=True)
class Lack:
    """Why an engine cannot start in its interpreter, and what to do about it."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def located(python: str | None) -> str | None:
    """``engine.python`` as an absolute path: a relative one starts at this tree, a bare name is looked for on PATH; None stays None."""
    if python is None:
        return None
    path = Path(python).expanduser()
    if len(path.parts) == 1:
        return shutil.which(python) or python
    return str(TREE / path)  # not resolved: the link in an environment's bin is what makes it that environment


def environment(python: str | None) -> dict[str, str]:
    """Environment variables for ``python`` to find this tree. PYTHONPATH is our interpreter's: another one has packages of its own."""
    ours = os.environ.get("PYTHONPATH") if python is None else None
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TREE), *filter(None, [ours])])}


def lack(python: str | None, required: Sequence[str]) -> Lack | None:
    """What keeps an engine that needs the packages ``required`` from starting in ``python`` (None: ours); None when nothing does."""
    if python is not None and shutil.which(python) is None:
        return Lack(f"there is no {_shown(python)}", _remedy(python, required))
    _, found = interpreter(python, tuple(required))
    missing = ", ".join(name for name in required if name not in found)
    return Lack(f"{missing} is not installed in {_shown(python)}", _remedy(python, required)) if missing else None


@functools.lru_cache(maxsize=32)
def interpreter(python: str | None, names: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
    """The version of the interpreter ``python`` (None: ours) and those of the installed ones of the packages ``names``.

    Where there is none the version is :data:`ABSENT`; one that does not run is a ConfigError.
    """
    if python is None:
        return platform.python_version(), dict(_installed(names))
    if shutil.which(python) is None:
        return ABSENT, {}
    command = [python, "-c", _VERSIONS, *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment(python))
        version, packages = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"engine.python: '{python}' does not run ({error}); build the engine's environment or correct the path"
        ) from error
    return version, packages


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _shown(python: str | None) -> str:
    """As a configuration would name it: what lies in this tree without the tree's own path."""
    path = Path(python or sys.executable)
    return str(path.relative_to(TREE)) if python and path.is_relative_to(TREE) else str(path)


def _remedy(python: str | None, required: Sequence[str]) -> str:
    if python is None:
        return f"pip install {' '.join(required)}"
    if Path(python).is_relative_to(TREE):
        return "run: make peers"
    packages = f" with {', '.join(required)}" if required else ""
    return f"build that environment{packages}, or correct engine.python"
