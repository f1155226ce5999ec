"""The encoders: text to token ids by a table of characters, a dictionary of words, or a library for pieces of words.

An encoder takes texts and whether it may use all cores, and returns the token ids [tokens] of all texts end to end and
the end [texts] of each text in them. This module knows tokens and their bytes, but not how a file describes them.
"""

import logging
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from gru.corpus.tokenizer_files import WORD_PATTERN, TokenizerFile
from gru.corpus.tokenizer_probes import PROBES, first_difference
from gru.errors import UserError, first_line

Ids = np.ndarray[Any, np.dtype[np.uint32]]
Ends = np.ndarray[Any, np.dtype[np.int64]]
Encoder = Callable[[list[str], bool], tuple[Ids, Ends]]

_RECREATE_TOKENS = 1 << 24  # tokens after which gigatoken's tokenizer, which caches all words, is created again
_STRETCH = 1 << 20  # characters whose words are held at once
_PROBED_TOKENS = 4096  # tokens of the vocabulary that are part of a probe
_WORDS = re.compile(WORD_PATTERN)
_BORDER = re.compile(r"(?= )|(?<=\n)")  # where one word ends and another starts, whatever they are
_log = logging.getLogger(__name__)


def choose_encoder(file: TokenizerFile) -> tuple[str, Encoder]:
    """Return the name of the fastest encoder that gives the right ids, and the encoder.

    Raises UserError if decoding does not return the probes.
    """
    match file.kind:
        case "table":
            return "table", table_encoder(file)
        case "words":
            return "words", word_encoder(file)
        case "pieces":
            return _library_encoder(file)


def table_encoder(file: TokenizerFile) -> Encoder:
    """Return the encoder of characters, with bytes for those outside the vocabulary."""
    byte_ids = np.array(file.byte_ids, dtype=np.int32)
    table = np.full(0x110000, -1, dtype=np.int32)
    bytes_and_gaps = {*file.byte_ids, *(i for i, piece in enumerate(file.token_bytes) if not piece)}
    for index, piece in enumerate(file.token_bytes):
        if index not in bytes_and_gaps:
            table[ord(piece.decode())] = index

    def encode(texts: list[str], parallel: bool) -> tuple[Ids, Ends]:
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        ids = table[codes]
        widths = np.ones(len(ids), dtype=np.int64)
        unseen = ids < 0
        if unseen.any():
            codes = codes[unseen]
            widths[unseen] = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
            utf8 = codes.tobytes().decode("utf-32-le").encode()
            ids = np.repeat(ids, widths)
            ids[ids < 0] = byte_ids[np.frombuffer(utf8, dtype=np.uint8)]
        borders = np.cumsum([len(text) for text in texts], dtype=np.int64)
        return ids.astype(np.uint32), np.concatenate([[0], np.cumsum(widths)])[borders]

    return encode


def word_encoder(file: TokenizerFile) -> Encoder:
    """Return the encoder of words, with bytes for those outside the vocabulary."""
    byte_ids = np.array(file.byte_ids, dtype=np.int64)
    words = {word: index for index, piece in enumerate(file.token_bytes) if (word := _as_text(piece))}

    def encode_stretch(text: str) -> Ids:
        pieces = _WORDS.findall(text)
        ids = np.array([words.get(piece, -1) for piece in pieces], dtype=np.int64)
        unseen = np.flatnonzero(ids < 0)
        if len(unseen):
            encoded = [pieces[i].encode() for i in unseen.tolist()]
            widths = np.ones(len(ids), dtype=np.int64)
            widths[unseen] = [len(piece) for piece in encoded]
            ids = np.repeat(ids, widths)
            ids[ids < 0] = byte_ids[np.frombuffer(b"".join(encoded), dtype=np.uint8)]
        return ids.astype(np.uint32)

    def encode(texts: list[str], parallel: bool) -> tuple[Ids, Ends]:
        return _joined([[encode_stretch(part) for part in stretches(text)] for text in texts])

    return encode


def stretches(text: str) -> Iterator[str]:
    """Yield a text in parts of about `_STRETCH` characters, cut where a word starts."""
    start = 0
    while start < len(text):
        border = _BORDER.search(text, start + _STRETCH)
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


def words_of(text: str) -> Iterator[str]:
    """Yield the words of a text as kind `word` has them; they are the text, end to end."""
    for part in stretches(text):
        yield from _WORDS.findall(part)


def _as_text(piece: bytes) -> str | None:
    """Return a token as text, or None if it is a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _joined(parts: list[list[Ids]]) -> tuple[Ids, Ends]:
    """Return the parts [parts of each text] of many texts end to end, and the end of each text."""
    ids = [part for text in parts for part in text]
    lengths = [sum(map(len, text)) for text in parts]
    return np.concatenate([np.zeros(0, np.uint32), *ids]), np.cumsum(lengths, dtype=np.int64)


def _library_encoder(file: TokenizerFile) -> tuple[str, Encoder]:
    probes = _probes(file)
    texts = list(probes.values())
    try:
        slow = _with_reserved(file, _tokenizers_encoder(file.plain))
        ids, ends = slow(texts, False)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"the library tokenizers cannot use it: {first_line(error)}") from None
    decoded = {
        text: b"".join([file.token_bytes[index] for index in part.tolist()]).decode(errors="replace")
        for text, part in zip(texts, np.split(ids, ends[:-1]), strict=True)
    }
    if change := first_difference(probes.items(), decoded.__getitem__):
        raise UserError(f"decoding does not return the text that was encoded ({change}): use another tokenizer")
    try:
        fast = _with_reserved(file, _gigatoken_encoder(file.plain))
        fast_ids, fast_ends = fast(texts, False)
        if np.array_equal(fast_ids, ids) and np.array_equal(fast_ends, ends):
            return "gigatoken", fast
        reason = "its token ids differ"
    except Exception as error:  # whatever fails, the other library can encode
        reason = str(error)
    _log.warning("encoding with the slower library tokenizers, because gigatoken cannot be used: %s", reason)
    return "tokenizers", slow


def _probes(file: TokenizerFile) -> dict[str, str]:
    """Return the probes, and a text of this vocabulary's own tokens."""
    step = max(1, len(file.token_bytes) // _PROBED_TOKENS)
    tokens = [word for piece in file.token_bytes[::step] if (word := _as_text(piece))]
    return {
        **PROBES,
        "all probes": "\n".join(PROBES.values()),
        "its special tokens": "".join(file.special) + " ".join(["", *file.special, ""]),
        "its tokens": "".join(tokens) + " ".join(tokens),
    }


def _with_reserved(file: TokenizerFile, encode: Encoder) -> Encoder:
    """Return the encoder that encodes the reserved strings of a text as bytes, and the text between them as text."""
    if (reserved := file.reserved) is None:
        return encode
    byte_ids = np.array(file.byte_ids, dtype=np.uint32)

    def encode_around(texts: list[str], parallel: bool) -> tuple[Ids, Ends]:
        if not any(map(reserved.search, texts)):
            return encode(texts, parallel)
        bounds = [[0, *(i for match in reserved.finditer(text) for i in match.span()), len(text)] for text in texts]
        parts = [[text[a:b] for a, b in pairwise(places)] for text, places in zip(texts, bounds, strict=True)]
        ids, ends = encode([part for text in parts for part in text[::2]], parallel)
        encoded = iter(np.split(ids, ends[:-1]))
        return _joined(
            [
                [
                    byte_ids[np.frombuffer(part.encode(), dtype=np.uint8)] if i % 2 else next(encoded)
                    for i, part in enumerate(text)
                ]
                for text in parts
            ]
        )

    return encode_around


def _tokenizers_encoder(plain: str) -> Encoder:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(plain)

    def encode(texts: list[str], parallel: bool) -> tuple[Ids, Ends]:
        return _joined([[np.array(encoding.ids, dtype=np.uint32)] for encoding in library.encode_batch_fast(texts)])

    return encode


def _gigatoken_encoder(plain: str) -> Encoder:
    """Return gigatoken's encoder, which caches every word: it is created again before the cache fills the memory."""
    import gigatoken

    library, encoded = gigatoken.Tokenizer.from_json(plain), 0

    def encode(texts: list[str], parallel: bool) -> tuple[Ids, Ends]:
        nonlocal library, encoded
        if encoded > _RECREATE_TOKENS:
            library, encoded = gigatoken.Tokenizer.from_json(plain), 0
        layout: Any = library.encode_batch(texts, parallel=parallel).layout
        encoded += len(layout.content.data)
        return layout.content.data, layout.offsets.data[1:]

    return encode
