"""The text of the value of a record's field, written as a person would: lists as lines, dates in ISO 8601.

This module does not know the formats that records come from, or how the text is used.
"""

import datetime
import math
from decimal import Decimal
from typing import Any

from gru.chat import chat_messages, is_chat, render_messages

_MOST_LEVELS = 32  # lists in lists
_MOST_ZEROS = 18  # behind a number's digits, or before them


def field_text(value: Any, chat_template: str, errors: str = "strict") -> str:
    """Return the text of a value; that of null is empty.

    A list becomes lines, also one of lists; a chat (see gru.chat) takes the form of `chat_template`; bytes are UTF-8.
    Raises UnicodeDecodeError for bytes that are not UTF-8 if `errors` is "strict" (as in `bytes.decode`), and
    ValueError, with what the value is and the remedy, for objects and what else is not text.
    """
    return _text(value, chat_template, errors, 0)


def _text(value: Any, chat_template: str, errors: str, level: int) -> str:
    match value:
        case str():
            return value
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float() | Decimal():
            return _digits(value)
        case list():
            if all(type(item) is str for item in value):
                return "\n".join(value)
            if is_chat(value):
                return _chat_text(value, chat_template)
            if level == _MOST_LEVELS:
                raise ValueError("has too many lists in each other")
            return "\n".join(_text(item, chat_template, errors, level + 1) for item in value)
        case bytes():
            return value.decode(errors=errors)
        case datetime.datetime():
            return value.isoformat(" ")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return str(value)
    raise ValueError(_remedy(value, level))


def _chat_text(value: list[Any], chat_template: str) -> str:
    try:
        return render_messages(chat_template, chat_messages(value))
    except ValueError as error:
        raise ValueError(f"is a chat, but {error}") from None


def _digits(value: int | float | Decimal) -> str:
    """Return a number in digits, without an exponent where they are few; what is not a number is empty, as null is."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return ""
    number = Decimal(str(value))
    return f"{number:f}" if -_MOST_ZEROS < number.adjusted() < _MOST_ZEROS else str(value)


def _remedy(value: Any, level: int) -> str:
    """Return what the value is and what to do, as the end of a sentence about its field."""
    kind = "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"
    what = f"is a list with an item that is {kind}" if level else f"is {kind}"
    if isinstance(value, dict) and value:
        return f"{what}, not text: name one of its fields, as in {{FIELD.{next(iter(value))}}}"
    return f"{what}, not text"
