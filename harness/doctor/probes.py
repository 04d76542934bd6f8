"""What only trying can tell, run in a child: importing torch may take long, fail, or end its process (``… probes torch|triton``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Torch's build, and the devices it can really use."""
    import torch

    usable = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "usable": usable,
        "devices": [list(torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())] if usable else [],
        "architectures": torch.cuda.get_arch_list() if usable else [],
        "sum": float(torch.ones(2, device="cuda" if usable else "cpu").sum()),
        **_bytecode(),
    }


def _bytecode() -> dict[str, int]:
    """Of the modules imported by now, how many come from a source file, and how many of those have no bytecode on disk even now."""
    specs = [spec for module in list(sys.modules.values()) if (spec := getattr(module, "__spec__", None)) and spec.cached]
    return {"sources": len(specs), "without_bytecode": sum(not Path(spec.cached).is_file() for spec in specs)}


def triton_facts() -> dict[str, Any]:
    """Triton's version, and what a kernel that doubles eight numbers made of them."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def double(values, size: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
        offsets = tl.arange(0, size)
        tl.store(values + offsets, 2 * tl.load(values + offsets))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.arange(8, dtype=torch.float32, device=device)
    double[(1,)](values, 8)
    return {"version": triton.__version__, "device": device, "right": values.tolist() == [2.0 * value for value in range(8)]}


if __name__ == "__main__":
    print(json.dumps({"torch": torch_facts, "triton": triton_facts}[sys.argv[1]]()))
