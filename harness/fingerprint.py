"""What an engine's figures depend on beside the cell: its source files and the packages it names, hashed without importing them."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from harness.errors import ConfigError

_VERSIONS = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps([platform.python_version(), found]))
"""


def engine_fingerprint(module: str, python: str | None, names: tuple[str, ...]) -> str:
    """12 hex digits over the source of ``module``, of all that it imports below its top-level package, and its packages' versions."""
    _, packages = interpreter(python, names)
    digest = hashlib.sha256(json.dumps(packages, sort_keys=True).encode())
    for name, path in sorted(_sources(module).items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=32)
def interpreter(python: str | None, names: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The version of the interpreter ``python`` (None: ours) and those of the installed ones of the packages ``names``."""
    if python is None:
        return platform.python_version(), dict(_installed(names))
    command = [python, "-c", _VERSIONS, *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
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


def _sources(module: str) -> dict[str, Path]:
    """The files of ``module`` and of what it imports below the same top-level package, followed to the end."""
    top = module.partition(".")[0]
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += [target for target in _imports(path) if target.split(".")[0] == top]
    return found


def _path(module: str) -> Path | None:
    """Found without importing the packages above it, as ``find_spec`` of a dotted name does: planning must not load torch."""
    top, *names = module.split(".")
    spec = importlib.util.find_spec(top)
    for name in names:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{name}", spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(path: Path) -> Iterator[str]:
    """Every module name that ``path`` imports, at any depth; ``from a import b`` may mean the module a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from _submodules(node.module, [alias.name for alias in node.names])


def _submodules(module: str, names: Sequence[str]) -> list[str]:
    return [f"{module}.{name}" for name in names]
