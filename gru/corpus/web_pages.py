"""The main text of web pages, without navigation, advertisements and markup.

This module does not know where the pages come from.
"""

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress

from gru.corpus.encodings import UTF8, detect_encoding
from gru.corpus.lines import Data
from gru.corpus.report import ProblemLog
from gru.corpus.unpacking import BLOCK, Damage
from gru.errors import UserError, first_line

_DECLARATION = re.compile(rb"""<meta[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
# What browsers read instead of a declared encoding (https://encoding.spec.whatwg.org/#names-and-labels).
_SUPERSETS = {
    **{"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949"},
    **{"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874"},
    **{"utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8"},
}
_REPLACEMENT = "\ufffd"
_DECLARATION_BYTES = 1 << 12  # bytes at the beginning of a page in which its encoding may be declared


def read_page(data: Data, problems: ProblemLog) -> Iterator[str]:
    """Yield the text of a page, which is empty if it has none. Raises UserError if the library is not installed."""
    parts, damage = [], None
    try:
        while block := data.read1(BLOCK):
            parts.append(block)
    except Damage as error:
        damage = error
    page = b"".join(parts)
    if page or not damage:
        yield from _main_text(page, problems, damage is not None)
    if damage:
        raise damage


def _main_text(page: bytes, problems: ProblemLog, is_cut: bool) -> Iterator[str]:
    try:
        import trafilatura  # takes a second
    except ImportError:
        raise UserError(
            f"{problems.span.file.path}: HTML needs the library trafilatura: pip install 'gru-pipeline[html]', or "
            f"leave the file out with {problems.options.key_of('exclude')}"
        ) from None
    if (text := _decode(page, problems, is_cut)) is None:
        return
    try:
        yield trafilatura.extract(text, include_comments=False) or ""
    except Exception as error:  # of the parser, which has types of its own; a page is never worth a traceback
        problems.drop("unreadable", f"is not a page that can be read: {first_line(error)}", size=len(page))


def _decode(page: bytes, problems: ProblemLog, is_cut: bool) -> str | bytes | None:
    """Return the page as text, or None if it is not valid in its encoding, and left out.

    It is returned as bytes, whose encoding the library guesses, if it declares none and is not like UTF-8. is_cut:
    whether the page may end within a character.
    """
    name, mark = detect_encoding(page, problems.options.encoding)
    data, declares = page[mark:], True
    if name == UTF8 and not mark:  # another encoding of the source counts more than what the page declares
        declared = _declared_encoding(page)
        name, declares = declared or UTF8, declared is not None
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        start, is_end = error.start, error.end == len(data)
    if is_cut and is_end:
        return data[:start].decode(name)
    if not mark and name != UTF8:
        with suppress(UnicodeDecodeError):  # pages often declare an encoding that they are not in
            return data.decode()
    text = data.decode(name, errors="replace")
    if not declares and text.count(_REPLACEMENT) > sum(character > "\x7f" for character in text) / 2:
        return page
    message = f"not valid {name.upper()} at byte {mark + start}"
    return text if problems.replaces("invalid_utf8", message, len(page)) else None


def _declared_encoding(page: bytes) -> str | None:
    """Return the encoding that a page declares, as browsers understand it; None if Python does not know it."""
    declared = _DECLARATION.search(page[:_DECLARATION_BYTES])
    try:
        name = codecs.lookup(declared[1].decode("ascii", errors="replace")).name if declared else ""
        name = _SUPERSETS.get(name, name)
        b"".decode(name)  # refuses encodings that are not of text, such as hex
    except (LookupError, UnicodeError):
        return None
    return name or None
