"""The house engine: packed documents through a decoder with an explicit forward and backward, no autograd, no padding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from engines.native.base_reasons import Base, base_reasons
from engines.native.forecast import footprint as footprint
from engines.native.fp8_reasons import check_device, size_reasons
from engines.native.fused_reasons import method_reasons, model_reasons, state_reasons
from engines.native.hf_reasons import share_reasons
from engines.native.lora_variants import variant_reasons
from engines.native.named import variant as variant
from harness.data.tokens import StepTokens
from harness.engine import Chosen, Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import LoraFp8, Positive, Spec, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from engines.native.decoder import Decoder
    from engines.native.loader import Placement
    from engines.native.lora import Adapter
    from engines.native.nf4 import Filling
    from engines.native.ops import Ops
    from engines.native.rehearsal import Rehearsal
    from engines.native.replay import ReplayedSteps
    from engines.native.replicas import Shares
    from engines.native.shape import LlamaShape
    from engines.native.steps import Steps
    from engines.native.store import Training

_RANK_MULTIPLE = 64  # see Placement
_FP8_RANK_MULTIPLE = 16  # see engines.native.fp8


loss_norm = "token_global"
resumes = True


class Knobs(Spec):
    """How the decoder does it; conf/engine/fused.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    recompute: Literal["fit", "none", "full"]
    memory_gib: Annotated[float, Field(gt=0)] | None
    offload: bool
    compute_dtype: Literal["float32", "bfloat16"]
    operations: Literal["reference", "fused"]
    replay: bool
    loss_chunk: Positive
    fp8: Literal["forward", "forward_and_input_gradients"]
    optimizer_state: Literal["fp32", "int8"]
    base: Base
    compile_ahead: bool


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason that can be told before the weights are open, or None."""
    reasons = [*method_reasons(workload, knobs.compute_dtype), *model_reasons(workload), *_fused_reasons(workload, knobs, machine)]
    gpus = machine.count if machine.device == "cuda" else None
    reasons += share_reasons(workload, gpus) if gpus is not None else []
    reasons += base_reasons(workload, knobs.base, replay=knobs.replay, processes=gpus)
    reasons += [
        *state_reasons(workload, knobs.optimizer_state, knobs.compute_dtype),
        *variant_reasons(workload, rank_stabilised=True, ratio=True),
    ]
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float | None:
    """Of the layers' forward pass, what the backward pass does again; null where it is planned only once the weights are loaded."""
    return 0.0 if knobs.recompute == "none" else None


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train with AdamW on every trained tensor (norms and biases decay too), and save into ``job.out``."""
    from engines.native import replicas

    reasons = share_reasons(job.workload, job.processes)
    if reasons := reasons + base_reasons(job.workload, knobs.base, replay=knobs.replay, processes=job.processes):
        raise UnsupportedError("; ".join(reasons))
    with replicas.ranks(job) as rank:
        _train(job, knobs, probe, rank)


def _train(job: Job, knobs: Knobs, probe: Probe, rank: int) -> None:
    import torch

    schedule = job.workload.train
    torch.manual_seed(schedule.seed)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    session = _Session(job, knobs, probe, rank)
    begin = session.begin()
    probe.ready(session.chosen)
    for index in range(begin, schedule.num_steps):
        loss, grad_norm, tokens = session.step(index)
        probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)
        session.step_made(index + 1)
    session.end()


class _Session:
    """The decoder and its steps while a job is trained."""

    def __init__(self, job: Job, knobs: Knobs, probe: Probe, rank: int) -> None:
        import torch

        from engines.native import replicas, states
        from engines.native.buckets import FILLER
        from engines.native.optimizers import optimizer_for
        from engines.native.packed import Angles
        from engines.native.replay import ReplayedSteps
        from engines.native.steps import Steps

        self._job, self._knobs, self._rank = job, knobs, rank
        self._config, self._adapter, self._decoder, self._shares, self.chosen = _load(job, knobs, rank)
        num_positions = max(job.workload.data.sequence_length, FILLER)
        angles = Angles.of(self._decoder.shape, num_positions, torch.device(job.device))
        optimizer = optimizer_for(self._decoder.weights, job.workload, kernels=knobs.operations == "fused")
        self._state = states.Flat(self._decoder.weights, optimizer) if job.checkpoints else None
        exchange = replicas.exchange(probe) if job.processes > 1 else None
        if knobs.base == "sharded":
            self._decoder.weights.shared.watch(probe.exchanges)
        steps = Steps(self._decoder, angles, optimizer, job.workload.train.max_grad_norm, exchange)
        self._steps: Steps | ReplayedSteps = ReplayedSteps(steps, self._shares.extent.largest) if knobs.replay else steps

    def begin(self) -> int:
        """The first step that is left to make."""
        from engines.native import states

        begin = states.restored(self._state, self._job.checkpoints) if self._state is not None else 0
        for index in range(begin if self._knobs.replay else 0):
            self._shares.of(index)  # what rows are filled up to follows from those before
        return begin

    def step_made(self, count: int) -> None:
        """``count`` steps are made: save the state where it is due."""
        from engines.native import states

        if self._state is not None:
            states.step_made(self._state, self._job.checkpoints, count, self._job.workload.train.num_steps)

    def step(self, index: int) -> tuple[Tensor, Tensor, StepTokens]:
        """Optimizer step ``index``: the loss (a mean over its supervised tokens), the gradient norm before clipping, the tokens."""
        from engines.native.optimizer import step_scalars

        rows, tokens = self._shares.of(index)
        outcome = self._steps.run(rows, step_scalars(self._job.workload.train, index, tokens.loss))
        return outcome.loss, outcome.grad_norm, tokens

    def end(self) -> None:
        """Rank 0 leaves the adapter, or the full weights, in the job's folder."""
        self._shares.expect_agreement()
        if self._rank == 0:
            self._save()

    def _save(self) -> None:
        from engines.native.checkpoint import save_weights
        from engines.native.fp8 import check_not_outgrown
        from engines.native.lora import save_adapter

        model, out = self._job.workload.model, self._job.out
        if self._knobs.operations == "fused":
            check_not_outgrown(self._decoder.weights.layers)
        if self._adapter is not None:
            save_adapter(self._decoder.weights, self._adapter.config, model.name, out)
        else:
            save_weights(self._decoder.weights, self._config, model.dtype, out)


def _fused_reasons(workload: Workload, knobs: Knobs, machine: Machine) -> list[str]:
    """What the kernels and the replay do not do."""
    reasons = []
    if knobs.replay and machine.device != "cuda":
        reasons.append("replay=true captures a CUDA graph; on a CPU use replay=false")
    if knobs.memory_gib is not None and knobs.recompute != "fit":
        reasons.append(f"memory_gib={knobs.memory_gib:g} is a budget for recompute=fit, not for recompute={knobs.recompute}")
    if knobs.operations == "fused":
        if machine.device != "cuda" or knobs.compute_dtype != "bfloat16":
            reasons.append("operations=fused needs an NVIDIA GPU and compute_dtype=bfloat16; use operations=reference")
        if workload.method.dtype != "float32":
            reasons.append(f"operations=fused trains float32 masters, method.dtype is {workload.method.dtype}; use operations=reference")
        if isinstance(workload.method, LoraFp8) and not model_reasons(workload):
            reasons += size_reasons(workload)
    return reasons


def _load(job: Job, knobs: Knobs, rank: int) -> tuple[dict[str, Any], Adapter | None, Decoder, Shares, dict[str, Chosen]]:
    """The model's config, its adapter, the decoder, the batches of this rank, and what was decided of its plans."""
    import torch

    from engines.native import tiles
    from engines.native.budget import plans_for, with_embedding_on_host
    from engines.native.checkpoint import load_weights, read_config
    from engines.native.decoder import Decoder
    from engines.native.divided import Division
    from engines.native.loader import Placement
    from engines.native.lora import read_adapter
    from engines.native.plan import fingerprint
    from engines.native.ranks import expect_agreement
    from engines.native.replicas import Shares
    from engines.native.shape import read_shape

    method, device = job.workload.method, torch.device(job.device)
    config = read_config(job.base)
    shape = read_shape(config, job.workload.data.sequence_length)
    adapter = None if job.adapter_init is None else read_adapter(job.adapter_init)
    fp8 = knobs.fp8 if isinstance(method, LoraFp8) else None
    if fp8 and knobs.operations == "fused":
        check_device(shape)
    multiple = 1 if job.device == "cpu" else _RANK_MULTIPLE if fp8 is None else _FP8_RANK_MULTIPLE
    types = getattr(torch, knobs.compute_dtype), getattr(torch, method.dtype)
    division = Division(rank, job.processes) if knobs.base == "sharded" else None
    placement = Placement(device, *types, multiple, _filling(knobs), fp8, _training(job, knobs), division)
    ops = _operations(knobs, adapter, fp8)
    shares = Shares(job, shape, rank, micro_batch=knobs.micro_batch, shared=knobs.replay, in_step=division is not None)
    told = {"tiles": tiles.said(torch.cuda.get_device_name(device))} if knobs.operations == "fused" else {}  # reads them, before any launch
    with _rehearsal(job, knobs, shape, placement, adapter, ops, shares) as rehearsal:
        weights = load_weights(job.base, shape, placement, adapter)
        if adapter is not None:
            adapter.check_nothing_is_left(weights)
        planned = plans_for(job, knobs, shape, weights, shares)
        plans, loss_chunk, chosen = planned.plans, planned.loss_chunk, {**planned.chosen, **told}
        if division is not None:
            expect_agreement(fingerprint(plans, loss_chunk), "what layers make again, and so on which weights to gather when")
        if planned.embedding_away:
            weights = with_embedding_on_host(weights)
            torch.cuda.empty_cache()  # else the optimizer's tensors split the hole, and captures cannot use what is left of it
        if rehearsal is not None:
            chosen["kernels_compiled_ahead"] = rehearsal.finish(plans, loss_chunk)
    decoder = Decoder(shape=shape, weights=weights, ops=ops, plans=plans, loss_chunk=loss_chunk)
    return config, adapter, decoder, shares, chosen


def _rehearsal(
    job: Job, knobs: Knobs, shape: LlamaShape, placement: Placement, adapter: Adapter | None, ops: Ops, shares: Shares
) -> AbstractContextManager[Rehearsal | None]:
    """Compiles the kernels beside the loading of the weights; without kernels there is nothing to rehearse."""
    if knobs.operations == "reference" or not knobs.compile_ahead:
        return nullcontext()
    from engines.native.rehearsal import Piece, Rehearsal

    return Rehearsal(
        Piece(
            job=job, shape=shape, placement=placement, adapter=adapter, ops=ops, batches=shares.every, extent=lambda: shares.extent,
            recompute=knobs.recompute, loss_chunk=knobs.loss_chunk,
        )
    )  # fmt: skip


def _training(job: Job, knobs: Knobs) -> Training:
    """How everything is trained: updated inside backward, unless gradients are clipped, or of several micro-batches or ranks."""
    from engines.native.store import Training

    schedule = job.workload.train
    alone = job.processes == 1 and schedule.samples_per_step <= knobs.micro_batch
    return Training(knobs.optimizer_state, schedule.max_grad_norm is None and alone)


def _operations(knobs: Knobs, adapter: Adapter | None, fp8: str | None) -> Ops:
    if knobs.operations == "reference":
        from engines.native.fp8_reference import REFERENCE_FP8
        from engines.native.reference import REFERENCE

        return REFERENCE_FP8 if fp8 else REFERENCE
    if adapter is None:
        from engines.native.full_ops import FUSED_FULL

        return FUSED_FULL
    from engines.native.fp8_ops import FUSED_FP8
    from engines.native.fused_ops import FUSED

    return FUSED_FP8 if fp8 else FUSED


def _filling(knobs: Knobs) -> Filling:
    if knobs.operations == "reference":
        from engines.native.nf4 import REFERENCE

        return REFERENCE
    from engines.native.fused_ops import FILLING

    return FILLING
