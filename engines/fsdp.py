"""Several processes: models of transformers and PEFT, whole on every rank or sharded by FSDP2; any architecture made of equal layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from engines.native.hf_reasons import attention_reasons, dropout_reasons, dtype_reasons, share_reasons
from engines.native.lora_variants import variant_reasons
from engines.native.recompute import Recompute, compiled_reasons, fraction, recompute_name
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, Spec, Workload

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from engines.native.states import Shards

loss_norm = "token_global"
resumes = True


class Knobs(Spec):
    """How ranks share the work; conf/engine/fsdp.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    layout: Literal["padded", "packed"]
    strategy: Literal["replicate", "shard_grad", "full_shard", "hybrid"]
    shard_ranks: Positive | None
    offload: Literal["none", "cpu"]
    recompute: Recompute
    attention: Literal["sdpa", "eager", "varlen"]
    compute_dtype: Literal["float32", "bfloat16"]
    adapter_compute: Literal["autocast", "direct"]
    compile: bool


def variant(knobs: Knobs) -> str:
    """The strategy, and what differs from transformers and PEFT as they come: ``replicate``, ``full_shard+offload+ckpt``."""
    names = [
        knobs.strategy if knobs.shard_ranks is None else f"{knobs.strategy}-{knobs.shard_ranks}",
        "offload" if knobs.offload == "cpu" else "",
        knobs.layout if knobs.layout == "packed" else "",
        knobs.attention if knobs.attention != "sdpa" else "",
        "adapters-direct" if knobs.adapter_compute == "direct" else "",
        "compile" if knobs.compile else "",
        recompute_name(knobs.recompute),
    ]
    return "+".join(name for name in names if name)


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    config = workload.model.config or {}
    reasons = dtype_reasons("fsdp", workload, compute_dtype=knobs.compute_dtype, adapter_compute=knobs.adapter_compute)
    reasons += dropout_reasons(config)
    reasons += attention_reasons(
        layout=knobs.layout, attention=knobs.attention, compute_dtype=knobs.compute_dtype, device=machine.device, config=config
    )
    reasons += variant_reasons(workload, rank_stabilised=True, ratio=True)
    if knobs.offload == "cpu" and knobs.strategy == "replicate":
        reasons.append("offload=cpu moves shards, strategy=replicate has none; set strategy=full_shard or offload=none")
    reasons += compiled_reasons(knobs.recompute, knobs.compile)
    if (knobs.strategy == "hybrid") is not (knobs.shard_ranks is not None):
        reasons.append("strategy=hybrid needs shard_ranks, the ranks that share one copy of the weights, and no other strategy has it")
    if machine.device == "cuda":
        reasons += share_reasons(workload, machine.count) + _copies_reasons(knobs, machine.count)
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float | None:
    """Of the layers' forward pass, what the backward pass does again."""
    return fraction(knobs.recompute, workload, knobs.attention)


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train this rank's share of every step with AdamW on every trained tensor, and let rank 0 save into ``job.out``."""
    import torch

    from engines.native import rank_loop
    from engines.native.hf_batches import row_multiple
    from engines.native.hf_model import exact_float32
    from engines.native.ranks import process_group
    from engines.native.sharding import gathered

    if reasons := share_reasons(job.workload, job.processes) + _copies_reasons(knobs, job.processes):
        raise UnsupportedError("; ".join(reasons))
    with process_group(job.device, job.processes):
        torch.manual_seed(job.workload.train.seed)
        exact_float32()
        model, cost = rank_loop.loaded(job, knobs)
        _spread(model, job, knobs)
        multiple = row_multiple(job.tokens, knobs.attention, compiled=knobs.compile)
        rank_loop.train_steps(_Trained(model, job, knobs), cost, job, knobs, probe, multiple_of=multiple)
        rank_loop.save(model, job, lambda: gathered(model, trained_only=isinstance(job.workload.method, Lora)))


def _copies_reasons(knobs: Knobs, processes: int) -> list[str]:
    if knobs.shard_ranks is None or processes % knobs.shard_ranks == 0:
        return []
    return [f"shard_ranks={knobs.shard_ranks} does not divide {processes} processes into groups; use a divisor"]


def _spread(model: Any, job: Job, knobs: Knobs) -> None:
    """To the device, whole or in shards; the model comes from the host, from where each rank takes what is its own."""
    from engines.native import rank_loop
    from engines.native.hf_batches import lengths_vary
    from engines.native.hf_model import compile_layers
    from engines.native.sharding import blocks_of, give_back, shard

    if knobs.strategy == "replicate":
        model.to(job.device)
    else:
        blocks_of(model)  # refused before anything is compiled
    if knobs.compile:
        compile_layers(model, with_loss=True, shapes_vary=lengths_vary(job.tokens))
    if knobs.strategy != "replicate":
        shard(
            model,
            job.device,
            reshard=knobs.strategy != "shard_grad",
            compute=_gathered_as(job, knobs),
            offload=knobs.offload == "cpu",
            over=knobs.shard_ranks,
        )
    if knobs.layout == "packed":
        rank_loop.expect_documents_apart(model, knobs, job.device)
        give_back(model)


def _gathered_as(job: Job, knobs: Knobs) -> Any:
    """The type that shards are gathered in: float32 masters of all weights as bfloat16; beside adapters each as stored, for autocast."""
    import torch

    return torch.bfloat16 if knobs.compute_dtype == "bfloat16" and not isinstance(job.workload.method, Lora) else None


class _Trained:
    """``rank_loop.Trained`` by torch's own means."""

    def __init__(self, model: Any, job: Job, knobs: Knobs) -> None:
        from engines.native.plain_loop import adamw, groups
        from engines.native.sharding import Bucket

        self._model, self._knobs, self._device, self._schedule = model, knobs, job.device, job.workload.train
        # Adapters are small: reduced once a step. All weights are not: only their shards' gradients are kept.
        self._reduced_last = knobs.strategy != "replicate" and isinstance(job.workload.method, Lora)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = adamw(groups(model, job.workload.method), self._schedule, self._parameters[0].device.type)
        self._bucket = Bucket(self._parameters) if knobs.strategy == "replicate" else None

    def accumulate(self, given: dict[str, Any], *, last: bool) -> Tensor:
        from engines.native.rank_loop import autocast

        if self._reduced_last:
            self._model.set_requires_gradient_sync(last)
        with autocast(self._knobs, self._device):
            loss: Tensor = self._model(**given).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def save_state(self, folder: Path) -> None:
        self._state().save_state(folder)

    def load_state(self, folder: Path) -> None:
        self._state().load_state(folder)

    def _state(self) -> Shards:
        from engines.native.states import Shards

        return Shards(self._model, self._optimizer)

    def update(self, index: int) -> Tensor:
        from engines.native.sharding import update

        if self._bucket is not None:
            self._bucket.reduce()
        norm = update(self._optimizer, self._parameters, self._schedule, index)
        if self._bucket is not None:
            self._bucket.empty()
        else:
            self._optimizer.zero_grad(set_to_none=True)
        return norm
