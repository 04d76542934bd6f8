"""Faults planted on purpose into an engine of a copied tree: ``python -m tests.planted slow|leak TREE MODULE AMOUNT``, for tests only."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
PARTS = ("harness", "engines", "conf", "requirements", "pyproject.toml", "Makefile", "README.md")

_WRAP = '''

_unplanted = train


def train(job, knobs, probe):
    """As before, but {what}."""
    _unplanted(job, knobs, _Planted(job, probe))


class _Planted:
    def __init__(self, job, probe):
        self._job, self._probe, self._kept = job, probe, []

    def ready(self, chosen=None):
        import time

        self._probe.ready(chosen)
        self._last = time.perf_counter()

    def step(self, **reported):
        import time

        if self._job.device == "cuda":
            import torch

            torch.cuda.synchronize()
        {fault}
        self._probe.step(**reported)
        self._last = time.perf_counter()
'''
_FAULTS = {
    "slow": ("each step sleeps {amount} of its time", "time.sleep({amount} * (time.perf_counter() - self._last))"),
    "leak": (
        "each step keeps {amount} bytes a layer",
        "import torch; layers = self._job.workload.model.config['num_hidden_layers']; "
        "self._kept += [torch.zeros({amount}, dtype=torch.uint8, device=self._job.device) for _ in range(layers)]",
    ),
}


def copy_tree(to: Path) -> Path:
    """What a check needs of this tree, copied."""
    hidden = shutil.ignore_patterns("__pycache__")
    for part in (*PARTS, "tests/fakes", "tests/__init__.py"):
        target = to / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (TREE / part).is_dir():
            shutil.copytree(TREE / part, target, ignore=hidden)
        else:
            shutil.copy(TREE / part, target)
    return to


def plant(fault: str, tree: Path, module: str, amount: str) -> None:
    """Append ``fault`` to ``module`` of ``tree``: ``slow`` by a share of each step, ``leak`` so many bytes a layer and step."""
    what, code = (text.format(amount=amount) for text in _FAULTS[fault])
    path = tree.joinpath(*module.split(".")).with_suffix(".py")
    path.write_text(path.read_text(encoding="utf-8") + _WRAP.format(what=what, fault=code), encoding="utf-8")


if __name__ == "__main__":
    _, fault_, tree_, module_, amount_ = sys.argv
    plant(fault_, copy_tree(Path(tree_)), module_, amount_)
