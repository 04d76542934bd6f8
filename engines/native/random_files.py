"""What stands for the open files of a checkpoint when a decoder is only timed: random tensors, drawn on the device when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from harness.nf4 import quantise, to_tensors


@dataclass(frozen=True, slots=True)
class RandomFile:
    """Stands for an open safetensors file: every tensor drawn on the device when it is asked for."""

    sizes: dict[str, tuple[int, ...]]
    device: str = "cuda"

    def get_tensor(self, name: str) -> torch.Tensor:
        """Normal values, standard deviation 0.02; ones for norms."""
        size = self.sizes[name]
        return torch.ones(size, device=self.device) if len(size) == 1 else 0.02 * torch.randn(size, device=self.device)

    def get_slice(self, name: str) -> RandomSlice:
        """Of the tensor called ``name``."""
        return RandomSlice(self, name)


@dataclass(frozen=True, slots=True)
class RandomSlice:
    """Knows the size of a tensor that is not drawn before rows of it are asked for."""

    file: RandomFile
    name: str

    def get_shape(self) -> tuple[int, ...]:
        """As safetensors says it."""
        return self.file.sizes[self.name]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some rows."""
        return self.file.get_tensor(self.name)[rows]


@dataclass(slots=True)
class RandomNf4File:
    """The same, quantised: the tensors of one weight, until another's are asked for."""

    plain: RandomFile
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Of the weight that ``name`` belongs to."""
        if name not in self.tensors:
            weight = f"{name.partition('.weight')[0]}.weight"
            self.tensors = to_tensors(weight, quantise(self.plain.get_tensor(weight).to(torch.bfloat16)))
        return self.tensors[name]
