"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from harness.machine import has_cuda
from harness.places import Sources
from harness.weights.base_model import Base, prepare_base
from tests import workloads
from tests.real_files import model

# The same draws in every run, however slow it is: a commit passes or fails, luck has no say.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)  # HYPOTHESIS_PROFILE=explore looks for what those draws do not show
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if not has_cuda():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: the tests run every kernel, on a CPU by the interpreter


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of base weights and token files for the whole session, never the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> workloads.Made:
    """A workload whose artifacts were made by hand: no torch, no tokenizer."""
    return workloads.make(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Base:
    return prepare_base(model(), Sources(), cache)


@pytest.fixture
def folder(tiny: Base, tmp_path: Path) -> Path:
    """A complete model of its own, as one would have from save_pretrained."""
    shutil.copytree(tiny.path, tmp_path / "own", ignore=shutil.ignore_patterns("manifest.json"))
    return tmp_path / "own"
