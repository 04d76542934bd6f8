"""Our side of Axolotl's plugin interface: the workload's learning rates, and every step reported to the probe as it really was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from axolotl.integrations.base import BasePlugin
from torch import Tensor, distributed
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from harness.data.tokens import Batch, StepTokens
from harness.engine import Job, Probe


@dataclass(frozen=True, slots=True)
class Run:
    """What the plugin, which Axolotl makes from its class's name alone, has to know."""

    job: Job
    probe: Probe


RUN: ContextVar[Run] = ContextVar("the run that Axolotl is about to be given")
_SEEN = "engine_room_batch"


class Reporting(BasePlugin):  # type: ignore[misc]
    """The plugin; Axolotl makes one a run."""

    def __init__(self) -> None:
        super().__init__()
        self._run = RUN.get()

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """What no key of its YAML says."""
        return {"use_cpu": self._run.job.device == "cpu"}

    def create_lr_scheduler(self, cfg: Any, trainer: Any, optimizer: Any, num_training_steps: int) -> LambdaLR:
        """The workload's learning rates, exactly; also its decay, which Axolotl would spare norms and biases."""
        train = self._run.job.workload.train
        if num_training_steps != train.num_steps:
            raise RuntimeError(f"axolotl plans {num_training_steps} steps, not {train.num_steps}: it has dropped or split samples")
        for group in optimizer.param_groups:
            group["weight_decay"] = train.weight_decay
        return LambdaLR(optimizer, lambda step: train.learning_rate_at(step) / train.learning_rate)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Look into the batches that its collator makes, its losses and its gradient norms."""
        reporter = Reporter(self._run, trainer)
        trainer.data_collator = Looking(trainer.data_collator, packed=bool(cfg.sample_packing))
        trainer.get_batch_samples = reporter.seeing_batches(trainer.get_batch_samples)
        trainer.training_step = reporter.seeing_losses(trainer.training_step)
        trainer.accelerator.clip_grad_norm_ = reporter.seeing_norms(trainer.accelerator.clip_grad_norm_)
        return [reporter]


class Looking:
    """A collator that adds to each batch what it holds, on the host, where (and in whichever process) batches are built."""

    def __init__(self, collator: Callable[..., Any], *, packed: bool) -> None:
        self._collator = collator
        self._packed = packed

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        """The collator's batch with one entry more, a :class:`Batch`."""
        made = self._collator(features, *args, **kwargs)
        lengths = _packed_lengths(made) if self._packed else _padded_lengths(made)
        # Copies: a loader's process gives the memory of a tensor away when it sends it.
        made[_SEEN] = Batch(made["input_ids"].numpy().copy(), made["labels"].numpy().copy(), lengths)
        return made


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Collects a step's batches, losses and gradient norm from the trainer's own calls, and reports them when the step is over."""

    def __init__(self, run: Run, trainer: Any) -> None:
        self._run = run
        self._trainer = trainer
        self._batches: Sequence[Batch] = ()
        self._loss: Tensor | None = None
        self._grad_norm: Tensor | float | None = None
        self._hosts: Any = None  # process group for what never was on a GPU

    def seeing_batches(self, get: Callable[..., Any]) -> Callable[..., Any]:
        """``Trainer.get_batch_samples``, which draws the micro-batches of a step."""

        def seen(*args: Any, **kwargs: Any) -> Any:
            samples, num_items = get(*args, **kwargs)
            self._batches = [sample.pop(_SEEN) for sample in samples]
            return samples, num_items

        return seen

    def seeing_losses(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``Trainer.training_step``: a micro-batch's share of the step's loss. The trainer's log would show 0.0 for a NaN."""

        def seen(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self._loss = loss if self._loss is None else self._loss + loss
            return loss

        return seen

    def seeing_norms(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        """``Accelerator.clip_grad_norm_``, called once a step, also where nothing is clipped; DeepSpeed's has no value to give."""

        def seen(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            return norm

        return seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set-up is over. Its ranks must be those of the job, and its loss of the kind that we say it is."""
        if args.world_size != self._run.job.processes:
            raise RuntimeError(f"axolotl trains on {args.world_size} rank(s), not on {self._run.job.processes}")
        if not self._trainer.model_accepts_loss_kwargs:
            raise RuntimeError("axolotl averages this model's micro-batches, because its loss takes no num_items_in_batch")
        if self._run.job.processes > 1:
            self._hosts = distributed.new_group(backend="gloo")
        self._run.probe.ready()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step has been issued."""
        if self._loss is None:
            raise RuntimeError("axolotl made an optimizer step without a training step")
        loss, batches = self._over_all_ranks(self._loss, self._batches)
        self._run.probe.step(loss=loss, grad_norm=self._grad_norm, tokens=StepTokens.of(batches))
        self._loss = self._grad_norm = None

    def _over_all_ranks(self, loss: Tensor, batches: Sequence[Batch]) -> tuple[Tensor, Sequence[Batch]]:
        """The mean of the ranks' losses, as its gradients are averaged, and every rank's batches."""
        ranks = self._run.job.processes
        if ranks == 1:
            return loss, batches
        every: list[Sequence[Batch]] = [()] * ranks
        distributed.all_gather_object(every, batches, group=self._hosts)
        return self._trainer.accelerator.reduce(loss, reduction="mean"), [batch for one in every for batch in one]


def _padded_lengths(made: Any) -> tuple[tuple[int, ...], ...]:
    """One document a row, padded on the right."""
    mask = made["attention_mask"].numpy()
    lengths = mask.sum(axis=1)
    for row, length in zip(mask, lengths, strict=True):
        if not row[:length].all():
            raise RuntimeError("axolotl has padded a row elsewhere than on its right")
    return tuple((int(length),) for length in lengths)


def _packed_lengths(made: Any) -> tuple[tuple[int, ...], ...]:
    """The documents of a row, which is full: each starts where positions start again."""
    lengths = []
    for positions in made["position_ids"].numpy():
        starts = [*(int(start) for start in (positions == 0).nonzero()[0]), len(positions)]
        lengths.append(tuple(stop - start for start, stop in itertools.pairwise(starts)))
    return tuple(lengths)
