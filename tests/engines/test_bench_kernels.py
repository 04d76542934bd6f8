"""The kernels' table without a GPU: every kernel has a row that runs, bytes are right, failures stay apart, the page says it all."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.native import kernels
from engines.native.bench import model_shape
from engines.native.bench_kernels import rows, variants
from engines.native.bench_kernels.__main__ import FAILURES, main, measured
from engines.native.bench_kernels.attention import causal_flops
from engines.native.bench_kernels.rows import ROWS
from engines.native.bench_kernels.setting import Call, Row, Setting
from engines.native.bench_kernels.table import COLUMNS, Measured, Section, line, page
from engines.native.bench_kernels.timing import Limits
from engines.native.shape import read_shape
from tests.engines.oracle import DEVICE, INTERPRETED, judged

pytestmark = INTERPRETED
SHAPE = read_shape(
    {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }, 1,
)  # fmt: skip
LIMITS = Limits(2e12, 5e14)


@pytest.fixture(scope="module")
def tiny() -> Setting:
    return Setting.of(SHAPE, 16, DEVICE, torch.float32)


def once(call: Call) -> float:
    if call.reset is not None:
        call.reset()
    call.run()
    return 0.25


def test_every_public_function_of_every_kernel_has_a_row(tiny: Setting) -> None:
    folder = Path(kernels.__file__).parent
    found = set()
    for file in sorted(folder.glob("*.py")):
        if file.stem in ("__init__", "launching"):
            continue
        module = importlib.import_module(f"{kernels.__name__}.{file.stem}")
        for name, value in vars(module).items():
            is_ours = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
            if is_ours and (inspect.isfunction(value) or hasattr(value, "step") or hasattr(value, "update")):
                found.add(value)
    assert len(found) >= 10
    with torch.no_grad():
        timed = {make(tiny).kernel for name, make in ROWS.items() if not name.startswith("attention")}
    assert timed == found


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("attention")])
def test_a_row_runs_its_kernel_and_its_reference(name: str, tiny: Setting) -> None:
    with torch.no_grad():
        row = measured(name, partial(ROWS[name], tiny), ("ours", "reference"), once, LIMITS.floor)
    assert row.problems == ()
    assert row.milliseconds == {"ours": 0.25, "reference": 0.25}
    assert row.floor == pytest.approx(1000 * row.num_bytes / 2e12)


@pytest.mark.parametrize("name", ["rms_norm_backward", "swiglu_backward", "swiglu_gradients", "rotate_back", "norm_rotate_back"])
def test_a_row_compares_the_same_results(name: str, tiny: Setting) -> None:
    def first(made: Any) -> torch.Tensor:
        tensor = made[-1] if isinstance(made, tuple) else made
        return tensor[:, : 2 * SHAPE.intermediate_size if name.startswith("swiglu") else None].clone()

    with torch.no_grad():
        row = ROWS[name](tiny)
        ours = first(row.ours.run())
        if row.reference.reset is not None:
            row.reference.reset()
        theirs = first(row.reference.run())
    judged(ours, theirs, theirs)


def test_the_reference_of_cross_entropy_is_its_loss_and_gradient() -> None:
    logits, targets = torch.randn(3, 7, requires_grad=True), torch.tensor([0, 6, 2])
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss.sum().backward()  # type: ignore[no-untyped-call]
    losses, gradient = rows.losses_and_gradient(logits.detach(), targets, torch.tensor(0.5))
    assert logits.grad is not None
    torch.testing.assert_close(losses, loss.detach())
    torch.testing.assert_close(gradient, 0.5 * logits.grad)


# By hand for 16 tokens, hidden 32, 64 columns, 4 and 2 heads of 32, padded rank 64, float32.
@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("embed", 16 * (2 * 4 * 32 + 8)),
        ("rms_norm", 4 * (16 * (32 + 32 + 32 + 32 + 64) + 32) + 4 * 16),
        ("rms_norm_backward", 4 * (16 * (32 + 32 + 32 + 32 + 64) + 32) + 4 * 16),
        ("swiglu", 4 * 16 * (64 + 64 + 64 + 64)),
        ("swiglu_backward", 4 * 16 * (3 * 64 + 3 * 64 + 64)),
        ("swiglu_gradients", 4 * 16 * (3 * 64 + 2 * 64 + 64 + 3 * 16) + 8 * (16 * 64 + 128 * 16)),
        ("rotate", 4 * 16 * 2 * (128 + 64) + 4 * 16 * 32),
        ("norm_rotate", 4 * (16 * 2 * (128 + 64) + 2 * 32) + 4 * 16 * 32),
        ("norm_rotate_back", 4 * (16 * (192 + 2 * 256 + 64) + 2 * 32) + 4 * 16 * 32),
        ("rotate_back", 4 * 16 * (2 * 256 + 64) + 4 * 16 * 32),
        ("cross_entropy", 2 * 4 * 16 * 64 + 12 * 16),
        ("decode_nf4", 32 * 64 // 2 + 32 + 4 + 4 * 32 * 64),
        ("copy_parts", 2 * 4 * (2 * 64 * 16 + 2 * 16 * 32)),
        ("quantise_wide", 16 * (4 * (128 + 64) + 128 + 3 * 64 + 4)),
        ("write_tail", 128 * (4 * 64 + 3 * 64 + 4)),
        ("write_low", 16 * (4 * 64 + 3 * 64 + 4)),
        ("decode_rows", 32 * (64 * 5 + 4)),
        ("rms_norm_codes", 16 * (32 * 17 + 8) + 4 * 32),
        ("swiglu_codes", 16 * (64 * 13 + 4)),
        ("outer_dA", 4 * (16 * (32 + 32) + 32) + 4 * 16 + 8 * 32 * 32),
        ("outer_dB", 4 * 16 * (256 + 48) + 8 * 256 * 16),
        # A: 3 x 16 + 2 x 16 rows of 32, 16 of 128, 16 of 64; B: 256 + 32 + 128 + 32 rows of 16; two layers.
        ("adamw", 36 * 2 * ((48 + 32) * 32 + 16 * (128 + 64) + (256 + 32 + 128 + 32) * 16)),
    ],
)
def test_bytes_that_must_move(name: str, num_bytes: int, tiny: Setting) -> None:
    with torch.no_grad():
        assert ROWS[name](tiny).num_bytes == num_bytes


def test_products_of_attention_and_the_documents(tiny: Setting) -> None:
    assert causal_flops(tiny, (2, 3), 2) == 2 * 2 * (3 + 6) * 128
    long = Setting(SHAPE, tiny.layer, 8192, DEVICE, torch.float32)
    assert long.even == (2048,) * 4
    assert long.uneven == (4096, 2048, 1024, 1024)
    assert tiny.even == (16,)


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    assert LIMITS.floor(2 * 10**12, 5 * 10**14) == 1000
    assert LIMITS.floor(10**12, 10**15) == 2000


def test_what_fails_is_a_problem_of_its_own() -> None:
    def fails() -> object:
        raise RuntimeError("out of\nmemory")

    row = Row(kernel=fails, size="1", ours=Call(fails), reference=Call(lambda: None), num_bytes=2 * 10**9, is_compiled=False)
    found = measured("x", lambda: row, COLUMNS, once, LIMITS.floor)
    assert found.problems == ("ours: RuntimeError: out of memory",)
    assert found.milliseconds == {"reference": 0.25, "torch.compile": None, "Liger": None}
    assert "failed: ours: RuntimeError: out of memory" in line(found)
    broken = measured("y", lambda: ROWS["missing"](None), COLUMNS, once, LIMITS.floor)  # type: ignore[arg-type]
    assert broken.problems == ("the tensors: KeyError: 'missing'",)


def test_torch_compile_is_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: lambda: ("compiled", run()))
    row = Row(kernel=once, size="1", ours=Call(lambda: 1), reference=Call(lambda: 2), num_bytes=1)
    made: list[object] = []
    measured("x", lambda: row, ("torch.compile",), lambda call: made.append(call.run()) or 1.0, LIMITS.floor)  # type: ignore[func-returns-value]
    assert made == [("compiled", 2)]


def test_the_page_holds_the_table_the_machine_and_the_failures() -> None:
    whole = Measured("a", "8 × 4", {"ours": 0.5, "reference": 2.0, "torch.compile": 1.0, "Liger": None}, 5 * 10**8, 10**10, 0.4)
    partly = Measured("b", "1", {}, problems=("ours: ValueError: no",))
    text = page([Section("llama3_8b", (whole, partly))], LIMITS, "Some GPU")
    assert "| a | 8 × 4 | 0.500 | 2.000 | 1.000 | – | 500 | 10 | 0.400 | 80 % |" in text
    assert "| b | 1 | – | – | – | – | 0 | – | – | – |" in text
    assert "- **failed**, b 1: ours: ValueError: no" in text
    assert "- device: Some GPU\n- limits: a copy moves 2.00 TB/s, a bf16 product of 8,192³ makes 500 TFLOP/s" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "## llama3_8b" in text
    assert "commit " in text
    assert "80 %" in line(whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense"], "--only nonsense: no such rows; known: rms_norm, "),
        (["--only", "rms_norm", "--variants"], "--only rms_norm: no such rows; known: swiglu_gradients, "),
        (["--model", "gpt5"], "--model gpt5: not in conf/model; known: "),
        (["--tokens", "3000"], "--tokens 3000: expected at least 16"),
        (["--tokens", "8"], "--tokens 8: expected at least 16"),
        (["--write", "x.md", "--no-compile"], "--write is for the whole table"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-compile"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_variants_run_and_one_is_what_the_engine_does(name: str, tiny: Setting) -> None:
    with torch.no_grad():
        chosen = variants.VARIANTS[name](tiny)
        assert sum(variant.is_current for variant in chosen) == 1
        assert len({variant.label for variant in chosen}) == len(chosen)
        for variant in (chosen[0], next(variant for variant in chosen if variant.is_current)):
            assert once(variant.call) == 0.25


def test_filling_with_one_product_is_filling(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    dy = tiny.random(16, 256 + 64)
    monkeypatch.setattr(Setting, "random", lambda self, *size, room=0: dy)
    with torch.no_grad():
        filled = []
        for variant in variants.VARIANTS["fill_qkv"](tiny):
            dy[:, 256:] = 0
            variant.call.run()
            filled.append(dy[:, 256:].clone())
    torch.testing.assert_close(filled[1], filled[0])
    torch.testing.assert_close(filled[2], filled[0])


def test_variants_are_listed_fastest_first_and_failures_last(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> object:
        raise ValueError("too much")

    chosen = [
        variants.Variant("slow", Call(lambda: 2), True),
        variants.Variant("wrong", Call(fails), False),
        variants.Variant("fast", Call(lambda: 1), False),
    ]
    monkeypatch.setattr(variants, "VARIANTS", {"x": lambda setting: chosen})
    found = list(variants.compared("x", tiny, lambda call: float(str(call.run())), FAILURES))
    assert found == ["x", "    1.0000 ms  fast", "    2.0000 ms  slow  <- now", "  wrong: failed: ValueError: too much"]


def test_models_that_the_command_names_by_default_exist() -> None:
    assert [model_shape(name, None).num_heads for name in ("llama3_8b", "llama3_1b")] == [32, 32]


def test_what_the_page_lacks_is_said() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    shown = set(re.findall(r"^\| (\w+) \| \d", (docs / "kernels.md").read_text(encoding="utf-8"), re.MULTILINE))
    missing = set(ROWS) - shown
    said = f"lacks {len(missing)} of the {len(ROWS)} rows that its command has now"
    assert (said in " ".join((docs / "engine.md").read_text(encoding="utf-8").split())) == bool(missing)
