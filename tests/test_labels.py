"""What variants are called beside each other: by what differs."""

from __future__ import annotations

import pytest

from harness.labels import labels
from harness.spec import EngineSpec
from tests.records import engine


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([engine("hf"), engine("fused")], ("hf", "fused")),
        ([engine("a", micro_batch=1), engine("a", micro_batch=8)], ("a micro_batch=1", "a micro_batch=8")),
        ([engine("a", micro_batch=1), engine("b", micro_batch=8)], ("a", "b")),
        ([engine("a", processes=1), engine("a", processes=2)], ("a processes=1", "a processes=2")),
        ([engine("a"), engine("a", environment={"X": "1"})], ("a environment.X=unset", "a environment.X=1")),
        ([engine("a", plan={"x": 1, "y": 2}), engine("a", plan={"x": 1, "y": 3})], ("a plan.y=2", "a plan.y=3")),
        ([engine("a", on=True), engine("a", on=None)], ("a on=true", "a")),
        ([engine("a", mode="fast"), engine("a", mode="safe")], ("a mode=fast", "a mode=safe")),
    ],
)
def test_labels_say_what_differs_within_an_engine(specs: list[EngineSpec], expected: tuple[str, ...]) -> None:
    assert labels(specs) == expected
