"""Fixtures of the engines' tests."""

from __future__ import annotations

import pytest
import torch

from tests.engines.oracle import DTYPES


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found
