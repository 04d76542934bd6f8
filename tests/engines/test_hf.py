"""The yardstick engine: conformance in every layout, and that its knobs change no loss."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

import engines.hf
from engines.native.hf_batches import inputs
from harness.compose import compose_all, plain
from harness.data.tokens import pack, pad
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.conformance import EngineConformance
from tests.engines.tiny import CPU, FULL, GPU, LLAMA, LONGEST, LORA, RecordingProbe, make_job, make_samples, make_workload, with_train

TREE = Path(__file__).resolve().parents[2]
KNOBS: dict[str, Any] = {
    "micro_batch": 2, "layout": "padded", "recompute": "none", "attention": "sdpa", "compute_dtype": "float32",
    "adapter_compute": "autocast", "kernels": "none", "compile": False, "optimizer": "adamw",
}  # fmt: skip


class TestHf(EngineConformance):
    engine = engines.hf
    knobs = KNOBS

    @pytest.mark.parametrize(
        "knob",
        [
            {"recompute": "full"},
            {"recompute": "selective", "layout": "packed"},
            {"recompute": 2},
            {"attention": "eager"},
            {"layout": "packed", "attention": "eager"},
        ],
        ids=str,
    )
    def test_a_knob_changes_no_loss(self, job: Job, knob: dict[str, Any]) -> None:
        usual, other = self.run(with_train(job, "usual")), self.run(job, **knob)
        assert other.losses == pytest.approx(usual.losses, rel=2e-5)
        assert other.grad_norms == pytest.approx(usual.grad_norms, rel=1e-4)

    def test_adapters_stay_exact_beside_a_bfloat16_base(self, job: Job) -> None:
        """A step so small that only the masters' own values are left: they must not have passed through bfloat16."""
        from safetensors.torch import load_file

        assert job.adapter_init is not None
        self.run(with_train(job, "tiny_step", learning_rate=1e-12, weight_decay=0.0), compute_dtype="bfloat16")
        before, after = (load_file(path / "adapter_model.safetensors") for path in (job.adapter_init, job.out.parent / "tiny_step"))
        assert all(torch.allclose(before[name], after[name], rtol=1e-6, atol=1e-9) for name in before)

    def test_adapters_fed_directly_compute_the_same_bits_as_through_two_casts(self, job: Job) -> None:
        cast, direct, exact = (
            self.run(with_train(job, how), compute_dtype="bfloat16", adapter_compute=how) for how in ("autocast", "direct", "float32")
        )
        assert (direct.losses, direct.grad_norms) == (cast.losses, cast.grad_norms)
        assert exact.losses != cast.losses
        assert exact.losses == pytest.approx(cast.losses, rel=2e-2)

    def test_adapters_fed_directly_keep_less_for_backward(self, job: Job) -> None:
        """One copy of an input for all linears that read it, not one a linear."""
        batch = pad(job.tokens.step(job.workload.train, 0))
        kept: dict[str, dict[int, torch.Tensor]] = {"float32": {}, "autocast": {}, "direct": {}}
        for how, tensors in kept.items():
            knobs = parse(engines.hf.Knobs, {**KNOBS, "compute_dtype": "bfloat16", "adapter_compute": how})
            model = engines.hf._load(job, knobs)

            def keep(tensor: torch.Tensor, tensors: dict[int, torch.Tensor] = tensors) -> torch.Tensor:
                tensors[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), engines.hf._autocast(knobs, "cpu"):
                model(**inputs(batch, "cpu", packed=False, bounds=False), labels=torch.from_numpy(batch.labels), use_cache=False)
        num_bytes = {how: sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) for how, tensors in kept.items()}
        assert num_bytes["direct"] < num_bytes["autocast"] < num_bytes["float32"]

    @pytest.mark.parametrize(("how", "casts", "dtype"), [("autocast", 1, "bfloat16"), ("direct", 0, "bfloat16"), ("float32", 1, "float32")])
    def test_what_adapters_are_fed_and_compute_in(
        self, job: Job, monkeypatch: pytest.MonkeyPatch, how: str, casts: int, dtype: str
    ) -> None:
        """Seen where PEFT casts an input and where a thin product comes out."""
        from peft.tuners.lora.layer import Linear

        seen: set[tuple[bool, torch.dtype]] = set()

        def cast(layer: Any, x: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
            given = plain(layer, x, wanted)
            seen.add((given.dtype != x.dtype, layer.lora_A["default"](given).dtype))
            return given

        plain = Linear._cast_input_dtype
        monkeypatch.setattr(Linear, "_cast_input_dtype", cast)
        self.run(with_train(job, "seen", stop_after=1), compute_dtype="bfloat16", adapter_compute=how)
        assert seen == {(bool(casts), getattr(torch, dtype))}

    def test_refuses_a_model_with_dropout_when_the_weights_are_open(self, job: Job) -> None:
        config = job.base / "config.json"
        config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
        with pytest.raises(UnsupportedError, match=r"attention_dropout is 0\.1"):
            self.run(job)


class TestHfPacked(EngineConformance):
    engine = engines.hf
    knobs: ClassVar = {**KNOBS, "layout": "packed"}

    def test_rows_hold_no_padding(self, job: Job) -> None:
        assert all(tokens.processed == tokens.input for tokens in self.run(job).tokens)

    def test_refuses_a_model_that_lets_documents_see_each_other(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        with pytest.raises(UnsupportedError, match="in llama with attention=sdpa documents see each other"):
            self.run(job)


def flash_attention(query: Any, key: Any, value: Any, bounds: Any, other: Any, longest: int, _: int, *rest: Any, **options: Any) -> Any:
    """What torch's kernel computes, document by document, on any device."""
    assert bounds is other
    assert bounds.dtype == torch.int32
    assert rest == (0.0, True, False)
    assert longest == int(bounds.diff().max())
    lengths = bounds.diff().tolist()
    documents = zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (query, key, value)), strict=True)
    scale = options["scale"]
    attended = [
        torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]
        for q, k, v in documents
    ]
    return torch.cat(attended, dim=1).transpose(0, 1), None


class TestHfVarlen(EngineConformance):
    """The bounds, shapes and scale that torch's kernel is given; the kernel itself needs a GPU (test_hf_gpu.py)."""

    engine = engines.hf
    knobs: ClassVar = {**KNOBS, "layout": "packed", "attention": "varlen"}

    @pytest.fixture(autouse=True)
    def _kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)

    def test_says_what_it_cannot_do_and_nothing_else(self, job: Job) -> None:
        said = engines.hf.unsupported(job.workload, parse(engines.hf.Knobs, self.knobs), CPU)
        assert (
            said == "attention=varlen needs a GPU; set attention=sdpa; attention=varlen computes in 16 bits only; "
            "set compute_dtype=bfloat16 or attention=sdpa"
        )

    def test_padded_rows_are_bounded_too(self, job: Job) -> None:
        packed, padded = self.run(with_train(job, "packed")), self.run(job, layout="padded")
        assert padded.losses == pytest.approx(packed.losses, rel=2e-5)
        assert padded.tokens[0].processed > packed.tokens[0].processed

    def test_a_wrong_bound_is_found_out_before_training(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        def joined(query: Any, key: Any, value: Any, bounds: Any, *rest: Any, **options: Any) -> Any:
            everything = torch.tensor([0, len(query)], dtype=torch.int32)
            return flash_attention(query, key, value, everything, everything, len(query), len(query), *rest[3:], **options)

        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", joined)
        with pytest.raises(UnsupportedError, match="attention=varlen documents see each other"):
            self.run(job)

    def test_the_window_of_a_sliding_attention_is_handed_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        windows: set[tuple[int, int]] = set()

        def kernel(*given: Any, **options: Any) -> Any:
            windows.add((options["window_size_left"], options["window_size_right"]))
            return flash_attention(*given, **options)

        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
        self.run(make_job(tmp_path, "mistral", stop_after=1))
        assert windows == {(LONGEST - 1, 0)}


def test_forced_cudnn_falls_back_on_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel|backend"):
        engines.hf.train(make_job(tmp_path), parse(engines.hf.Knobs, {**KNOBS, "attention": "cudnn"}), RecordingProbe())


def test_flash_attention_is_told_the_bounds_of_packed_documents() -> None:
    samples = make_samples(3)
    given = inputs(pack(samples), "cpu", packed=True, bounds=True)
    lengths = [len(sample) for sample in samples]
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert given["max_length_q"] == given["max_length_k"] == max(lengths)
    assert given["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert "attention_mask" not in given


@pytest.mark.parametrize("option", sorted(path.stem for path in (TREE / "conf" / "engine" / "hf").glob("*.yaml")))
def test_a_variant_is_called_what_its_file_is(option: str) -> None:
    raw = plain(compose_all([f"engine=hf/{option}", "machine=cuda"], multirun=False)[0][1])
    knobs = parse(engines.hf.Knobs, raw["engine"]["knobs"])
    assert engines.hf.variant(knobs) == option
    said = engines.hf.unsupported(make_workload(LLAMA, LORA), knobs, GPU)
    assert said is None or "pip install liger-kernel" in said


def test_moments_in_8_bits_need_a_gpu() -> None:
    said = engines.hf.unsupported(make_workload(LLAMA, FULL), parse(engines.hf.Knobs, {**KNOBS, "optimizer": "adamw_8bit"}), CPU)
    assert said == "optimizer=adamw_8bit is bitsandbytes' code for GPUs; use optimizer=adamw"


def test_other_knobs_have_names_of_their_own() -> None:
    changed: list[dict[str, Any]] = [
        {}, {"kernels": "liger"}, {"compile": True}, {"layout": "packed"}, {"attention": "eager"}, {"adapter_compute": "direct"},
        {"adapter_compute": "float32"}, {"recompute": "full"}, {"kernels": "liger", "recompute": "full"},
        {"optimizer": "adamw_8bit", "kernels": "liger"}, {"recompute": "selective"}, {"recompute": 3, "layout": "packed"},
    ]  # fmt: skip
    assert [engines.hf.variant(parse(engines.hf.Knobs, {**KNOBS, **one})) for one in changed] == [
        "default", "liger", "compile", "packed", "eager", "adapters-direct", "adapters-float32", "ckpt", "liger+ckpt", "liger+adamw8bit",
        "ckpt-selective", "packed+ckpt-every-3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "config", "method", "reason"),
    [
        ({"layout": "packed", "attention": "cudnn"}, LLAMA, LORA, "attention=cudnn would let packed documents see each other"),
        (
            {"attention": "cudnn"},
            {**LLAMA, "sliding_window": 8},
            LORA,
            f"sliding window, the model's is 8 and samples have up to {LONGEST}",
        ),
        ({"attention": "cudnn"}, {**LLAMA, "sliding_window": 8, "use_sliding_window": False}, LORA, None),
        ({"attention": "cudnn"}, {**LLAMA, "sliding_window": LONGEST}, LORA, None),
        ({"recompute": "selective", "compile": True}, LLAMA, LORA, "recompute=selective: a compiled layer chooses by itself"),
        ({"recompute": "selective", "kernels": "liger"}, LLAMA, LORA, "recompute=selective keeps what torch's own operations make"),
        ({"layout": "packed"}, {"model_type": "mamba"}, LORA, "'mamba' has no attention to keep documents apart"),
        ({"adapter_compute": "direct"}, LLAMA, FULL, "method=full has none"),
        ({"adapter_compute": "direct", "compute_dtype": "float32"}, LLAMA, LORA, "adapter_compute=direct is about bfloat16"),
        ({"kernels": "liger"}, {"model_type": "falcon"}, LORA, "Liger has no kernels for model_type 'falcon'"),
        ({"attention": "varlen", "compute_dtype": "float32"}, LLAMA, LORA, "attention=varlen computes in 16 bits only"),
        ({"attention": "flash_attention_3"}, LLAMA, LORA, "pip install flash-attn-3"),
        *([] if importlib.util.find_spec("bitsandbytes") else [({"optimizer": "adamw_8bit"}, LLAMA, FULL, "pip install bitsandbytes")]),
    ],
)
def test_what_cannot_go_together_on_a_gpu(
    knobs: dict[str, Any], config: dict[str, Any], method: dict[str, Any], reason: str | None
) -> None:
    chosen = parse(engines.hf.Knobs, {**KNOBS, "compute_dtype": "bfloat16", **knobs})
    said = engines.hf.unsupported(make_workload(config, method), chosen, GPU)
    assert said == reason or (reason is not None and said is not None and reason in said)


@pytest.mark.parametrize(("family", "config"), [("falcon", {"num_attention_heads": 4}), ("mamba", {})])
def test_models_that_choose_their_own_attention_are_refused_with_their_weights_closed(family: str, config: dict[str, Any]) -> None:
    opened = transformers.AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=1, vocab_size=64, **config)
    knobs = parse(engines.hf.Knobs, {**KNOBS, "attention": "varlen"})
    said = engines.hf._opened_reasons(opened, make_workload(LLAMA, LORA), knobs)
    assert [reason for reason in said if "cannot be given another attention" in reason]


@pytest.mark.parametrize(
    ("knobs", "machine", "reason"),
    [
        ({"kernels": "liger"}, CPU, "needs a GPU"),
        ({"attention": "flash_attention_2", "compute_dtype": "bfloat16"}, CPU, "needs a GPU"),
        ({"attention": "flash_attention_2"}, GPU, "16 bits"),
    ],
)
def test_impossible_knobs_are_refused_before_a_process_starts(knobs: dict[str, Any], machine: Any, reason: str) -> None:
    said = engines.hf.unsupported(make_workload(LLAMA, LORA), parse(engines.hf.Knobs, {**KNOBS, **knobs}), machine)
    assert said is not None
    assert reason in said


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    knobs = parse(engines.hf.Knobs, {**KNOBS, "kernels": "liger", "attention": "flash_attention_2", "compute_dtype": "bfloat16"})
    said = engines.hf.unsupported(make_workload(LLAMA, LORA), knobs, GPU)
    assert said is not None
    assert "pip install liger-kernel" in said
    assert "pip install flash-attn" in said


def test_dropout_in_the_config_is_refused() -> None:
    said = engines.hf.unsupported(make_workload({**LLAMA, "attention_dropout": 0.1}, LORA), parse(engines.hf.Knobs, KNOBS), CPU)
    assert said is not None
    assert "attention_dropout is 0.1" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler, when it is imported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which the compiler hides, but not from an error filter
def test_compile_changes_no_loss(tmp_path: Path) -> None:
    job = make_job(tmp_path, steps=1, warmup_steps=0)
    plain_, compiled = RecordingProbe(), RecordingProbe()
    engines.hf.train(with_train(job, "plain"), parse(engines.hf.Knobs, {**KNOBS, "micro_batch": 5}), plain_)
    engines.hf.train(job, parse(engines.hf.Knobs, {**KNOBS, "micro_batch": 5, "compile": True}), compiled)
    assert compiled.losses == pytest.approx(plain_.losses, rel=2e-6)
    assert compiled.grad_norms == pytest.approx(plain_.grad_norms, rel=1e-4)
