"""One thing the doctor looked at: what it found, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``note``: good to know, nothing is broken. ``blocks``: a problem without whose remedy the demo cannot run here.

    Raises ValueError for a problem without a remedy, and for a blocker that is none.
    """

    area: str
    name: str
    state: State
    found: str
    remedy: str | None = None
    blocks: bool = False

    def __post_init__(self) -> None:
        if self.state == "problem" and not self.remedy:
            raise ValueError(f"{self.area}, {self.name}: a problem must say what to do about it")
        if self.blocks and self.state != "problem":
            raise ValueError(f"{self.area}, {self.name}: only a problem can block")
