"""A model spread over ranks, or copied on each: FSDP2's sharding of any stack of blocks, one bucket for replicated gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from harness.errors import UnsupportedError
from harness.spec import Train


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The layers of ``model``: its largest list of modules of one class. Raises UnsupportedError when it has none.

    Not transformers' ``_no_split_modules``, which for Mamba names a layer and a part of it.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1]
    if not lists:
        plain: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
        raise UnsupportedError(f"{type(plain).__name__} has no list of layers of one class to shard; set strategy=replicate")
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one.parameters()))


def shard(model: Any, device: str, *, reshard: bool, compute: torch.dtype | None, offload: bool, over: int | None = None) -> None:
    """Shard every block of ``model``, then the rest, over all ranks, in place; gradients are sums over ranks. ``over``: over so many ranks
    that follow each other instead, and each such group has a copy of the whole.

    ``reshard``: give a block's weights back after its forward pass and gather them again for backward. ``compute``: what weights are
    gathered as (None: as stored). ``offload``: shards live in host memory. The rest holds embedding and head, which may be one tensor.
    """
    ranks = distributed.get_world_size()
    copies = () if over is None else (ranks // over,)
    mesh = init_device_mesh(device, (*copies, over or ranks), mesh_dim_names=("copy", "shard")[-1 - len(copies) :])
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda") if offload else OffloadPolicy(),
    }
    for block in blocks_of(model):
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    for part in _sharded(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else a product before the sum, which gloo does not know


def give_back(model: nn.Module) -> None:
    """Free what a forward pass without a backward one has gathered."""
    for part in _sharded(model):
        part.reshard()


class Bucket:
    """The gradients of replicated ``parameters`` as views of one flat tensor, summed over ranks by one call."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        self._parameters = parameters
        self.empty()

    def empty(self) -> None:
        """Zero gradients, in place."""
        self._flat.zero_()
        start = 0
        for parameter in self._parameters:
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def reduce(self) -> None:
        """Sum over all ranks. All ranks must call this."""
        distributed.all_reduce(self._flat)


def update(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], schedule: Train, index: int) -> Tensor:
    """Clip by the norm over all ranks and make optimizer step ``index`` (0-based); returns that norm, before clipping."""
    norm: Any = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if schedule.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, schedule.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate_at(index) * group.get("ratio", 1.0)
    optimizer.step()
    assert isinstance(norm, Tensor)
    return norm


def gathered(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """The weights of ``model``, whole, on the host of rank 0 (empty elsewhere). All ranks must call this."""
    keep = distributed.get_rank() == 0
    found = {}
    for name, value in _named(model, trained_only=trained_only):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.detach().to("cpu").contiguous()
    return found


def _named(model: nn.Module, *, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, by its first name: a tied head is its embedding."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad or not trained_only)
    if not trained_only:
        stored = model.state_dict()
        yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
