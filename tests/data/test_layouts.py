"""Layouts: what each makes of a row, how one is told from another, and every way the turns can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from harness.data.layouts import SPEAKERS, TEXT, BadRowError, Message, detect, pair_reader, reader
from harness.spec import Fields, Layout

PAIR = (Message("user", "Why?"), Message("assistant", "So."))
SYSTEM = Message("system", "Be brief.")
TURNS = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("layout", "row", "messages"),
    [
        ("messages", {"messages": CHAT}, PAIR),
        ("messages", {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "id": 3}, (SYSTEM, *PAIR)),
        ("sharegpt", {"conversations": TURNS}, PAIR),
        ("sharegpt", {"conversations": TURNS, "system": ""}, PAIR),
        ("sharegpt", {"conversations": TURNS, "system": "Be brief."}, (SYSTEM, *PAIR)),
        ("sharegpt", {"conversations": [{"from": "system", "value": "Be brief."}, *TURNS], "system": None}, (SYSTEM, *PAIR)),
        ("alpaca", {"instruction": "Why?", "output": "So."}, PAIR),
        ("alpaca", {"instruction": "Why?", "input": " ", "output": "So.", "text": "all of it"}, PAIR),
        ("alpaca", {"instruction": "Why?", "input": None, "output": "So.", "system": "Be brief."}, (SYSTEM, *PAIR)),
        ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, (Message("user", "Add.\n\n1 1"), Message("assistant", "2"))),
        ("prompt_completion", {"prompt": "Why?", "completion": "So."}, PAIR),
        ("text", {"text": " As it is.\n"}, (Message(TEXT, " As it is.\n"),)),
    ],
)
def test_a_row_is_told_by_its_keys_and_read(layout: Layout, row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert detect(row) == layout
    assert reader(layout)(row) == messages


def test_every_name_of_a_speaker_is_known() -> None:
    answered = {"from": "gpt", "value": "So."}
    for name, role in SPEAKERS.items():
        turns = [{"from": name, "value": "Why?"}, answered]
        assert reader("sharegpt")({"conversations": turns})[0].role == role


def test_any_two_fields_can_be_mapped() -> None:
    read = pair_reader(Fields(prompt="q", completion="a"))
    assert read({"q": "Why?", "a": "So.", "id": 7}) == PAIR
    with pytest.raises(BadRowError, match=r"no field 'a' \(found q\)"):
        read({"q": "Why?"})


def test_a_row_of_no_layout_is_not_guessed() -> None:
    assert detect({"question": "Why?", "answer": "So.", "instruction": "x"}) is None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "'messages' is text; expected a list"),
        ([], "'messages' is an empty list"),
        (["hi"], "messages[0] is text; expected an object"),
        ([{"role": "tool", "content": "x"}], 'messages[0].role is "tool"; expected one of system, user, assistant'),
        ([{"role": ["x" * 900], "content": "x"}], "messages[0].role is [\"xxx"),
        ([{"content": "x"}], "messages[0].role is null"),
        ([{"role": "user"}], "no field 'messages[0].content' (found role)"),
        ([{"role": "user", "content": None}], "'messages[0].content' is null; expected text"),
        ([{"role": "user", "content": "x"}], "the last message is the user's"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "messages[1] is a system message"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "first message; the last message is the system's"),
        ([{"role": "tool"}, {"role": "user", "content": 3}], "expected one of system, user, assistant; no field 'messages[0].content'"),
        ([{"role": "user"}, {"role": "user", "content": 3}], "that holds text; 'messages[1].content' is a number; expected text"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named(messages: object, said: str) -> None:
    with pytest.raises(BadRowError) as caught:
        reader("messages")({"messages": messages})
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_of_a_row_with_many_problems_the_first_five_are_named() -> None:
    with pytest.raises(BadRowError) as caught:
        reader("messages")({"messages": [{"role": "user", "content": ""}] * 200})
    wanted = [f"'messages[{place}].content' is empty; expected text" for place in range(5)]
    assert str(caught.value) == "; ".join([*wanted, "and 195 more problems"])


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("messages", {"prompt": "x", "completion": "y"}, "no field 'messages' (found completion, prompt)"),
        ("sharegpt", {"conversations": CHAT}, "conversations[0].from is null; expected one of human"),
        ("sharegpt", {"conversations": TURNS[:1]}, "the last message is the human's"),
        ("sharegpt", {"conversations": [{"from": "system", "value": "a"}, *TURNS], "system": "b"}, "a field 'system' and a first turn"),
        ("sharegpt", {"conversations": TURNS, "system": 3}, "'system' is a number; expected text"),
        (
            "sharegpt",
            {"conversations": {}, "system": 3},
            "'conversations' is an object; expected a list of {from, value} objects; 'system' is",
        ),
        ("alpaca", {"instruction": "x", "input": ["y"], "output": "z"}, "'input' is a list; expected text"),
        ("alpaca", {"instruction": "x", "output": ""}, "'output' is empty"),
        ("text", {"text": "\n"}, "'text' is empty"),
    ],
)
def test_a_row_that_is_not_of_its_layout_is_named(layout: Layout, row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRowError) as caught:
        reader(layout)(row)
    assert said in str(caught.value)
