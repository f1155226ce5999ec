"""The value in the bytes of one JSON record, however it was written: also what JSON forbids and programs write.

Read are NaN and infinity (as null, as `json.dump` writes them), numbers too large for a float (as their digits),
control characters in strings, half surrogate pairs and bytes that are not UTF-8 (as U+FFFD). This module does not know
what a record is for, or where it was.
"""

import json
import math
import re
from itertools import accumulate
from typing import Any, NamedTuple

import orjson

_MOST_LEVELS = 500  # of brackets, in what orjson does not read: `json` recurses, and Python allows 1000 levels
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKET = re.compile(rb"[^\[\]{}]++")
_LEVEL = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# Escapes of a pair of surrogates, of one without the other, and all others.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class Flawed(NamedTuple):
    """A record that has no value, or a mended one."""

    value: Any = None
    error: str = ""
    """What is wrong if there is no value, as the end of a sentence about the record."""
    reason: str = "bad_record"
    """The reason to count it under if there is no value."""
    invalid_byte: int | None = None
    """The first byte that is not UTF-8, which U+FFFD replaces."""
    surrogate: str = ""
    """The first escape of half a surrogate pair, which U+FFFD replaces."""


def parse(data: bytes) -> Any:
    """Return the value of a record, or a `Flawed` that says what was wrong with it."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return parse_leniently(data)


def parse_leniently(data: bytes) -> Any:
    """As `parse`, for a record that is not strict JSON."""
    if _is_deep(data):
        return Flawed(error=f"is nested too deeply, in more than {_MOST_LEVELS} brackets")
    text, invalid_byte = data.decode(errors="replace"), None
    try:
        data.decode()
    except UnicodeDecodeError as error:
        invalid_byte = error.start
    text, surrogate = _mend_surrogates(text)
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        place = len(text[: error.pos].encode())
        where = "" if invalid_byte is not None else f" at its byte {place}"
        return Flawed(error=f"is not valid JSON: {error.msg}{where}")
    if invalid_byte is None and not surrogate:
        return value
    return Flawed(value, invalid_byte=invalid_byte, surrogate=surrogate)


def may_continue(data: bytes) -> bool:
    """Whether more bytes after these can make a value of them."""
    if _is_deep(data):
        return False
    text = data.decode(errors="replace").rstrip()
    try:
        _loads(text)
    except json.JSONDecodeError as error:
        # An error at the end, such as in half an escape, or in the string that is not closed, may be due to the cut.
        return error.msg.startswith("Unterminated string") or error.pos >= len(text) - len(r"-Infinity")
    return True


def _loads(text: str) -> Any:
    return json.loads(text, strict=False, parse_constant=_null, parse_float=_float, parse_int=_int)


def _null(_: str) -> None:
    return None


def _float(digits: str) -> float | str:
    value = float(digits)
    return value if math.isfinite(value) else digits


def _int(digits: str) -> int | str:
    return int(digits) if len(digits) < 4000 else digits  # Python refuses to convert more


def _mend_surrogates(text: str) -> tuple[str, str]:
    """Return the JSON text with U+FFFD in place of half surrogate pairs, and the first of them or an empty string."""
    halves: list[str] = []

    def mend(escape: re.Match[str]) -> str:
        if not escape[1]:
            return escape[0]
        halves.append(escape[0])
        return r"\ufffd"

    return _ESCAPE.sub(mend, text), halves[0] if halves else ""


def _is_deep(data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= _MOST_LEVELS:
        return False
    brackets = _NO_BRACKET.sub(b"", STRING.sub(b"", data))
    return max(accumulate(_LEVEL[bracket] for bracket in brackets), default=0) > _MOST_LEVELS
