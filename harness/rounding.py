"""How far rounding alone moves a first loss: exact facts about a base and the tokens of one step, named by their content like scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from harness.spec import Spec

ROUNDING_SCHEMA: Literal[1] = 1


class Rounding(Spec):
    """The mean loss of a base over the supervised tokens of one step: ``exact`` in fp32, ``rounded`` in bf16 as often as its hidden and
    inner dimensions, and with them all sums, were put in another order.

    ``rounded`` is empty where that changed the function: its layers have dimensions that are not known.
    """

    schema_version: Literal[1] = ROUNDING_SCHEMA
    base_sha256: str
    stream_sha256: str
    exact: float
    rounded: tuple[float, ...]
    evaluator: str


RoundingKey = tuple[str, str]  # base, tokens of the step
Roundings = Mapping[RoundingKey, Rounding]
