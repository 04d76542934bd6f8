"""Conversations to token ids and labels: the chat template's exact text, with everything but the assistant's turns unsupervised."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.rows import MAX_PROBLEMS, Message, Row
from harness.data.tokens import IGNORE, Sample
from harness.errors import DataError

VERSION = 1  # raise when the same rows would become other tokens
BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A sample, the row it comes from, and how many of its tokens did not fit into the sequence length."""

    row: Row
    sample: Sample
    tokens_truncated: int


@dataclass(frozen=True, slots=True)
class _Marked:
    """All tokens of a row, and the [start, stop) spans of them that are the assistant's."""

    ids: list[int]
    spans: list[tuple[int, int]]


class _UnmarkableError(Exception):
    """Why a row cannot be tokenised with its answers marked exactly."""


def tokenise(rows: Iterable[Row], tokenizer: Any, *, sequence_length: int, mask_prompt: bool, source: Path) -> Iterator[Tokenised]:
    """Samples of ``rows``, in order, at most ``sequence_length`` tokens each; a sample may be left without a supervised label.

    ``tokenizer``: a transformers tokenizer. Raises DataError that names the lines of ``source`` where the template's text for
    the prompt is not the beginning of its text for the whole, so that the answer could not be marked exactly.
    """
    problems: list[str] = []
    mark = _mark_with_template if tokenizer.chat_template else _mark_plain
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, BATCH_ROWS)):
        for row, marked in mark(batch, tokenizer):
            if isinstance(marked, _UnmarkableError):
                problems.append(f"{source.name}:{row.line}: {marked}")
            elif not problems:
                yield _finish(row, marked, sequence_length, mask_prompt)
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise DataError("\n".join(problems[:MAX_PROBLEMS]))


def _finish(row: Row, marked: _Marked, sequence_length: int, mask_prompt: bool) -> Tokenised:
    ids = np.array(marked.ids, dtype=np.int32)
    labels = np.full_like(ids, IGNORE)
    for start, stop in marked.spans if mask_prompt else [(0, len(ids))]:
        labels[start:stop] = ids[start:stop]
    labels[:1] = IGNORE  # nothing stands before the first token to predict it from
    sample = Sample(ids[:sequence_length], labels[:sequence_length])
    return Tokenised(row, sample, len(ids) - len(sample))


def _mark_with_template(rows: Sequence[Row], tokenizer: Any) -> Iterator[tuple[Row, _Marked | _UnmarkableError]]:
    """Every text of every row is rendered first and encoded in one call, which the tokenizers library spreads over the cores."""
    texts: list[str] = []
    cuts: list[list[tuple[int, int]] | _UnmarkableError] = []
    for row in rows:
        try:
            own, spans = _render(row, tokenizer)
        except _UnmarkableError as problem:
            cuts.append(problem)
            continue
        cuts.append([(len(texts) + begin, len(texts) + end) for begin, end in spans])
        texts.extend(own)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for row, cut in zip(rows, cuts, strict=True):
        yield row, cut if isinstance(cut, _UnmarkableError) else _marked(cut, encoded)


def _render(row: Row, tokenizer: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """The distinct texts of a row, the whole last, and for each assistant turn the texts that end before and after it."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(row.messages):
        if message.role == "assistant":
            texts.append(_apply(tokenizer, row.messages[:index], generation=True))
            texts.append(_apply(tokenizer, row.messages[: index + 1], generation=False))
            spans.append((len(texts) - 2, len(texts) - 1))
    whole = texts[-1]  # a row ends with an assistant's turn
    for begin, end in spans:
        if not (texts[end].startswith(texts[begin]) and whole.startswith(texts[end])):
            raise _UnmarkableError(
                "the chat template writes the turns before an answer differently once the answer follows, so the answer cannot be marked; "
                "use one answer a row, or a tokenizer whose template only appends"
            )
    return texts, spans


def _apply(tokenizer: Any, messages: Sequence[Message], *, generation: bool) -> str:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages) or "none"
        raise _UnmarkableError(f"the chat template refuses the roles {roles}: {error}") from error


def _marked(cut: list[tuple[int, int]], encoded: Sequence[list[int]]) -> _Marked | _UnmarkableError:
    whole = encoded[cut[-1][1]]
    spans = [(len(encoded[begin]), len(encoded[end])) for begin, end in cut]
    for begin, end in cut:
        for part in (encoded[begin], encoded[end]):
            if whole[: len(part)] != part:
                return _UnmarkableError(
                    "the end of the prompt and the start of the answer merge into one token, so the answer cannot be marked exactly; "
                    "remove white space at the start of the answer"
                )
    return _Marked(whole, spans)


def _mark_plain(rows: Sequence[Row], tokenizer: Any) -> Iterator[tuple[Row, _Marked | _UnmarkableError]]:
    """Without a template: prompt, completion and the end-of-text token, joined as tokens, after what the tokenizer begins a text with."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has neither a chat template nor an end-of-text token, so answers would never end; choose another")
    first: list[int] = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
    for row in rows:
        if [message.role for message in row.messages] != ["user", "assistant"]:
            yield (
                row,
                _UnmarkableError("a conversation, but the tokenizer has no chat template; use prompt/completion rows or another tokenizer"),
            )
            continue
        prompt, completion = tokenizer([message.content for message in row.messages], add_special_tokens=False)["input_ids"]
        start = len(first) + len(prompt)
        ids = [*first, *prompt, *completion, tokenizer.eos_token_id]
        yield row, _Marked(ids, [(start, len(ids))])
