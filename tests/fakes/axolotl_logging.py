"""The engine axolotl with its own log at every step, as its examples have it: for the test of what that log says of a lost run."""

from __future__ import annotations

from typing import Any

from engines.axolotl import Knobs as Knobs
from engines.axolotl import requires as requires
from engines.axolotl import train as run
from engines.axolotl import unsupported as unsupported
from harness.engine import Job, Probe


def train(job: Job, knobs: Any, probe: Probe) -> None:
    """With ``logging_steps: 1``."""
    from engines.axolotl import settings

    usual = settings._schedule
    settings._schedule = lambda *given: {**usual(*given), "logging_steps": 1}
    try:
        run(job, knobs, probe)
    finally:
        settings._schedule = usual
