"""How much time a search has: whether another run is begun, and when one that was begun is stopped."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config import Request
from harness.fingerprint import engine_fingerprint
from harness.record import Record

_GRACE_SECONDS = 60.0
_FIRST_GRACE_SECONDS = 180.0  # nobody knows how long it takes to start here, and without it there is no answer at all
_LOST = 1.5  # of the best: times vary
_ABOUT = 0.8  # the same search, resumed, has a little more or less of its budget left at the same place


@dataclass(frozen=True, slots=True)
class Budget:
    """``seconds``: of wall time, None: as much as it takes. ``expected`` is of the next run, ``spent`` of all before."""

    seconds: float | None

    def too_late(self, expected: float, spent: float, *, num_looked: int, ran: bool) -> str | None:
        """Why there is no time for a run; None where there is, and for the first: a budget too short for one run is of no use. As long as
        nothing ``ran``, nothing tells what fits into the rest.
        """
        if self.seconds is None or not num_looked or spent + expected <= self.seconds:
            return None
        if not ran:
            return None if spent < self.seconds else f"the budget is spent, and none of {num_looked} runs gave a time"
        return f"the next run would take about {expected:.0f} s, and {max(0.0, self.seconds - spent):.0f} s of the budget are left"

    def allowed(self, expected: float, spent: float, best: float | None) -> float | None:
        """Seconds after which a run is stopped, whatever comes of it: one may overrun the budget by what it was expected to take, or by a
        minute, and by more as long as nothing ran. A look that takes well longer than the whole of the ``best`` run so far has lost.
        """
        least = _GRACE_SECONDS if best is not None else _FIRST_GRACE_SECONDS
        limits = [] if self.seconds is None else [max(0.0, self.seconds - spent) + max(expected, least)]
        limits += [] if best is None else [max(_LOST * best, least)]
        return min(limits, default=None)


def stopped_after(asked: Request, seconds: float | None) -> Request:
    """``asked`` with the shorter of its own limit and ``seconds``."""
    limits = [limit for limit in (asked.limits.wall_seconds, seconds) if limit is not None]
    return asked.model_copy(update={"limits": asked.limits.model_copy(update={"wall_seconds": min(limits, default=None)})})


def would_stop_again(asked: Request, record: Record) -> bool:
    """Whether ``record``, of the same code, was stopped for taking about as long as ``asked`` may take at most."""
    limit, engine = asked.limits.wall_seconds, asked.cell.engine
    if record.status != "timeout" or limit is None or record.provenance.wall_seconds < _ABOUT * limit:
        return False
    return record.provenance.engine_fingerprint == engine_fingerprint(engine.module, asked.python, asked.packages)
