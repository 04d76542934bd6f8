"""The peers as ``conf/engine`` describes them, for the tests that run their own packages."""

from __future__ import annotations

from typing import Any

import pytest

from harness.compose import compose_one, plain
from harness.engine import requires
from harness.interpreter import environment, lack, located
from tests.engines.remote import Remote


def peer(name: str, module: str | None = None, **switches: str) -> tuple[Remote, list[pytest.MarkDecorator]]:
    """The engine ``name``, training in its own environment, and the marks of tests that need it: skipped, with the reason, without it.

    ``module``: another that trains there in its place. ``switches``: environment variables beside those of its YAML.
    """
    engine = plain(compose_one([f"engine={name}", "machine=cpu"]))["engine"]
    python = located(engine["python"])
    assert python is not None
    remote = Remote(module or engine["module"], python, {**environment(python), **engine["environment"], **switches})
    missing = lack(python, requires(remote))
    return remote, [pytest.mark.adapter, pytest.mark.skipif(missing is not None, reason=f"engine={name}: {missing}")]


def knobs(option: str) -> dict[str, Any]:
    """The knobs of ``engine=option`` on a CPU."""
    found: dict[str, Any] = plain(compose_one([f"engine={option}", "machine=cpu"]))["engine"]["knobs"]
    return found
