"""What layers compute again for backward: the same gradients to the bit, and memory between that of everything and that of nothing kept."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from engines.native.kept_products import contexts
from engines.native.nf4_linear import load_packed, pack_linears
from engines.native.recompute import Recompute, checkpoint_layers, fraction, recompute_name
from tests.engines.allocations import LiveBytes
from tests.engines.test_fsdp import FALCON, FALCON_TARGETS, MAMBA
from tests.engines.tiny import FAMILIES, FULL, LLAMA, LORA, QLORA, make_job, make_workload

HOST = torch.device("cpu")
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama lora": ("llama", LORA, "sdpa"),
    "llama qlora": ("llama_biases", QLORA, "sdpa"),
    "qwen3 full": ("qwen3", FULL, "sdpa"),
    "llama eager": ("llama", LORA, "eager"),
    "falcon full eager": ("falcon", FULL, "eager"),  # divides its scores in place
    "falcon qlora": ("falcon", {**QLORA, "targets": FALCON_TARGETS}, "sdpa"),
    "mamba lora": ("mamba", {**LORA, "targets": ("in_proj", "x_proj")}, "sdpa"),
}


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in (("falcon", FALCON), ("mamba", MAMBA)):
        monkeypatch.setitem(FAMILIES, name, config)


def built(folder: Path, family: str, method: dict[str, Any], attention: str) -> Any:
    job = make_job(folder, family, method)
    implementation = None if family == "mamba" else attention
    if method["name"] != "qlora":
        model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32, attn_implementation=implementation)
        return model if job.adapter_init is None else PeftModel.from_pretrained(model, str(job.adapter_init), is_trainable=True)
    model, packed = load_packed(job.base, AutoConfig.from_pretrained(job.base), torch.float32, attn_implementation=implementation)
    adapted = PeftModel.from_pretrained(model, str(job.adapter_init), is_trainable=True)
    pack_linears(adapted, packed, torch.float32)
    return adapted


def measured(model: Any, recompute: Recompute, *, rounded: bool) -> tuple[int, list[Tensor]]:
    """Bytes that a forward pass leaves for backward, and the gradients."""
    model.gradient_checkpointing_disable()
    checkpoint_layers(model, recompute)
    model.train()
    model.config.use_cache = False
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.arange(48).view(2, 24)
    with LiveBytes(HOST) as live, torch.autocast("cpu", dtype=torch.bfloat16) if rounded else nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
        gc.collect()
        kept = live.now
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return kept, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_same_and_memory_lies_between(tmp_path: Path, name: str, rounded: bool) -> None:
    model = built(tmp_path, *METHODS[name])
    choices: tuple[Recompute, ...] = ("none", "selective", 2, "full")
    kept, gradients = zip(*(measured(model, recompute, rounded=rounded) for recompute in choices), strict=True)
    for others in gradients[1:]:
        assert len(others) == len(gradients[0]) > 2
        assert all(one.equal(other) for one, other in zip(gradients[0], others, strict=True))
    everything, selective, every_second, nothing = kept
    assert everything > selective > nothing
    assert everything > every_second > nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", ["llama qlora", "llama lora", "falcon full eager"])
def test_on_a_gpu_too(tmp_path: Path, name: str) -> None:
    """Where the allocator counts. The same kernels in the same order: the same bits, but for sums that are not ordered."""
    model = built(tmp_path, *METHODS[name]).to("cuda")
    ids = torch.arange(480, device="cuda").view(8, 60)
    kept, gradients = [], []
    for recompute in ("none", "selective", "full"):
        model.gradient_checkpointing_disable()
        checkpoint_layers(model, recompute)  # type: ignore[arg-type]
        model.train()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept.append(torch.cuda.memory_allocated() - before)
        found = torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad], allow_unused=True)
        gradients.append(torch.cat([gradient.float().flatten() for gradient in found if gradient is not None]))
        del loss, found
    assert kept[0] > kept[1] > kept[2]
    for other in gradients[1:]:
        assert torch.linalg.vector_norm(other - gradients[0]) < 1e-3 * torch.linalg.vector_norm(gradients[0])


class Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.name().partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def test_products_and_attention_are_made_once(tmp_path: Path) -> None:
    model = built(tmp_path, "llama", QLORA, "sdpa")
    model.train()
    ids = torch.arange(48).view(2, 24)
    calls = {}
    for recompute in ("none", "selective", "full"):
        model.gradient_checkpointing_disable()
        checkpoint_layers(model, recompute)  # type: ignore[arg-type]
        with Count() as counted:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        calls[recompute] = counted.calls
    layers, linears = 2, 7
    assert calls["none"]["engine_room::nf4_linear"] == calls["selective"]["engine_room::nf4_linear"] == layers * linears
    assert calls["full"]["engine_room::nf4_linear"] > layers * linears
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert (calls["selective"][attention], calls["full"][attention]) == (layers, 2 * layers)
    assert calls["selective"]["aten::silu"] == 2 * calls["none"]["aten::silu"]


class Writes(nn.Module):
    """Writes into the results of its products, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y /= 3
        z = self.other(y.exp())
        z[0] += 1
        return z.tanh() * y


def test_a_result_is_copied_before_somebody_writes_into_it() -> None:
    module, x = Writes(), torch.randn(3, 5, 16, requires_grad=True)
    found = [
        torch.autograd.grad(each.square().sum(), [x, *module.parameters()])
        for each in (module(x), checkpoint(module, x, use_reentrant=False, context_fn=contexts))
    ]
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_thin_products_are_made_again() -> None:
    a, b, scores = torch.randn(4, 32), torch.randn(2, 32), torch.randn(1, 20, 2)
    keeping, _ = contexts()
    with keeping:
        low = a @ b.T  # kept: a sum over 32 columns
        low @ torch.randn(2, 17)  # more than 8 x 2 columns
        low @ torch.randn(2, 16)
        scores @ scores.mT
        torch.addmm(torch.zeros(16), low, torch.randn(2, 16))
    assert [function.name() for function, _ in keeping._results] == ["aten::mm", "aten::mm", "aten::addmm"]


def test_a_layer_that_does_something_else_the_second_time_is_an_error() -> None:
    turns = iter([torch.mm, torch.addmm])

    def layer(x: Tensor) -> Tensor:
        function = next(turns)
        return (function(x, x) if function is torch.mm else function(x, x, x)).exp().exp()

    y = checkpoint(layer, torch.randn(4, 4, requires_grad=True), use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match=r"recompute=selective: aten.addmm.default comes where the first pass had aten.mm.default"):
        y.sum().backward()


def test_names_and_fractions() -> None:
    work, unknown = make_workload({**LLAMA, "num_hidden_layers": 5}, LORA), make_workload(LLAMA, LORA).model_copy()
    choices: tuple[Recompute, ...] = ("none", "selective", "full", 2, 5, 6)
    assert [recompute_name(each) for each in choices] == ["", "ckpt-selective", "ckpt", "ckpt-every-2", "ckpt-every-5", "ckpt-every-6"]
    assert [fraction(each, work, "sdpa") for each in choices] == [0.0, 0.0, 1.0, 0.6, 0.2, 0.2]
    assert fraction("selective", work, "eager") is None  # scores are made again, where documents are long
    real = unknown.model_copy(update={"model": unknown.model.model_copy(update={"config": None})})
    assert fraction(2, real, "sdpa") is None
