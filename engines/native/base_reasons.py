"""Why a frozen base cannot be divided among the ranks of a run; light to import."""

from __future__ import annotations

from typing import Literal

from harness.spec import Lora, LoraFp8, Workload

Base = Literal["replicated", "sharded"]


def base_reasons(workload: Workload, base: Base, *, replay: bool, processes: int | None = None) -> list[str]:
    """``processes``: None where their number is not known."""
    if base == "replicated":
        return []
    reasons = []
    if not isinstance(workload.method, Lora):
        reasons.append(f"base=sharded divides weights that stay as they are, method={workload.method.name} trains them; use engine=fsdp")
    if isinstance(workload.method, LoraFp8):
        reasons.append("base=sharded does not divide a base in 8 bits yet; use method=lora or qlora, or base=replicated")
    if processes == 1:
        reasons.append("base=sharded divides the base among processes, there is one; set engine.processes or base=replicated")
    if replay:
        reasons.append(
            "base=sharded gathers inside a step, and ranks that capture while others replay have not been tried; set replay=false"
        )
    return reasons
