"""Fixtures of the engines' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.engines.oracle import DTYPES


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_luck() -> Iterator[None]:
    """On a CPU, fresh memory is mostly zero, on a GPU it is what somebody left: here it is NaN."""
    if torch.cuda.is_available():  # where deterministic algorithms are others
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found
