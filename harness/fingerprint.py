"""What an engine's figures depend on beside the cell: its source files and the packages it names, hashed without importing them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from harness.interpreter import interpreter


def engine_fingerprint(module: str, python: str | None, names: tuple[str, ...]) -> str:
    """12 hex digits over the source of ``module``, of all that it imports below its top-level package, and its packages' versions."""
    _, packages = interpreter(python, names)
    digest = hashlib.sha256(json.dumps(packages, sort_keys=True).encode())
    for name, path in sorted(_sources(module).items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


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
        if path.name == "__init__.py":  # what a package reads beside its code, as engines.native.tiles does
            found |= {f"{name}/{file.name}": file for file in path.parent.glob("*.json")}
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
