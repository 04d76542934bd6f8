"""The offline way to a peer's interpreter: folders of packages first, then what the host has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.interpreter import lack

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "peer_python.sh"


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)


def test_packages_of_the_folders_go_before_the_hosts(tmp_path: Path) -> None:
    for folder in ("own", "rest"):
        (tmp_path / folder / "made_up_peer").mkdir(parents=True)
        (tmp_path / folder / "made_up_peer" / "__init__.py").write_text(f"place = {folder!r}\n")
        information = tmp_path / folder / "made_up_peer-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-peer\nVersion: 1.0\n")
    done = make(tmp_path / "new", tmp_path / "own", tmp_path / "rest")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    python = str(tmp_path / "new" / "bin" / "python")
    assert lack(python, ("made-up-peer", "torch", "numpy")) is None
    code = "import made_up_peer, pydantic; print(made_up_peer.place)"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "own"


def test_mistakes_are_named(tmp_path: Path) -> None:
    for arguments, says in (((), "the folder of the new environment"), ((tmp_path / "new",), "no folder of packages")):
        done = make(*arguments)
        assert done.returncode != 0
        assert says in done.stderr
    done = make(tmp_path / "new", tmp_path / "absent")
    assert (done.returncode, "there is no such folder" in done.stderr) == (2, True)
