"""``python -m harness.doctor``: what this machine can run and what to do about the rest, the doctor's own packages first."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness.exits import leave_with


def main(arguments: Sequence[str] | None = None) -> int:
    """See ``harness.doctor.command.run``; 1 as well when the doctor itself cannot start."""
    try:
        from harness.doctor.command import run
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        remedy = "use the project's environment (.venv/bin/python), or build it: make demo"
        print(f"problem: {sys.executable} lacks the package '{name}', so nothing can run\n→ {remedy}", file=sys.stderr)
        return 1
    return run(arguments)


if __name__ == "__main__":
    leave_with(main)
