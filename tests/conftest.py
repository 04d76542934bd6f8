"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import workloads


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of base weights and token files for the whole session, never the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> workloads.Made:
    """A workload whose artifacts were made by hand: no torch, no tokenizer."""
    return workloads.make(tmp_path_factory.mktemp("prepared"))
