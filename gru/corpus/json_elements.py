"""The elements of a JSON array, found one after the other without parsing the array.

Reads one array, several of them, and objects that follow each other, in any layout. A damaged element costs itself:
after it, reading resumes at the next place that looks like the beginning of one. Memory holds the element that is read,
or a block. This module does not know what the elements are for.
"""

import re
from collections.abc import Iterator
from typing import Any

import orjson

from gru.corpus.json_values import STRING, Flawed, may_continue, parse
from gru.corpus.lines import BYTE_ORDER_MARK, Data
from gru.corpus.unpacking import BLOCK

_BETWEEN = re.compile(rb"[\s,]*+")
_GAP = re.compile(rb'\s*+,\s*+[{"]')
_NEXT = re.compile(rb'\s*+(?:\]|,\s*+["\[\]{}\w-])')  # the end of the array, or another element
_BLANK = re.compile(rb"\s*+(\S)")
_KEY = re.compile(rb"\{|%b\s*+:" % STRING.pattern, re.DOTALL)
_SCALAR = re.compile(rb'[^\s,"\[\]{}]++(?=[\s,"\[\]{}])')
_NO_BRACKET = rb'[^"\[\]{}]*+'
_BRACKET = re.compile(  # from one bracket outside of strings to the next
    rb"%b(?:%b%b)*+([\[\]{}])" % (_NO_BRACKET, STRING.pattern, _NO_BRACKET), re.DOTALL
)
_FIRST_KEY = re.compile(rb"\{\s*+(" + STRING.pattern + rb")\s*+:", re.DOTALL)
_PLAIN_KEY = re.compile(rb'\{\s*+("\w[^"\\]*")\s*+:')

_MOST_LEVELS = 1 << 16
_OVERLAP = 1 << 12  # bytes of a block that are searched again together with the next one
_REACH = 1 << 14  # bytes in which the end of an element is looked for by what follows it
_DAMAGED = Flawed(error="is damaged: its brackets or quotes do not match")
_PATIENCE = 16  # damaged elements in a row, or elements that end in another way than the ones before

Element = tuple[int, int, int, Any]
"""An element: its number in its array from 1 on, or 0 for an object outside of arrays; the byte at which it begins; its
size in bytes; its value, or a `Flawed`."""


def _shallow(levels: int) -> bytes:
    """Return the pattern of an array or object with at most so many levels of others in it."""
    inner = b"(?:%b|%b)" % (STRING.pattern, _shallow(levels - 1)) if levels else STRING.pattern
    return rb"[\[{]%b(?:%b%b)*+[\]}]" % (_NO_BRACKET, inner, _NO_BRACKET)


_SHALLOW = re.compile(rb'(%b|%b)\s*+,\s*+(?=[{"])' % (STRING.pattern, _shallow(4)), re.DOTALL)


class _Window:
    """The part of a file that is in memory."""

    def __init__(self, file: Data) -> None:
        self._file = file
        self._error: Exception | None = None
        self.data = b""
        self.start = 0  # the byte of the file at which `data` starts
        self.at = 0  # the index in `data` from which on it is still to be read

    @property
    def position(self) -> int:
        """The byte of the file at `at`."""
        return self.start + self.at

    def more(self) -> bool:
        """Drop what is before `at`, and read as much as remains, at least a block; False at the end of the file."""
        if self._error:
            raise self._error
        blocks, missing = [self.data[self.at :]], max(BLOCK, len(self.data) - self.at)
        try:
            while missing > 0 and (block := self._file.read1(BLOCK)):
                blocks.append(block)
                missing -= len(block)
        except Exception as error:  # raised when what was read before it has been used
            if len(blocks) == 1:
                raise
            self._error = error
        self.start += self.at
        self.at, self.data = 0, b"".join(blocks)
        return len(blocks) > 1

    def skip(self, pattern: re.Pattern[bytes]) -> bytes:
        """Move behind what matches the pattern, and return the next byte; empty at the end of the file."""
        while True:
            match = pattern.match(self.data, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.data) or not self.more():
                return self.data[self.at : self.at + 1]

    def seek(self, pattern: re.Pattern[bytes], start: int) -> bool:
        """Move to the first group of the pattern's next match from index `start` on, or else to the end of the file."""
        while not (match := pattern.search(self.data, start)):
            self.at = max(start, len(self.data) - _OVERLAP)
            if not self.more():
                self.at = len(self.data)
                return False
            start = 0
        self.at = match.start(1)
        return True


class ElementReader:
    """Reads the elements of a file, of which it is the only reader."""

    def __init__(self, file: Data) -> None:
        self._window = _Window(file)
        self._number = 0  # of the last element in its array
        self._inside = False  # an array
        self._failures = 0  # damaged elements since the last good one
        self._doubts = 0  # elements that may be parts of a damaged one, so that nothing is learned from them
        self._ended = False  # in a damaged element
        self._first = b""  # the first byte of good elements: that of objects, if there is one
        self._key = b""  # the first key of the last good object, in quotes
        self._boundary = b"}, {"  # from the last byte of an element to the first of the next
        self._key_boundary = self._boundary  # the same, to the first key of the next

    def __iter__(self) -> Iterator[Element]:
        """Yield the elements, and a `Flawed` for each piece of the file that is none."""
        window = self._window
        if window.more() and window.data.startswith(BYTE_ORDER_MARK):
            window.at = len(BYTE_ORDER_MARK)
        while byte := window.skip(_BETWEEN):
            if byte == b"[" and not self._inside:
                self._number, self._inside, window.at = 0, True, window.at + 1
            elif byte == b"]" and self._inside:
                self._inside, window.at = False, window.at + 1
            else:
                yield self._next_element(byte)
                yield from self._similar_elements()
        if self._inside and not self._ended:
            error = f"does not follow: the array has no end, so the file may be cut off at byte {window.position}"
            yield self._number + 1, window.position, 0, Flawed(error=error, reason="unreadable")

    def _similar_elements(self) -> Iterator[Element]:
        """Yield the elements in memory that begin and end as the one before did.

        If the bytes up to a place that looks like the end of an object or string are valid, it is the end.
        """
        window, data, number, boundary = self._window, self._window.data, self._number, self._boundary
        if not self._inside or not data.startswith(boundary, window.at - 1):
            return
        last, step = boundary[:1], len(boundary) - 2
        at = window.at + step
        unlike = 0  # number of elements that are still to be read by their brackets
        while True:
            if unlike:
                unlike -= 1
                match = _SHALLOW.match(data, at)
                if not match:
                    break
                end, following = match.end(1), match.end()
            else:
                end = data.find(last, at + 1)  # one byte is found faster than several
                if not data.startswith(boundary, end):
                    end = data.find(boundary, end, end + _REACH)
                end += 1
                following = end + step
            try:
                value = orjson.loads(data[at:end])
            except orjson.JSONDecodeError:
                if unlike:
                    break
                if len(boundary) < len(self._key_boundary):  # perhaps objects are in the element, with other keys
                    boundary = self._key_boundary
                else:
                    boundary, unlike = self._boundary, _PATIENCE
                continue
            number += 1
            yield number, window.start + at, end - at, value
            window.at, at = end, following
        self._number = number

    def _next_element(self, first: bytes) -> Element:
        """Return the element at `window.at`, and move behind it."""
        window = self._window
        self._number += self._inside
        if first == b"[" and self._is_stray_bracket():
            return self._damaged(_DAMAGED, window.at + 1)
        may_begin = self._inside or first == b"{" or first == self._first or not self._first
        end = self._find_end() if may_begin else -window.at - 1
        if end <= 0:
            return self._damaged(_DAMAGED, reach=-end)
        size = end - window.at
        following = self._byte_behind(size)
        at, end = window.at, window.at + size
        value = parse(window.data[at:end])
        if isinstance(value, Flawed) and value.value is None:
            self._doubts = _PATIENCE
            swallowed = self._swallowed(end)
            in_a_string = self._first == b'"' and first in b"{[" and not _NEXT.match(window.data, end)
            if swallowed or in_a_string or following not in (b",", b"]"):
                return self._damaged(value, swallowed, reach=end)
        elif first == b"[" and self._inside and not following:
            return self._damaged(_DAMAGED, at + 1)  # a stray bracket, which took the end of the array as its own
        elif first not in b"{[" and following not in b'[]{",':
            return self._damaged(_DAMAGED, reach=end)
        else:
            self._learn(first, end)
        self._failures, window.at = 0, end
        return self._number if self._inside else 0, window.start + at, size, value

    def _is_stray_bracket(self) -> bool:
        """Whether the bracket at `window.at` stands before an object by mistake, and does not begin a list of objects.

        What it begins is no list if it is damaged, longer than a block, or ends with the file.
        """
        window = self._window
        if not self._key or not self._pattern(rb"\[\s*+(\{)").match(window.data, window.at):
            return False
        while (end := _end(window.data, window.at)) >= 0 and not (end and _NEXT.match(window.data, end)):
            if len(window.data) - window.at > BLOCK or not window.more():
                return True
        return end < 0 or isinstance(parse(window.data[window.at : end]), Flawed)

    def _byte_behind(self, size: int) -> bytes:
        """Return the first byte behind the `size` bytes at `window.at` that is not white space; empty if none is."""
        window = self._window
        while not (match := _BLANK.match(window.data, window.at + size)):
            if not window.more():
                return b""
        return match[1]

    def _find_end(self) -> int:
        """Return the index at which the element ends; 0 if the file ends before, and -index where it is damaged."""
        window = self._window
        while not (end := _end(window.data, window.at)):
            size = len(window.data) - window.at
            if size > BLOCK and not may_continue(window.data[window.at :]):
                return -len(window.data)
            if not window.more():
                break
        return end

    def _learn(self, first: bytes, end: int) -> None:
        """Learn from a good element how it begins, and what is between it and the next."""
        data, at = self._window.data, self._window.at
        key = _FIRST_KEY.match(data, at)
        self._doubts = 0 if not self._key or (key and key[1] == self._key) else max(0, self._doubts - 1)
        if self._doubts:
            return
        if first == b"{" or not self._first:
            self._first = first if first in b'{"' else self._first
        self._key = key[1] if key else self._key
        if data[end - 1] in b'"}' and (gap := _GAP.match(data, end)):
            self._boundary = data[end - 1 : gap.end()]
            self._key_boundary = self._boundary + (data[at + 1 : key.end(1)] if key else b"")

    def _damaged(self, flaw: Flawed, start: int = 0, reach: int = 0) -> Element:
        """Return the damaged element at `window.at`, and move to the one at index `start`, or to one that is found.

        reach: the index up to which it was looked at; 0 for the end of the file.
        """
        window, position = self._window, self._window.position
        self._failures, self._doubts = self._failures + 1, _PATIENCE
        if not self._inside:  # the end of the array may have been that of a list in an object
            self._key = b""
        begin = window.at + 1
        if self._failures > _PATIENCE:  # so that the same bytes are not looked at for each of many beginnings
            begin = max(begin, (window.at + (reach or len(window.data))) // 2)
        found = bool(start) or window.seek(self._beginning(), begin)
        window.at = start or window.at
        self._ended = not found
        where = f"byte {window.position}"
        if not found and not reach:
            flaw = Flawed(error=f"is cut off: the file ends at {where}", reason="unreadable")
        elif not self._inside:
            flaw = Flawed(error=f"is not JSON, up to {where}", reason="unreadable")
        else:
            flaw = Flawed(error=f"{flaw.error}; reading resumes at {where}")
        return self._number if self._inside else 0, position, window.position - position, flaw

    def _beginning(self) -> re.Pattern[bytes]:
        """Return the pattern of the beginning of elements, which is its first group."""
        first = self._first or (b"{" if _KEY.match(self._window.data, self._window.at) else b'"')
        return re.compile(rb'(?<!\\)"\s*+,\s*+(")') if first == b'"' else self._pattern(rb"[},]\s*+(\{)")

    def _pattern(self, brace: bytes) -> re.Pattern[bytes]:
        """Return the pattern of the beginning of objects as they were, from a brace on, to which `brace` leads.

        In JSON, a brace and a key are in no string.
        """
        own = _PLAIN_KEY.match(self._window.data, self._window.at)
        known = self._key or (own[1] if own and self._inside else b"")
        key = re.escape(known) if known else STRING.pattern
        return re.compile(rb"%b\s*+%b\s*+:" % (brace, key), re.DOTALL)

    def _swallowed(self, end: int) -> int:
        """Return the index of the first beginning of an element in a string of the element here; 0 if there is none.

        Then a quote is missing or stray, and what looks like strings is what is between them.
        """
        data, at = self._window.data, self._window.at
        beginning = self._pattern(rb"\{")
        for string in STRING.finditer(data, at, end):
            brace = data.rfind(b"{", string.start(), string.end())
            if brace > at and (match := beginning.match(data, brace)) and match.end() > string.end():
                return brace
        return 0


def _end(data: bytes, at: int) -> int:
    """Return the index at which the value at `at` ends; 0 if the data ends before, and -index where it is damaged."""
    if data[at] in b"]}":
        return -at - 1
    if data[at] not in b"[{":
        match = (STRING if data[at] == ord('"') else _SCALAR).match(data, at)
        return match.end() if match else 0
    closing = bytearray()
    while match := _BRACKET.match(data, at):
        at = match.end()
        bracket = data[at - 1]
        if bracket in b"[{":
            closing.append(bracket + 2)  # "]" is two behind "[" in ASCII, and "}" behind "{"
            if len(closing) > _MOST_LEVELS:
                return -at
        elif bracket != closing.pop():
            return -at
        elif not closing:
            return at
    return 0
