"""Parameters with Gaussian priors, corrected by observations of smooth functions of them (damped Gauss-Newton, Laplace approximation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Function = Callable[[Floats], tuple[Floats, Floats]]
"""From parameters [P] to values [N] and their derivatives [N, P]."""

_ROUNDS = 60
_CLOSE = 1e-6
_DAMPING = 1e-3  # of the first step (Levenberg-Marquardt)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """``mean`` [P] and ``covariance`` [P, P]."""

    mean: Floats
    covariance: Floats

    def of(self, function: Function) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the values of ``function``, to first order."""
        values, slopes = function(self.mean)
        return values, np.sqrt(np.maximum(np.einsum("np,np->n", slopes @ self.covariance, slopes), 0.0))


def independent(parameters: Mapping[str, tuple[float, float]]) -> Gaussian:
    """A prior: the mean and the deviation of each of ``parameters``."""
    means, deviations = (np.array(column) for column in zip(*parameters.values(), strict=True))
    return Gaussian(means, np.diag(deviations**2))


def corrected(prior: Gaussian, function: Function, observed: Floats, deviation: Floats, at_least: npt.NDArray[np.bool_]) -> Gaussian:
    """``prior`` after ``observed`` values [N] with their ``deviation`` [N]; where ``at_least``, the value is only known not to be less."""
    if not len(observed):
        return prior
    precision: Floats = np.linalg.inv(prior.covariance)

    def linearised(mean: Floats) -> tuple[float, Floats, Floats]:
        """The cost, and the equations of the step from here."""
        values, slopes = function(mean)
        off, away = observed - values, mean - prior.mean
        weight = np.where(at_least & (off <= 0), 0.0, deviation**-2.0)
        cost = float(off**2 @ weight + away @ precision @ away)
        return cost, precision + slopes.T @ (weight[:, None] * slopes), slopes.T @ (weight * off) - precision @ away

    mean, damping = prior.mean, _DAMPING
    cost, information, pull = linearised(mean)
    for _ in range(_ROUNDS):
        step = np.linalg.solve(information + damping * np.diag(np.diag(information)), pull)
        trial = linearised(mean + step)
        if trial[0] > cost:  # too far for a straight line: a shorter step
            damping *= 10
            continue
        mean, damping = mean + step, damping / 10
        cost, information, pull = trial
        if np.max(np.abs(step)) < _CLOSE:
            break
    return Gaussian(mean, np.linalg.inv(information))


@dataclass(frozen=True, slots=True)
class Prediction:
    """A positive quantity: its middle, and the deviation of its logarithm."""

    middle: float
    deviation: float

    def low(self, deviations: float) -> float:
        """So many deviations below the middle."""
        return float(self.middle * np.exp(-deviations * self.deviation))

    def high(self, deviations: float) -> float:
        """So many deviations above the middle."""
        return float(self.middle * np.exp(deviations * self.deviation))
