"""How many graphs and kernels have been compiled in this process, from the counters that torch and Triton keep or offer."""

from __future__ import annotations

import sys
from typing import Any


class CompileCounter:
    """Counts graphs of torch.compile, and Triton kernels from the moment that Triton is found imported; asking costs a microsecond.

    A library that nobody has imported has compiled nothing. A Triton that offers no listener is not counted (older than 3.4).
    """

    def __init__(self) -> None:
        self._num_kernels = 0
        self._listening = False

    @property
    def count(self) -> int:
        """Compilations so far; kernels that came out of Triton's cache on disk count too: the step waited for them."""
        self._listen()
        dynamo: Any = sys.modules.get("torch._dynamo.utils")
        graphs = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
        return int(graphs) + self._num_kernels

    def _listen(self) -> None:
        """Beside a listener that somebody else has set, never instead of it."""
        knobs: Any = sys.modules.get("triton.knobs")
        if self._listening or knobs is None or not hasattr(knobs.compilation, "listener"):
            return
        earlier = knobs.compilation.listener

        def listener(**told: Any) -> None:
            self._num_kernels += 1
            if earlier is not None:
                earlier(**told)

        knobs.compilation.listener = listener
        self._listening = True
