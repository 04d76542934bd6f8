"""An engine's fingerprint follows its source, what it imports below its own package, and the versions of the packages it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.fingerprint import engine_fingerprint


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"made_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    (folder / "shelf").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "shelf" / "__init__.py").write_text("")
    (folder / "engine.py").write_text(f"def train():\n    from {name}.shelf import kernel\n    import json\n")
    (folder / "shelf" / "kernel.py").write_text("x = 1\n")
    (folder / "other.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_what_is_imported_counts_and_what_is_not_does_not(package: Path) -> None:
    def current() -> str:
        return engine_fingerprint(f"{package.name}.engine", None, ("numpy",))

    first = current()
    (package / "other.py").write_text("y = 2\n")
    assert current() == first
    (package / "shelf" / "kernel.py").write_text("x = 2\n")
    assert current() != first
    second = current()
    (package / "shelf" / "table.json").write_text("{}")
    assert current() != second, "what a package reads beside its code counts too"
    assert engine_fingerprint(f"{package.name}.engine", None, ("numpy", "pydantic")) != current()
