"""Tokens and labels: supervised is exactly what the assistant says, whatever the text, and nothing is lost unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from harness.data.rows import Message, Row
from harness.data.tokenise import Tokenised, tokenise
from harness.data.tokens import IGNORE
from harness.errors import DataError
from tests.real_files import TOKENIZER

FILE = Path("rows.jsonl")
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map(lambda text: "a" + text)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def plain(tokenizer: Any) -> Any:
    """The same tokenizer without its template."""
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    return bare


def row(*turns: str, line: int = 1, system: str | None = None) -> Row:
    first = (Message("system", system),) if system else ()
    return Row(line, (*first, *(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))))


# 4,096 tokens: more than any conversation that hypothesis draws here can have (8 turns of 31 characters, 4 bytes each, and the template).
def run(tokenizer: Any, *rows: Row, length: int = 4096, mask_prompt: bool = True) -> list[Tokenised]:
    return list(tokenise(rows, tokenizer, sequence_length=length, mask_prompt=mask_prompt, source=FILE))


def supervised(tokenizer: Any, item: Tokenised) -> str:
    return str(tokenizer.decode(item.sample.input_ids[item.sample.labels != IGNORE]))


@quick
@given(words, words)
def test_only_the_answer_is_supervised(tokenizer: Any, prompt: str, completion: str) -> None:
    (item,) = run(tokenizer, row(prompt, completion))
    whole = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
    assert item.sample.input_ids.tolist() == tokenizer(whole)["input_ids"]
    labels = item.sample.labels
    assert np.array_equal(labels[labels != IGNORE], item.sample.input_ids[labels != IGNORE])
    prefix = len(tokenizer(whole[: whole.rindex(completion + "<|im_end|>")])["input_ids"])
    assert (labels[:prefix] == IGNORE).all()
    assert (labels[prefix:] != IGNORE).all()


@quick
@given(st.lists(words, min_size=1, max_size=4), st.none() | words)
def test_every_assistant_turn_is_supervised_and_no_other(tokenizer: Any, texts: list[str], system: str | None) -> None:
    turns = [text for pair in ((f"q{text}", text) for text in texts) for text in pair]
    (item,) = run(tokenizer, row(*turns, system=system))
    expected = tokenizer("".join(f"{text}<|im_end|>\n" for text in texts))["input_ids"]
    assert item.sample.input_ids[item.sample.labels != IGNORE].tolist() == expected


@quick
@given(words, words)
def test_without_a_template_parts_are_joined_as_tokens(plain: Any, prompt: str, completion: str) -> None:
    assume("<|" not in prompt + completion)
    (item,) = run(plain, row(prompt, completion))
    asked, answered = plain(prompt)["input_ids"], plain(completion)["input_ids"]
    assert item.sample.input_ids.tolist() == [*asked, *answered, plain.eos_token_id]
    assert item.sample.labels.tolist() == [*[IGNORE] * len(asked), *answered, plain.eos_token_id]


def test_mask_prompt_false_supervises_all_but_the_first_position(tokenizer: Any) -> None:
    (item,) = run(tokenizer, row("Why?", "So."), mask_prompt=False)
    assert item.sample.labels.tolist() == [IGNORE, *item.sample.input_ids.tolist()[1:]]


@pytest.mark.parametrize("length", [1, 5, 12, 13, 500])
def test_truncation_keeps_the_beginning_and_counts_the_rest(tokenizer: Any, length: int) -> None:
    (whole,) = run(tokenizer, row("Why?", "Because it is so."))
    (item,) = run(tokenizer, row("Why?", "Because it is so."), length=length)
    kept = min(length, len(whole.sample))
    assert item.sample.input_ids.tolist() == whole.sample.input_ids[:kept].tolist()
    assert item.sample.labels.tolist() == whole.sample.labels[:kept].tolist()
    assert item.tokens_truncated == len(whole.sample) - kept


def test_more_rows_than_a_batch_come_in_order(tokenizer: Any) -> None:
    rows = [row("n", str(number), line=number) for number in range(1200)]
    assert [supervised(tokenizer, item) for item in run(tokenizer, *rows)] == [f"{number}<|im_end|>\n" for number in range(1200)]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any, plain: Any) -> None:
    plain.chat_template = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
    with pytest.raises(DataError, match=r"rows.jsonl:4: the chat template writes the turns before an answer differently"):
        run(plain, row("Why?", "So.", line=4))


def test_a_template_that_refuses_the_roles_is_quoted(plain: Any) -> None:
    plain.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses the roles system, user: only user and assistant"):
        run(plain, row("Why?", "So.", system="Be brief."))


def test_an_answer_that_merges_with_the_prompt_is_refused(plain: Any) -> None:
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # no boundary at all
    assert len(plain("return")["input_ids"]) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: the end of the prompt and the start of the answer merge"):
        run(plain, row("ret", "urn"))


def test_all_bad_rows_of_a_file_are_named_up_to_twenty(plain: Any) -> None:
    with pytest.raises(DataError) as caught:
        run(plain, row("a", "b", line=1), *[row("a", "b", "c", "d", line=line) for line in range(2, 60)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("rows.jsonl:2: a conversation, but the tokenizer has no chat template")


def test_a_tokenizer_without_template_and_end_is_refused(plain: Any) -> None:
    plain.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an end-of-text token"):
        run(plain, row("a", "b"))
