"""How a kernel is judged: against float64 truth, by the distance that the reference has in the same type.

Without a GPU the kernels run in Triton's interpreter in float32 (its bfloat16 is not to be trusted); with one in bfloat16 as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# The interpreter converts arrays in a way that the pinned numpy still allows.
INTERPRETED = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
EPSILON = 1e-5


def random(*size: int, dtype: torch.dtype = torch.float32, room: int = 0) -> Tensor:
    """Values in ``dtype`` whose rows lie ``room`` elements apart in memory."""
    return torch.randn(*size[:-1], size[-1] + room, device=DEVICE).to(dtype)[..., : size[-1]]


def judged(found: Tensor, plain: Tensor, truth: Tensor, inputs: torch.dtype | None = None) -> None:
    """Row by row at most twice as far from the truth as the reference in the same type plus rounding, and no element astray.

    As far as the reference is in that row or in the middle of all: which row of a few elements it hits by luck depends on the processor,
    whose libraries add up in orders of their own. ``inputs``: the coarser type that a float32 result was made from.
    """
    unit = 2 * torch.finfo(found.dtype if inputs is None else inputs).eps
    assert plain.dtype == found.dtype
    found, plain = (x.double().reshape(len(x), -1) for x in (found, plain))
    truth = truth.double().reshape(len(truth), -1)
    assert torch.isfinite(found).all()
    size = truth.norm(dim=1)
    ours, theirs = (found - truth).norm(dim=1), (plain - truth).norm(dim=1)
    allowed = 2 * theirs.clamp(min=float(theirs.square().mean().sqrt())) + unit * size
    assert (ours <= allowed).all(), (ours / allowed).max()
    astray = (found - truth).abs() - 4 * (plain - truth).abs().amax(1, keepdim=True) - 4 * unit * truth.abs().amax(1, keepdim=True)
    assert (astray <= 0).all()
