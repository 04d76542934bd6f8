"""The state of training, saved whole and found again: every rank its part, in one folder that appears complete."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from engines.native.optimizer import Optimizer
from engines.native.weights import DecoderWeights, trained_weights
from harness.engine import Checkpoints
from harness.errors import UnsupportedError

_KEPT = 2  # the last step of the newest may be missing in the log of a killed run; the one before it is then what counts


class State(Protocol):
    """What can leave its part of the state in a folder and read it again. All ranks call both together."""

    def save_state(self, folder: Path) -> None:
        """Into an empty folder."""

    def load_state(self, folder: Path) -> None:
        """What ``save_state`` left."""


def restored(state: State, checkpoints: Checkpoints | None) -> int:
    """How many steps are made already; the state after them is loaded."""
    if checkpoints is None or checkpoints.made == 0:
        return 0
    state.load_state(checkpoints.at(checkpoints.made))
    return checkpoints.made


def step_made(state: State, checkpoints: Checkpoints | None, steps: int, num_steps: int) -> None:
    """``steps`` of ``num_steps`` are made: save the state where it is due. After the last step the weights are saved, and nothing else."""
    if checkpoints is not None and steps % checkpoints.every == 0 and steps < num_steps:
        _save(state, checkpoints, steps)


def _save(state: State, checkpoints: Checkpoints, steps: int) -> None:
    """All but the last two are dropped."""
    place = checkpoints.at(steps)
    partial = place.with_name(f"{place.name}.partial")
    if _rank() == 0:
        for old in (partial, place):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
    _meet()
    state.save_state(partial)
    _meet()
    if _rank() == 0:
        partial.rename(place)
        found = sorted(path for path in place.parent.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path <= place)
        for old in found[:-_KEPT]:
            shutil.rmtree(old)


class Shards:
    """The trained weights of a model and their AdamW moments, sharded or whole on every rank, through torch.distributed.checkpoint."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer = optimizer

    def save_state(self, folder: Path) -> None:
        """A file a rank, and one that says what lies where."""
        save_tensors(self._tensors(), checkpoint_id=folder)

    def load_state(self, folder: Path) -> None:
        """In place."""
        for parameter in self._trained.values():
            device = parameter.device if self._optimizer.defaults["fused"] else torch.device("cpu")
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=device), **zeros}
        load(self._tensors(), checkpoint_id=folder)

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._trained.items():
            found[f"weight.{name}"] = parameter.detach()
            found |= {f"{key}.{name}": value for key, value in self._optimizer.state[parameter].items()}
        return found


class Plain:
    """The trained weights of a model in one process and their AdamW moments."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raises UnsupportedError for an optimizer whose state is of another form."""
        if not isinstance(optimizer, torch.optim.AdamW):
            raise UnsupportedError("save_every: only the state of optimizer=adamw is saved; set save_every=null, or optimizer=adamw")
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer = optimizer

    def save_state(self, folder: Path) -> None:
        """One file."""
        tensors = {f"weight.{name}": parameter for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            tensors |= {f"{key}.{name}": value for key, value in self._optimizer.state[parameter].items()}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "state.safetensors")

    def load_state(self, folder: Path) -> None:
        """In place. The fused AdamW counts its steps on the device, the other on the host."""
        saved = load_file(folder / "state.safetensors")
        for name, parameter in self._trained.items():
            parameter.data.copy_(saved[f"weight.{name}"])
            if f"step.{name}" in saved:  # no loss has reached a weight without one
                count = saved[f"step.{name}"]
                moments = {key: saved[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                device = parameter.device if self._optimizer.defaults["fused"] else count.device
                self._optimizer.state[parameter] = {"step": count.to(device), **moments}


class Flat:
    """A decoder's masters in one buffer, and what their optimizer keeps: the same on every rank, so that rank 0 writes and all read."""

    def __init__(self, weights: DecoderWeights, optimizer: Optimizer) -> None:
        self._weights = weights
        self._tensors = {"masters": weights.arena.masters, **optimizer.kept}

    def save_state(self, folder: Path) -> None:
        """A file for each tensor: those of all weights are large, and the host has one of them at a time."""
        if _rank() == 0:
            for name, tensor in self._tensors.items():
                save_file({name: tensor.detach().cpu()}, folder / f"{name}.safetensors")

    def load_state(self, folder: Path) -> None:
        """In place, and to the products."""
        for name, tensor in self._tensors.items():
            tensor.detach().copy_(load_file(folder / f"{name}.safetensors")[name])
        for weight in trained_weights(self._weights):
            weight.publish()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _meet() -> None:
    """All ranks get here before any goes on."""
    if distributed.is_initialized():
        distributed.all_reduce(torch.zeros(1))  # on the host: over gloo, also beside NCCL
