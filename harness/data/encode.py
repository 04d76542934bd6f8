"""Texts to token ids in batches, and the number of tokens before any character: exactly, or the knowledge that there is no such number."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.data.tokens import Ints

SPACE, LINE_END = "Ġ", "Ċ"  # in the alphabet of byte-level vocabularies
SENTENCEPIECE_SPACE = "▁"
_UNKNOWN = -(2**40)  # bytes of a token that stands for no known text: no sum with it can be right


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text and its token ids, int32. ``ends``: the byte of the batch at which each token ends, counted from ``start``, where known."""

    text: str
    ids: npt.NDArray[np.int32]
    ends: Ints | None
    start: int
    encoder: Encoder

    def num_tokens_before(self, character: int) -> int | None:
        """The tokens of the first ``character`` characters; None when a token stands on both sides of that place."""
        if character == 0:
            return 0
        if character == len(self.text):
            return len(self.ids)
        size = character if self.text.isascii() else len(self.text[:character].encode())
        whole = len(self.text) if self.text.isascii() else len(self.text.encode())
        if self.ends is None or int(self.ends[-1]) - self.start != whole:  # not these bytes: a normaliser changed some
            return _by_offsets(self.encoder.encoding(self.text), character, len(self.text))
        place = int(self.ends.searchsorted(self.start + size))
        return place + 1 if self.ends[place] == self.start + size else None


class Encoder:
    """A fast tokenizer without truncation, padding and special tokens of its own.

    Byte-level vocabularies (GPT-2's and all that follow it) say how many bytes each token stands for, so that the library can leave
    out its bookkeeping of characters, a quarter of its work. For others it is asked for.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer, processors

        self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")  # others trim spaces off the offsets
        self.lengths = _byte_lengths(self._fast)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """All texts in one call, which the tokenizers library spreads over the cores."""
        found = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        ids = np.array(list(itertools.chain.from_iterable(found)), dtype=np.int32)
        ends = np.cumsum(self.lengths[ids]) if self.lengths is not None else None
        encoded = []
        start = 0
        for text, own in zip(texts, found, strict=True):
            stop = start + len(own)
            before = int(ends[start - 1]) if ends is not None and start else 0
            encoded.append(Encoded(text, ids[start:stop], ends[start:stop] if ends is not None and own else None, before, self))
            start = stop
        return encoded

    def encoding(self, text: str) -> Any:
        """One text with the characters of every token."""
        return self._fast.encode(text, add_special_tokens=False)


def _byte_lengths(fast: Any) -> Ints | None:
    """Bytes of text by token id; None unless the vocabulary is a byte-level one, in which every byte has its own character."""
    from tokenizers import pre_tokenizers

    alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = fast.get_vocab(with_added_tokens=False)
    if not {SPACE, LINE_END} <= vocabulary.keys() or SENTENCEPIECE_SPACE in vocabulary:
        return None
    added = fast.get_added_tokens_decoder()
    lengths = np.full(1 + max([*vocabulary.values(), *added]), _UNKNOWN, dtype=np.int64)
    for token, number in vocabulary.items():
        if alphabet.issuperset(token):
            lengths[number] = len(token)
    for number, token in added.items():
        lengths[number] = len(token.content.encode())
    return lengths


def _by_offsets(encoding: Any, character: int, length: int) -> int | None:
    for place in range(character, length):
        token = encoding.char_to_token(place)
        if token is not None:  # a tokenizer may drop characters, such as spaces
            return int(token) if encoding.token_to_chars(token)[0] >= character else None
    return len(encoding)
