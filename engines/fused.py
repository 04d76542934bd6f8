"""The house engine: packed documents through a decoder with an explicit forward and backward, no autograd, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness.data.tokens import IGNORE, Batch, Sample, StepTokens, chunks, pack
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, Spec, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from engines.native.decoder import Decoder
    from engines.native.lora import Adapter
    from engines.native.packed import Angles, Packed

_TARGETS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


class Knobs(Spec):
    """How the decoder does it; conf/engine/fused.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    recompute: Literal["none", "full"]
    compute_dtype: Literal["float32", "bfloat16"]
    operations: Literal["reference"]
    loss_chunk: Positive


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason that can be told before the weights are open, or None."""
    reasons = [*_method_reasons(workload, knobs), *_model_reasons(workload)]
    return "; ".join(reasons) or None


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train with AdamW on every trained tensor (norms and biases decay too), and save into ``job.out``."""
    import torch

    if job.processes != 1:
        raise UnsupportedError(f"engine.processes is {job.processes}; fused trains in one process, use engine.processes=1")
    schedule = job.workload.train
    torch.manual_seed(schedule.seed)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    session = _Session(job, knobs)
    probe.ready()
    for index in range(schedule.steps):
        loss, grad_norm, tokens = session.step(job.tokens.step(schedule, index), schedule.learning_rate_at(index))
        probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)
    session.save()


class _Session:
    """The decoder, its optimizer and its rotary angles while a job is trained."""

    def __init__(self, job: Job, knobs: Knobs) -> None:
        import torch

        from engines.native.optimizer import adamw
        from engines.native.packed import Angles
        from engines.native.weights import trained_weights

        self._job = job
        self._knobs = knobs
        self._config, self._adapter, self._decoder = _load(job, knobs)
        self._angles: Angles = Angles.of(self._decoder.shape, job.workload.data.sequence_length, torch.device(job.device))
        self._trained = trained_weights(self._decoder.weights)
        self._masters = [weight.master for weight in self._trained if weight.master is not None]
        self._optimizer = adamw(self._masters, job.workload.train, job.device)

    def step(self, samples: Sequence[Sample], learning_rate: float) -> tuple[Tensor, Tensor, StepTokens]:
        """One optimizer step: the loss (a mean over its supervised tokens), the gradient norm before clipping, the tokens."""
        import torch

        batches = [pack(group) for group in chunks(samples, self._knobs.micro_batch)]
        tokens = StepTokens.of(batches)
        total = torch.zeros((), device=self._job.device)
        for batch in batches:
            losses = self._decoder.accumulate(_to_device(batch, self._angles, self._job.device), 1.0 / tokens.loss)
            total += losses.sum()
        grad_norm = _clip(self._masters, self._job.workload.train.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        for weight in self._trained:
            weight.publish()
        return total / tokens.loss, grad_norm, tokens

    def save(self) -> None:
        """Leave the adapter, or the full weights, in the job's folder."""
        from engines.native.checkpoint import save_weights
        from engines.native.lora import save_adapter

        model, out = self._job.workload.model, self._job.out
        if self._adapter is not None:
            save_adapter(self._decoder.weights, self._adapter.config, model.name, out)
        else:
            save_weights(self._decoder.weights, self._config, model.dtype, out)


def _method_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    method, reasons = workload.method, []
    if method.dtype == "float16":
        reasons.append("method.dtype=float16 needs loss scaling, which fused does not do; use float32 or bfloat16")
    elif knobs.compute_dtype == "float32" and method.dtype != "float32":
        reasons.append(f"compute_dtype=float32 does not train {method.dtype} weights; set method.dtype=float32 or compute_dtype=bfloat16")
    unknown = sorted(set(method.targets) - _TARGETS) if isinstance(method, Lora) else []
    if unknown:
        reasons.append(f"method.targets has {', '.join(unknown)}; fused adapts {', '.join(sorted(_TARGETS))}")
    return reasons


def _model_reasons(workload: Workload) -> list[str]:
    from engines.native.shape import read_shape  # free of torch

    if workload.model.config is None:
        return []
    try:
        read_shape(workload.model.config, workload.data.sequence_length)
    except UnsupportedError as error:
        return [str(error)]
    return []


def _load(job: Job, knobs: Knobs) -> tuple[dict[str, Any], Adapter | None, Decoder]:
    import torch

    from engines.native.checkpoint import Placement, load_weights, read_config
    from engines.native.decoder import Decoder
    from engines.native.layer import KEEP_INPUT, KEEP_PRODUCTS
    from engines.native.lora import read_adapter
    from engines.native.ops import REFERENCE
    from engines.native.shape import read_shape

    method, device = job.workload.method, torch.device(job.device)
    config = read_config(job.base)
    shape = read_shape(config, job.workload.data.sequence_length)
    adapter = None if job.adapter_init is None else read_adapter(job.adapter_init, getattr(torch, method.dtype), device)
    train_dtype = None if adapter is not None else getattr(torch, method.dtype)
    weights = load_weights(job.base, shape, Placement(device, getattr(torch, knobs.compute_dtype), train_dtype), adapter)
    if adapter is not None:
        adapter.check_nothing_is_left(weights)
    plan = {"none": KEEP_PRODUCTS, "full": KEEP_INPUT}[knobs.recompute]
    ops = {"reference": REFERENCE}[knobs.operations]
    return config, adapter, Decoder(shape=shape, weights=weights, ops=ops, plan=plan, loss_chunk=knobs.loss_chunk)


def _to_device(batch: Batch, angles: Angles, device: str) -> Packed:
    """The row that predicts a label stands one before it; a document's first label is IGNORE, so rows stay inside documents."""
    import torch

    labelled = np.flatnonzero(batch.labels[0] != IGNORE)
    arrays = (batch.input_ids[0], batch.position_ids[0], labelled - 1, batch.labels[0, labelled])
    tensors = [torch.from_numpy(array) for array in arrays]
    if device == "cuda":
        # Pinned, so that the copy does not stop the host until the GPU has caught up.
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    tokens, positions, rows, targets = tensors
    return angles.pack(tokens, positions, batch.lengths[0], rows, targets)


def _clip(masters: list[Any], max_norm: float | None) -> Tensor:
    """The global gradient norm before clipping."""
    import torch

    norm = torch.nn.utils.get_total_norm([master.grad for master in masters])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(masters, max_norm, norm)
    return norm
