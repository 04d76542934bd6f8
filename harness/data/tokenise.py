"""Conversations to token ids and labels: the chat template's exact text, with everything but the assistant's turns unsupervised."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.data.encode import Encoded, Encoder
from harness.data.layouts import TEXT, Message
from harness.data.rows import BadRow, Row
from harness.data.tokens import IGNORE, Sample
from harness.errors import DataError
from harness.spec import Supervise

BATCH_ROWS = 512
BATCH_CHARACTERS = 2**22  # a batch ends here, so that long rows do not fill the memory
DATE = "26 Jul 2024"  # what templates that print the date are told (Llama 3.1's own default): tokens must not change overnight


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A sample, the row it comes from, and how many of its tokens did not fit into the sequence length."""

    row: Row
    sample: Sample
    tokens_truncated: int


@dataclass(frozen=True, slots=True)
class _Rendered:
    """The texts of a row, encoded one by one and joined as tokens, and the [start, stop) characters of the last that are supervised.

    ``framed``: between what the tokenizer begins a text with and the end-of-text token, which is supervised with what it ends.
    """

    row: Row
    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    framed: bool


class _UnmarkableError(Exception):
    """Why a row cannot be tokenised with its answers marked exactly."""


def tokenise(
    rows: Iterable[Row], tokenizer: Any, *, sequence_length: int, supervise: Supervise, system_prompt: str | None = None
) -> Iterator[Tokenised | BadRow]:
    """Samples of ``rows``, in order, at most ``sequence_length`` tokens each; a sample may be left without a supervised label.

    ``tokenizer``: a fast transformers tokenizer. A BadRow comes out where the answer cannot be marked exactly: a token would be
    part prompt and part answer, or the template's text for the prompt is not the beginning of its text for the whole. Raises
    DataError when the tokenizer cannot be used at all. While one batch is encoded, on all cores, the one before it is finished
    and the one after it rendered.
    """
    maker = _Maker(tokenizer, supervise, system_prompt, sequence_length)
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[list[_Rendered | BadRow], Any] | None = None
        for batch in _batches(rows):
            rendered = [maker.render(row) for row in batch]
            texts = [text for item in rendered if isinstance(item, _Rendered) for text in item.texts]
            encoding = pool.submit(maker.encoder.encode, texts)
            if waiting is not None:
                yield from maker.finish(waiting[0], waiting[1].result())
            waiting = rendered, encoding
        if waiting is not None:
            yield from maker.finish(waiting[0], waiting[1].result())


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(message.content) for message in row.messages)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Maker:
    """Renders rows as texts, and makes samples of their tokens."""

    def __init__(self, tokenizer: Any, supervise: Supervise, system_prompt: str | None, sequence_length: int) -> None:
        if not tokenizer.is_fast:
            raise DataError("the tokenizer is not a fast one (tokenizer.json); choose a model.tokenizer that has this file")
        if tokenizer.chat_template is None and tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has neither a chat template nor an end-of-text token, so answers would never end; choose another"
            )
        self._tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self._first: list[int] = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
        self._supervise = supervise
        self._system = Message("system", system_prompt) if system_prompt else None
        self._sequence_length = sequence_length

    def render(self, row: Row) -> _Rendered | BadRow:
        try:
            return self._render(row)
        except _UnmarkableError as problem:
            return BadRow(row.line, str(problem), row.file)

    def _render(self, row: Row) -> _Rendered:
        if row.messages[0].role == TEXT:
            return self._render_text(row)
        messages = row.messages
        if self._system and messages[0].role != "system":
            messages = (self._system, *messages)
        if self._tokenizer.chat_template:
            return self._render_chat(row, messages)
        if [message.role for message in messages] != ["user", "assistant"]:
            raise _UnmarkableError(
                "a conversation (or a system prompt), but the tokenizer has no chat template; "
                "use prompt/completion rows or another tokenizer"
            )
        prompt, completion = (message.content for message in messages)
        return _Rendered(row, (prompt, completion), ((0, len(completion)),), framed=True)

    def _render_text(self, row: Row) -> _Rendered:
        if self._system:
            raise _UnmarkableError("plain text, which is no conversation; expected turns after data.system_prompt: set it to null")
        if self._tokenizer.eos_token_id is None:
            raise _UnmarkableError("plain text, but the tokenizer has no end-of-text token; choose another")
        text = row.messages[0].content
        return _Rendered(row, (text,), ((0, len(text)),), framed=True)

    def _render_chat(self, row: Row, messages: Sequence[Message]) -> _Rendered:
        whole = self._apply(messages, generation=False)
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if self._supervise == "everything":
            return _Rendered(row, (whole,), ((0, len(whole)),), framed=False)
        spans = [self._span(messages, index, whole) for index in (answers if self._supervise == "answers" else answers[-1:])]
        return _Rendered(row, (whole,), tuple(spans), framed=False)

    def _span(self, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int]:
        """The characters that the template writes for this answer, its end included."""
        if index == 0:
            raise _UnmarkableError("the first message is the assistant's, an answer to nothing; expected a user's before it")
        before = self._apply(messages[:index], generation=True)
        after = whole if index == len(messages) - 1 else self._apply(messages[: index + 1], generation=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise _UnmarkableError(
                "the chat template writes the turns before an answer differently once the answer follows, so the answer cannot be marked; "
                "set data.supervise=last_answer, use one answer a row, or a tokenizer whose template only appends"
            )
        return len(before), len(after)

    def _apply(self, messages: Sequence[Message], *, generation: bool) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, date_string=DATE))
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise _UnmarkableError(f"the chat template refuses the roles {roles}: {error}") from error

    def finish(self, rendered: Sequence[_Rendered | BadRow], encoded: Sequence[Encoded]) -> Iterator[Tokenised | BadRow]:
        remaining = iter(encoded)
        for item in rendered:
            if isinstance(item, BadRow):
                yield item
                continue
            try:
                yield self._finish(item, list(itertools.islice(remaining, len(item.texts))))
            except _UnmarkableError as problem:
                yield BadRow(item.row.line, str(problem), item.row.file)

    def _finish(self, item: _Rendered, encoded: Sequence[Encoded]) -> Tokenised:
        last = encoded[-1]
        ids = last.ids
        if item.framed:
            ids = np.concatenate([self._first, *(part.ids for part in encoded), [self._tokenizer.eos_token_id]]).astype(np.int32)
        base = len(ids) - len(last.ids) - item.framed
        if self._supervise == "everything":
            labels = ids.copy()
        else:
            labels = np.full_like(ids, IGNORE)
            for start, stop in item.spans:
                first = base + _boundary(last, start)
                end = base + _boundary(last, stop) + (item.framed and stop == len(last.text))
                labels[first:end] = ids[first:end]
        labels[:1] = IGNORE  # nothing stands before the first token to predict it from
        sample = Sample(ids[: self._sequence_length], labels[: self._sequence_length])
        return Tokenised(item.row, sample, len(ids) - len(sample))


def _boundary(encoded: Encoded, character: int) -> int:
    found = encoded.num_tokens_before(character)
    if found is None:
        raise _UnmarkableError(
            "the end of the prompt and the start of the answer merge into one token, so the answer cannot be marked exactly; "
            "remove white space at the start of the answer"
        )
    return found
