"""What a check measures when the command line names no work, and how it judges: ``conf/check.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from harness.errors import ConfigError
from harness.spec import Fraction, Spec, parse

FILE = Path(__file__).resolve().parent.parent.parent / "conf" / "check.yaml"


class Tolerances(Spec):
    """By what share a count may rise before it is a regression; 0: not at all."""

    memory: Fraction
    operations: Fraction
    kernels: Fraction
    launches: Fraction


class RunNoise(Spec):
    """By how much runs of the same tree differ: measured by checks of a tree against itself (docs/method.md)."""

    cpu: Annotated[float, Field(gt=0, lt=0.2)]
    cuda: Annotated[float, Field(gt=0, lt=0.2)]

    def of(self, device: str) -> float:
        """On ``device``, ``cpu`` or ``cuda``."""
        return self.cuda if device == "cuda" else self.cpu


class CheckSettings(Spec):
    """``workload``: overrides that stand in for an empty command line. ``pairs``: runs of each tree, null as many as the simulation asks
    for. ``run_noise``: the standard deviation of the logarithm of a run's median step that it assumes, by device. ``drift``: the most by
    which a machine may differ from itself between two sittings.
    """

    workload: Annotated[tuple[str, ...], Field(min_length=1)]
    pairs: Annotated[int, Field(ge=3)] | None
    run_noise: RunNoise
    drift: Fraction
    tolerances: Tolerances


def read_settings(path: Path = FILE) -> CheckSettings:
    """The settings in ``path``. Raises ConfigError when it is not there or wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; restore it from git") from error
    return parse(CheckSettings, raw)
