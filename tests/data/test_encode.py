"""The tokens before a character are the same, whether counted in bytes or by the library's own offsets, for every kind of tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from harness.data.encode import Encoder

CORPUS = ["the cat sat on the mat, returning", "naïve café Ωmega \u212b 日本語 ", "Ġ▁  two  spaces\n\nlines"]
SPECIAL = AddedToken("<|end|>", special=True)


def trained(*, byte_level: bool, nfc: bool = False, trimmed: bool = False) -> Tokenizer:
    fast = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    specials = [SPECIAL] if byte_level else ["<unk>", SPECIAL]
    fast.train_from_iterator(CORPUS * 9, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=specials))
    if nfc:
        fast.normalizer = normalizers.NFC()
    if trimmed:
        fast.post_processor = processors.ByteLevel(trim_offsets=True)
    return fast


TOKENIZERS = {
    "byte level": trained(byte_level=True),
    "byte level, offsets trimmed": trained(byte_level=True, trimmed=True),
    "byte level, normalised": trained(byte_level=True, nfc=True),
    "metaspace": trained(byte_level=False),
}
pieces = st.lists(
    st.sampled_from(["the", " cat", "re", "turn", "é", "e\u0301", "\u212b", "日", "😀", " ", "\n\n", "<|end|>", "x"]),
    min_size=1,
    max_size=7,
)


def encoder(name: str) -> Encoder:
    return Encoder(SimpleNamespace(backend_tokenizer=TOKENIZERS[name]))


def by_offsets(fast: Any, text: str, character: int) -> int | None:
    """The definition: tokens that end at or before the character, none that begins before it and ends after it."""
    spans = fast.encode(text, add_special_tokens=False).offsets
    return None if any(start < character < end for start, end in spans) else sum(end <= character for _, end in spans)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(texts=st.lists(pieces.map("".join), min_size=1, max_size=4), data=st.data())
def test_the_count_is_that_of_the_definition(name: str, texts: list[str], data: st.DataObject) -> None:
    own = encoder(name)
    reference = TOKENIZERS["byte level" if name == "byte level, offsets trimmed" else name]
    for text, encoded in zip(texts, own.encode(texts), strict=True):
        assert encoded.ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        for character in {0, len(text), data.draw(st.integers(0, len(text)))}:
            expected = by_offsets(reference, text, character)
            if 0 < character < len(text):
                assert encoded.num_tokens_before(character) == expected
            else:
                assert encoded.num_tokens_before(character) == (0 if character == 0 else len(encoded.ids))


def test_byte_level_vocabularies_are_known_by_their_letters() -> None:
    assert encoder("byte level").lengths is not None
    assert encoder("metaspace").lengths is None


def test_a_space_that_merged_with_the_answer_is_seen_though_offsets_are_trimmed() -> None:
    (encoded,) = encoder("byte level, offsets trimmed").encode(["the cat"])
    assert encoded.num_tokens_before(4) is None
    assert encoded.num_tokens_before(3) == 1
