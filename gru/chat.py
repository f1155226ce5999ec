"""Chats as text: the one form that text for training and prompts of the endpoint have in common.

This module knows the records that hold chats (OpenAI's and ShareGPT's), but neither the corpus nor HTTP.
"""

from collections.abc import Iterable
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for OpenAI's roles


def render_messages(template: str, messages: Iterable[tuple[str, str]]) -> str:
    """Return the messages, each as (role, content), one after the other in the form of the template.

    template: text with `{content}` and, before it, perhaps `{role}`, as in `corpus.chat_template`.
    """
    before, after = template.split("{content}")
    return "".join(before.replace("{role}", role) + content + after for role, content in messages)


def message_start(template: str, role: str) -> str:
    """Return the text before the content of a message of this role."""
    return template.split("{content}")[0].replace("{role}", role)


def message_end(template: str) -> str:
    """Return the text after the content of a message; it may be empty."""
    return template.split("{content}")[1]


def is_chat(value: Any) -> bool:
    """Whether the value is a list of messages: objects with `role` and `content`, or with `from` and `value`.

    A message with tool calls may have no content.
    """
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def chat_messages(value: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the (role, content) of each message of a chat; absent content is empty.

    Raises ValueError if the content of a message is not text.
    """
    messages = []
    for number, message in enumerate(value, 1):
        role, content = _names(message)
        try:
            messages.append((_ROLES.get(message[role], message[role]), join_parts(message.get(content))))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def join_parts(content: Any, types: tuple[str, ...] = ("text",)) -> str:
    """Return the text of a message's content: a string, a list of OpenAI's parts of these types, or null: empty.

    Raises ValueError at the first part that is not text: a long list must not become a long list of errors.
    """
    if content is None:  # a message with tool calls only
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("expected a string or a list of parts of type text")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") in types and isinstance(part.get("text"), str)):
            raise ValueError("expected parts of type text")
    return "".join(part["text"] for part in content)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role, content = _names(value)
    return isinstance(value.get(role), str) and (content in value or "tool_calls" in value)


def _names(message: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the fields that hold the role and the content."""
    return ("role", "content") if "role" in message else ("from", "value")
