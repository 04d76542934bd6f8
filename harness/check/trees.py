"""The two trees of a check: this one and the base, each with the interpreter that runs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import ConfigError
from harness.store import commit_of, writing

Sharing = Literal["auto", "share", "own"]


@dataclass(frozen=True, slots=True)
class Tree:
    """``python`` runs the code at ``path``; ``name`` is what people call it, ``commit`` what its records must say (null: anything)."""

    name: str
    path: Path
    python: str
    commit: str | None = None
    notes: tuple[str, ...] = ()


def this_tree(path: Path) -> Tree:
    """The tree that this code belongs to, with our interpreter."""
    commit, dirty = commit_of(path)
    return Tree(_name("this tree", commit, dirty), path, sys.executable)


@contextlib.contextmanager
def base_tree(base: str, here: Path, work: Path, sharing: Sharing) -> Iterator[Tree]:
    """The tree that ``base`` names: a revision of the repository ``here`` (checked out below ``work`` for as long as the block lasts),
    or a folder. Raises ConfigError when it names neither, or its environment cannot be built.
    """
    commit = _git(here, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if commit is None:
        yield _with_python(_folder(base, here), here, work, sharing)
        return
    path = work / "trees" / commit[:12]
    with writing(work):
        path.parent.mkdir(parents=True, exist_ok=True)
    _drop(here, path)  # what a killed check left
    if _git(here, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", "--force", str(path), commit) is None:
        raise ConfigError(f"--base {base}: git could not check {commit[:12]} out at {path}; try: git worktree prune")
    try:
        _check_tree(path, f"--base {base}")
        yield _with_python(Tree(f"{base} ({commit[:12]})", path, sys.executable, commit), here, work, sharing)
    finally:
        _drop(here, path)


def dependencies_sha256(tree: Path) -> str:
    """Hash of everything that decides what is installed for ``tree``. Raises ConfigError when it is no source tree."""
    try:
        content = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{tree}: no readable pyproject.toml ({error}); a check needs two source trees, run it in a clone") from error
    project = content.get("project", {})
    digest = hashlib.sha256(json.dumps([project.get("requires-python"), sorted(project.get("dependencies", []))]).encode())
    for path in sorted((tree / "requirements").glob("*.txt")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _folder(base: str, here: Path) -> Tree:
    path = Path(base).expanduser().resolve()
    if not path.is_dir():
        inside = _git(here, "rev-parse", "--is-inside-work-tree") is not None
        why = "in a shallow clone fetch more history: git fetch --deepen=50" if inside else f"git knows no repository at {here}"
        raise ConfigError(f"--base {base}: no such revision, and no such folder; {why}")
    _check_tree(path, f"--base {base}")
    commit, dirty = commit_of(path)
    return Tree(_name(base, commit, dirty), path, sys.executable)


def _name(what: str, commit: str, dirty: bool) -> str:
    if commit == "unknown":
        return what
    return f"{what} ({commit[:12]}{' with local changes' if dirty else ''})"


def _check_tree(path: Path, what: str) -> None:
    if not (path / "harness" / "__main__.py").is_file():
        raise ConfigError(f"{what}: there is no harness in it; name a revision or folder of engine-room")


def _with_python(tree: Tree, here: Path, work: Path, sharing: Sharing) -> Tree:
    """Ours where both trees depend on the same; otherwise an environment of its own, built as the tree's Makefile builds one."""
    differ = dependencies_sha256(tree.path) != dependencies_sha256(here)
    if sharing == "share" or (sharing == "auto" and not differ):
        note = ("the base wants other dependencies than this tree and ran with ours",) if differ else ()
        return Tree(tree.name, tree.path, tree.python, tree.commit, note)
    environment = work / "environments" / dependencies_sha256(tree.path)[:12]
    print(f"building the environment of the base: {environment} (minutes; kept for the next check)", flush=True)
    command = ["make", "-C", str(tree.path), f"VENV={environment}", f"PYTHON={sys.executable}", str(environment / ".installed")]
    with writing(work):
        environment.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"make does not run ({error.strerror}); install it, or use --environment share") from error
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise ConfigError(f"the environment of the base could not be built; use --environment share, or build it by hand:\n{said}")
    return Tree(tree.name, tree.path, str(environment / "bin" / "python"), tree.commit)


def _drop(here: Path, path: Path) -> None:
    _git(here, "worktree", "remove", "--force", str(path))
    shutil.rmtree(path, ignore_errors=True)
    _git(here, "worktree", "prune")


def _git(tree: Path, *arguments: str) -> str | None:
    """What git printed, None when it refused or there is none."""
    try:
        done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
