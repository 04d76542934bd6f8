"""Every error the harness raises on purpose: something the user can fix, shown without a traceback.

* HarnessError
  - ConfigError        the configuration asks for something that does not exist or contradicts itself
  - DataError          a JSONL row, a file of it, or what is left of it, cannot be trained on
  - WeightsError       base weights or a tokenizer cannot be had, or are in a format we refuse
  - RecordError        a stored record cannot be read by this code
  - StoreError         results cannot be written or read where they should be
  - UnsupportedError   an engine finds out only while loading that it cannot train this; becomes status ``unsupported``
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """Base of all errors that are shown to the user as a message: where, what arrived, what to do."""


class ConfigError(HarnessError):
    """The configuration is wrong. The message lists every problem found, one a line."""


class DataError(HarnessError):
    """The data cannot be used. The message names file, line, what was found and what was expected."""


class WeightsError(HarnessError):
    """Base weights or a tokenizer are missing or refused. The message names the source and the remedy."""


class RecordError(HarnessError):
    """A stored record is truncated, edited beyond recognition, or newer than this code."""


class StoreError(HarnessError):
    """Results cannot be written or read at the given place."""


class UnsupportedError(HarnessError):
    """An engine cannot train this workload, seen only once the weights are open. The message is the reason for people."""


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint for a misspelt ``key``: the nearest known key, or all of them when none is near."""
    names = sorted(known)
    if close := closest(key, names):
        return f"did you mean '{close}'?"
    return f"known: {', '.join(names)}" if names else "nothing else exists there"


def closest(key: str, known: Iterable[str]) -> str | None:
    """Of ``known`` the one that a misspelt ``key`` is near to; None where none is."""
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)), None)
