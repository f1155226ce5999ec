"""The main text of web pages, without navigation, advertisements and markup.

This module does not know where the pages come from.
"""

import codecs
import re
from collections.abc import Iterator

from gru.corpus.encodings import detect_encoding
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
        yield from _main_text(page, problems)
    if damage:
        raise damage


def _main_text(page: bytes, problems: ProblemLog) -> Iterator[str]:
    try:
        import trafilatura  # takes a second
    except ImportError:
        raise UserError(
            f"{problems.span.file.path}: HTML needs the library trafilatura: pip install 'gru-pipeline[html]', or "
            f"leave the file out with {problems.options.key_of('exclude')}"
        ) from None
    try:
        yield trafilatura.extract(_decode(page, problems.options.encoding), include_comments=False) or ""
    except Exception as error:  # of the parser, which has types of its own; a page is never worth a traceback
        problems.drop("unreadable", f"is not a page that can be read: {first_line(error)}", size=len(page))


def _decode(page: bytes, encoding: str) -> str | bytes:
    """Return the page as text; as bytes, whose encoding the library guesses, if it neither declares one nor is UTF-8.

    encoding: of the source; another one than UTF-8 counts more than what the page declares.
    """
    name, mark = detect_encoding(page, encoding)
    declared = _DECLARATION.search(page[:_DECLARATION_BYTES])
    if name != "utf-8" or mark:
        return page[mark:].decode(name, errors="replace")
    if declared:
        try:
            codec = codecs.lookup(declared[1].decode("ascii", errors="replace")).name
            return page.decode(_SUPERSETS.get(codec, codec), errors="replace")
        except (LookupError, UnicodeError):
            pass
    try:
        return page.decode()
    except UnicodeDecodeError:
        return page
