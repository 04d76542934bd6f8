"""``train.epochs``: so many passes over the prepared samples, as the optimizer steps that every engine and every record sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from harness.errors import ConfigError

MANY = 10**9  # steps of a run whose samples are not counted yet: any warm-up is shorter


def take_epochs(train: dict[str, Any], given: Sequence[str]) -> float | None:
    """``epochs`` out of the composed values of ``train``; None where the run is given in steps.

    Epochs displace the steps of a YAML. ``given``: the overrides; both among them, or neither anywhere, is a ConfigError.
    """
    epochs = train.pop("epochs", None)
    if epochs is None:
        if train.get("steps") is None:
            raise ConfigError("train.steps and train.epochs are both null; give one: train.epochs=3, or train.steps=200")
        return None
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
        raise ConfigError(f"train.epochs: got {epochs!r}; expected a number above 0, as 3 or 0.5")
    steps = [line for line in given if line.lstrip("+").startswith("train.steps=") and not line.endswith("=null")]
    if steps:
        raise ConfigError(f"train.epochs={epochs:g} and {steps[-1]}: both say how long to train; give one of them")
    train["steps"] = MANY
    return float(epochs)


def num_steps(epochs: float, num_samples: int, samples_per_step: int) -> int:
    """Steps after which every sample has come ``epochs`` times: samples are drawn epoch after epoch without a gap, so the last step is
    filled up with the first samples of the next epoch (fewer than ``samples_per_step`` of them).
    """
    return math.ceil(Fraction(str(epochs)) * num_samples / samples_per_step)
