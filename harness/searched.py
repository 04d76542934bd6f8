"""What tune may try of one knob, and what is expected of it before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from harness.spec import Spec, parse

Factor = Annotated[float, Field(ge=0)]
Kind = Literal["seconds", "layers", "working", "logits"]
PROCESSES = "processes"  # searched beside the knobs, and none of them


class Searched(Spec):
    """The ``values`` of one knob; a list alone is values of which nothing is expected.

    The other lists stand beside ``values``, a number each (or one for all of them), other knobs equal. ``seconds``: of a step, a factor;
    ``layers``, ``working`` and ``logits``: of the bytes that a token takes in what all layers keep for backward, in the layer that is at
    work, and in the logits, factors, null where the engine fills what memory there is; ``startup``: seconds that compiling and capturing
    add once. Expectations only: each measured cell corrects them. But the order of the factors of bytes is taken as known: what runs out
    of memory rules out every cell that differs only towards more.
    """

    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)]
    seconds: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    layers: tuple[Factor | None, ...] | None = None
    working: tuple[Factor | None, ...] | None = None
    logits: tuple[Factor | None, ...] | None = None
    startup: tuple[float, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """A list alone is the values; one factor is that of all of them. Tuples: what a validator returns is no longer JSON."""
        if isinstance(raw, list | tuple):
            return {"values": tuple(raw)}
        if not isinstance(raw, dict) or not isinstance(raw.get("values"), list | tuple):
            return raw
        count = len(raw["values"])
        return {name: (numbers,) * count if isinstance(numbers, int | float) else _tuple(numbers) for name, numbers in raw.items()}

    @model_validator(mode="after")
    def _a_number_for_each_value(self) -> Searched:
        for name in ("seconds", "layers", "working", "logits", "startup"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != len(self.values):
                raise ValueError(f"{name} has {len(numbers)} numbers for {len(self.values)} values; give each value one")
        return self

    def factor(self, kind: Kind, value: JsonValue) -> float | None:
        """What is expected of ``value``: 1 where nothing is said; None where the engine fills what memory there is."""
        numbers = getattr(self, kind)
        return 1.0 if numbers is None else numbers[self.values.index(value)]

    def startup_seconds(self, value: JsonValue) -> float:
        """What ``value`` is expected to add to the start-up."""
        return 0.0 if self.startup is None else self.startup[self.values.index(value)]

    def among(self, values: Sequence[JsonValue]) -> Searched:
        """The same expectations of some of the values; of one that is not listed here nothing is expected."""
        known = [value for value in self.values if value in values]
        more = [value for value in values if value not in known]

        def numbers(name: str, otherwise: float) -> list[float | None] | None:
            mine = getattr(self, name)
            return None if mine is None else [*(mine[self.values.index(value)] for value in known), *(otherwise for _ in more)]

        kept = {"seconds": 1.0, "layers": 1.0, "working": 1.0, "logits": 1.0, "startup": 0.0}
        return parse(Searched, {"values": [*known, *more], **{name: numbers(name, otherwise) for name, otherwise in kept.items()}})


def _tuple(numbers: Any) -> Any:
    return tuple(numbers) if isinstance(numbers, list) else numbers
