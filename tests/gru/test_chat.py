from typing import Any

import pytest

from gru.chat import chat_messages, is_chat, join_parts, message_end, message_start, render_messages
from gru.config_fields import CHAT_TEMPLATE


def test_messages_follow_each_other_and_the_next_one_can_begin() -> None:
    messages = [("user", "Hello {role}"), ("assistant", "Hi\n{content}")]
    text = render_messages(CHAT_TEMPLATE, messages)
    assert text == "user:\nHello {role}\n\nassistant:\nHi\n{content}\n\n"
    assert text.startswith(message_start(CHAT_TEMPLATE, "user") + "Hello {role}" + message_end(CHAT_TEMPLATE))
    assert render_messages("{content}", messages) == "Hello {role}Hi\n{content}"
    assert (message_start("<{role}>{content}", "x"), message_end("<{role}>{content}")) == ("<x>", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
            [("user", "a"), ("assistant", "")],
        ),
        (
            [{"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"}],
            [("tool", "ab")],
        ),
        (
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "system", "value": "s"}],
            [("user", "q"), ("assistant", "a"), ("system", "s")],
        ),
    ],
)
def test_the_chats_of_data_sets_become_roles_and_contents(value: Any, expected: list[tuple[str, str]]) -> None:
    assert is_chat(value)
    assert chat_messages(value) == expected


@pytest.mark.parametrize("value", [[], "x", {}, ["a"], [{"role": "user"}], [{"role": 1, "content": "x"}], [{}], None])
def test_what_is_not_a_chat_is_recognized(value: Any) -> None:
    assert not is_chat(value)


@pytest.mark.parametrize(
    "content", [1, [1], [{"type": "image_url", "image_url": "x"}], [{"type": "text"}], {"text": "x"}]
)
def test_content_that_is_not_text_is_refused_with_its_place(content: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        join_parts(content)
    with pytest.raises(ValueError, match="message 2: expected"):
        chat_messages([{"role": "user", "content": "x"}, {"role": "user", "content": content}])
