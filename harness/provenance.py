"""Where and from what a record comes, noted before the cell starts."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from harness.config import Request
from harness.endings import TREE
from harness.fingerprint import engine_fingerprint
from harness.interpreter import interpreter
from harness.machine import driver_version, host_id
from harness.record import Provenance, Record
from harness.store import commit_of


def provenance(request: Request, sweep: str | None = None) -> Provenance:
    """As it is now, before the start: the tree may change while a cell runs."""
    commit, dirty = commit_of(TREE)
    python, packages = interpreter(request.python, request.packages)
    return Provenance(
        started_utc=_stamp(datetime.now(UTC)),
        wall_seconds=0.0,
        commit=commit,
        dirty=dirty,
        engine_fingerprint=engine_fingerprint(request.cell.engine.module, request.python, request.packages),
        python=python,
        packages=dict(packages),
        driver=driver_version() if request.machine.device == "cuda" else None,
        sweep=sweep,
        price=request.machine.price,
        host=f"{host_id()} {platform.system()} {platform.release().partition('-')[0]}",
    )


def dated(provenance: Provenance, earlier: Sequence[Record]) -> tuple[Provenance, tuple[str, ...]]:
    """Records of a cell are told apart and ordered by their start: when the clock went back, one is dated just after the one before."""
    newest = max((record.provenance.started_utc for record in earlier), default="")
    if provenance.started_utc > newest:
        return provenance, ()
    note = f"the clock said {provenance.started_utc}, before the start of the record that was made before: dated just after that one"
    after = _stamp(datetime.fromisoformat(newest) + timedelta(milliseconds=1))
    return provenance.model_copy(update={"started_utc": after}), (note,)


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
