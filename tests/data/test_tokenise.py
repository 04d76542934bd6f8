"""Tokens and labels: supervised is exactly what the assistant says, whatever the text, and nothing is lost unseen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from harness.data.layouts import TEXT, Message
from harness.data.rows import BadRow, Row
from harness.data.tokenise import Tokenised, tokenise
from harness.data.tokens import IGNORE
from harness.errors import DataError
from harness.spec import Supervise
from tests.real_files import TOKENIZER

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
def run(
    tokenizer: Any, *rows: Row, length: int = 4096, supervise: Supervise = "answers", system_prompt: str | None = None
) -> list[Tokenised]:
    made = list(tokenise(rows, tokenizer, sequence_length=length, supervise=supervise, system_prompt=system_prompt))
    assert not [item for item in made if isinstance(item, BadRow)]
    return [item for item in made if isinstance(item, Tokenised)]


def refused(tokenizer: Any, *rows: Row, supervise: Supervise = "answers", system_prompt: str | None = None) -> list[BadRow]:
    made = tokenise(rows, tokenizer, sequence_length=99, supervise=supervise, system_prompt=system_prompt)
    return [item for item in made if isinstance(item, BadRow)]


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


def test_everything_is_all_but_the_first_position_and_needs_no_marking(tokenizer: Any, plain: Any) -> None:
    (item,) = run(tokenizer, row("Why?", "So."), supervise="everything")
    assert item.sample.labels.tolist() == [IGNORE, *item.sample.input_ids.tolist()[1:]]
    plain.chat_template = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
    (item,) = run(plain, row("Why?", "So."), supervise="everything")
    assert plain.decode(item.sample.input_ids) == "...|So.|"


@quick
@given(st.lists(words, min_size=1, max_size=4), st.none() | words)
def test_the_last_answer_alone(tokenizer: Any, texts: list[str], system: str | None) -> None:
    turns = [text for pair in ((f"q{text}", text) for text in texts) for text in pair]
    every, last = (run(tokenizer, row(*turns, system=system), supervise=which)[0] for which in ("answers", "last_answer"))
    assert last.sample.input_ids.tolist() == every.sample.input_ids.tolist()
    assert supervised(tokenizer, last) == f"{texts[-1]}<|im_end|>\n"
    assert (last.sample.labels[-4:] != IGNORE).any()


def test_a_system_prompt_goes_before_rows_that_have_none_and_changes_no_digest(tokenizer: Any) -> None:
    own, added = run(tokenizer, row("Why?", "So.", system="Own."), row("Why?", "So."), system_prompt="Be brief.")
    assert tokenizer.decode(own.sample.input_ids).startswith("<|im_start|>system\nOwn.<|im_end|>")
    assert tokenizer.decode(added.sample.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")
    assert supervised(tokenizer, added) == "So.<|im_end|>\n"
    assert added.row.digest() == row("Why?", "So.").digest()


@pytest.mark.parametrize("supervise", ["answers", "last_answer", "everything"])
def test_plain_text_is_supervised_to_its_end_and_has_no_template(tokenizer: Any, supervise: Supervise) -> None:
    text = Row(1, (Message(TEXT, "As it is."),))
    (item,) = run(tokenizer, text, supervise=supervise)
    ids = [*tokenizer("As it is.")["input_ids"], tokenizer.eos_token_id]
    assert item.sample.input_ids.tolist() == ids
    assert item.sample.labels.tolist() == [IGNORE, *ids[1:]]
    (bad,) = refused(tokenizer, text, system_prompt="Be brief.")
    assert "plain text, which is no conversation" in bad.problem


def test_a_template_that_prints_the_date_prints_the_same_tomorrow(plain: Any) -> None:
    plain.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}|"
    (item,) = run(plain, row("Why?", "So."), supervise="everything")
    assert plain.decode(item.sample.input_ids) == "26 Jul 2024|Why?|So.|"


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


def test_a_template_that_rewrites_earlier_turns_is_refused(plain: Any) -> None:
    plain.chat_template = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
    (bad,) = refused(plain, row("Why?", "So.", line=4))
    assert (bad.line, bad.problem.partition(" differently")[0]) == (4, "the chat template writes the turns before an answer")


def test_a_template_that_drops_earlier_answers_still_gives_the_last(plain: Any) -> None:
    body = "{{ m.role }}:{{ m.content if m.role == 'user' or loop.last else '' }}|"
    plain.chat_template = f"{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
    talk = row("Why?", "So.", "How?", "Thus.")
    assert "set data.supervise=last_answer" in refused(plain, talk)[0].problem
    (item,) = run(plain, talk, supervise="last_answer")
    assert supervised(plain, item) == "Thus.|"


def test_a_template_that_refuses_the_roles_is_quoted(plain: Any) -> None:
    plain.chat_template = "{{ raise_exception('only user and assistant') }}"
    (bad,) = refused(plain, row("Why?", "So.", system="Be brief."))
    assert bad.problem == "the chat template refuses the roles system, user, assistant: only user and assistant"


def test_an_answer_to_nothing_is_refused(tokenizer: Any) -> None:
    greeting = Row(7, (Message("assistant", "Hi."), Message("user", "Why?"), Message("assistant", "So.")))
    (bad,) = refused(tokenizer, greeting)
    assert (bad.line, bad.problem.partition(",")[0]) == (7, "the first message is the assistant's")
    assert supervised(tokenizer, run(tokenizer, greeting, supervise="last_answer")[0]) == "So.<|im_end|>\n"


def test_an_answer_that_merges_with_the_prompt_is_refused(plain: Any) -> None:
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # no boundary at all
    assert len(plain("return")["input_ids"]) == 1
    (bad,) = refused(plain, row("ret", "urn"))
    assert bad.problem.startswith("the end of the prompt and the start of the answer merge into one token")


def test_bad_rows_come_in_their_place(plain: Any) -> None:
    made = list(tokenise([row("a", "b", line=1), row("a", "b", "c", "d", line=2), row("e", "f", line=3)], plain, sequence_length=9,
                         supervise="answers"))  # fmt: skip
    assert [item.line if isinstance(item, BadRow) else item.row.line for item in made] == [1, 2, 3]
    assert isinstance(made[1], BadRow)
    assert made[1].problem.startswith("a conversation (or a system prompt), but the tokenizer has no chat template")


def test_a_tokenizer_without_template_and_end_is_refused(plain: Any) -> None:
    plain.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an end-of-text token"):
        run(plain, row("a", "b"))
    plain.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    assert "no end-of-text token" in refused(plain, Row(1, (Message(TEXT, "x"),)))[0].problem
