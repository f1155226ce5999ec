"""The tokenizer: text to token ids and back, with the vocabulary in a Hugging Face `tokenizer.json`.

There are three kinds: byte-level BPE, characters, and bytes. Decoding returns exactly the encoded text, whatever it
contains: a special token written in a text is encoded as text. This module does not know shards or models.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from gru import storage
from gru.config import TokenizerConfig
from gru.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")  # of other projects' tokenizers

Ids = np.ndarray[Any, np.dtype[np.uint32]]
Ends = np.ndarray[Any, np.dtype[np.int64]]
_Encoder = Callable[[list[str], bool], tuple[Ids, Ends]]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_RECREATE_TOKENS = 1 << 24  # tokens after which gigatoken's tokenizer, which caches all words, is created again
_SEPARATOR = b"\xff"  # occurs in no UTF-8 text
# Text that BPE libraries encode differently: spaces, contractions, digits, scripts, controls, false special tokens.
_PROBE = (
    "def f(x):\n\tif x >= 10:\r\n        return  it's, they'll  \n\n\n3.14159 \u2028\u00a0 naïve Ünï½ e\u0301 "
    f"白日依山盡，黃河入海流。 Привет नमस्ते 👩‍👩‍👧 \x00\x1f\ufeff {END_OF_TEXT}{END_OF_TEXT} <s>  "
)
_log = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer.json, ready to encode and decode. Raises UserError if it is not one of the three kinds."""

    def __init__(self, json_bytes: bytes) -> None:
        self.json = json_bytes
        self.digest = hashlib.sha256(json_bytes).hexdigest()
        try:
            config = json.loads(json_bytes)
            added = {token["content"]: token["id"] for token in config["added_tokens"]}
            vocab: dict[str, int] = config["model"]["vocab"]
            self._is_table, byte_of = _check(config)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError("not a tokenizer.json of kind bpe (byte-level), char or byte") from None
        ends = [added[name] for name in (END_OF_TEXT, *_OTHER_ENDS) if name in added]
        if not ends:
            raise UserError(f"has no {END_OF_TEXT} token, which must end each document")
        self.end_of_text: int = ends[0]
        self.vocab_size = max([*vocab.values(), *added.values()]) + 1
        self.token_bytes = [b""] * self.vocab_size
        for token, index in vocab.items():
            if token not in added:
                self.token_bytes[index] = byte_of(token)
        single: dict[bytes, int | None] = {
            piece: index for index, piece in enumerate(self.token_bytes) if len(piece) == 1
        }
        if self._is_table:
            single = {bytes([byte]): vocab.get(f"<0x{byte:02X}>") for byte in range(256)}
        self._byte_ids = [single.get(bytes([byte])) for byte in range(256)]
        if None in self._byte_ids:
            raise UserError("its vocabulary must contain all 256 bytes, or it cannot encode every text")

    @property
    def backend(self) -> str:
        """The encoder in use: `table`, `gigatoken` or `tokenizers`."""
        return self._encoder[0]

    def encode(self, text: str) -> Ids:
        """Return the token ids [tokens] of a text, without end of text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], parallel: bool = False) -> tuple[Ids, Ends]:
        """Return the token ids [tokens] of many texts end to end, and the end [texts] of each text in them.

        parallel: whether to use all cores, if the library can.
        """
        return self._encoder[1](texts, parallel)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, with U+FFFD in place of incomplete characters."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of token ids."""
        pieces = self.token_bytes
        return b"".join([pieces[index] for index in (ids.tolist() if isinstance(ids, np.ndarray) else ids)])

    @cached_property
    def _encoder(self) -> tuple[str, _Encoder]:
        if self._is_table:
            return "table", self._table_encoder()
        # Without added tokens, the libraries find no special tokens in a text.
        plain = json.dumps(json.loads(self.json) | {"added_tokens": [], "post_processor": None})
        slow = _tokenizers_encoder(plain)
        try:
            fast = _gigatoken_encoder(plain)
            if np.array_equal(fast([_PROBE], False)[0], slow([_PROBE], False)[0]):
                return "gigatoken", fast
            reason = "its token ids differ"
        except Exception as error:  # whatever fails, the other library can encode
            reason = str(error)
        _log.warning("encoding with the slower library tokenizers, because gigatoken cannot be used: %s", reason)
        return "tokenizers", slow

    def _table_encoder(self) -> _Encoder:
        """Return the encoder of characters, with bytes for those outside the vocabulary."""
        byte_ids = np.array(self._byte_ids, dtype=np.int32)
        table = np.full(0x110000, -1, dtype=np.int32)
        bytes_and_gaps = {*self._byte_ids, *(i for i, piece in enumerate(self.token_bytes) if not piece)}
        for index, piece in enumerate(self.token_bytes):
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


def _check(config: dict[str, Any]) -> tuple[bool, Callable[[str], bytes]]:
    """Return whether the tokenizer is a table of characters, and the function from a token to its bytes."""
    model = config["model"]
    if model["type"] != "BPE" or config["normalizer"] is not None:
        raise UserError("must be BPE without a normalizer, or decoding does not return the same text")
    before = config["pre_tokenizer"]
    if before is None and model["byte_fallback"] and not model["merges"]:
        return True, _table_bytes
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise UserError("must be byte-level BPE without add_prefix_space, or decoding does not return the same text")
    values = {char: byte for byte, char in enumerate(_byte_characters())}
    return False, lambda token: bytes(values[char] for char in token)


def _table_bytes(token: str) -> bytes:
    """Return the bytes of a token of a table: a character, or a byte written <0xNN>."""
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if len(token) != 1:
        raise UserError(f"token {token!r} must be one character or a byte such as <0x0A>")
    return token.encode()


def _byte_characters() -> list[str]:
    """Return the printable character for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _tokenizers_encoder(plain: str) -> _Encoder:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(plain)

    def encode(texts: list[str], parallel: bool) -> tuple[Ids, Ends]:
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in library.encode_batch_fast(texts)]
        return np.concatenate([np.zeros(0, np.uint32), *ids]), np.cumsum([len(part) for part in ids], dtype=np.int64)

    return encode


def _gigatoken_encoder(plain: str) -> _Encoder:
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


def load(path: str) -> Tokenizer:
    """Read a tokenizer.json from a path or URL. Raises UserError if it is unreadable or of an unsupported kind."""
    try:
        return Tokenizer(_with_end_of_text(storage.read_bytes(path)))
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _with_end_of_text(json_bytes: bytes) -> bytes:
    """Return the tokenizer.json, with an end-of-text token added if it has none."""
    try:
        config = json.loads(json_bytes)
        ids = [token["id"] for token in config["added_tokens"]]
        names = {token["content"] for token in config["added_tokens"]}
        if not names.isdisjoint({END_OF_TEXT, *_OTHER_ENDS}):
            return json_bytes
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": max([*ids, *config["model"]["vocab"].values()]) + 1, "content": END_OF_TEXT}
        added = [*config["added_tokens"], token | flags | {"special": True}]
        return json.dumps(config | {"added_tokens": added}).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return json_bytes  # not a tokenizer.json, which the caller reports


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a tokenizer on a sample of text. The order of the texts does not matter."""
    if config.kind == "bpe":
        return _train_bpe(config.vocab_size, texts)
    counts: Counter[str] = Counter()
    for text in texts if config.kind == "char" else ():
        counts.update(text)
    frequent = sorted(counts, key=lambda char: (-counts[char], char))[: config.vocab_size - 257]
    tokens = [*frequent, *(f"<0x{byte:02X}>" for byte in range(256))]
    return _build({token: index for index, token in enumerate(tokens)}, None)


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    import gigatoken

    data = _SEPARATOR.join(text.encode() for text in texts)
    with _silence():
        pieces, merges = gigatoken.train_bpe(data, vocab_size - 1, [], separator=_SEPARATOR)
    characters = _byte_characters()

    def token(piece: bytes) -> str:
        return "".join(characters[byte] for byte in piece)

    vocab = {token(piece): index for index, piece in pieces.items()}
    return _build(vocab, [(token(left), token(right)) for left, right in merges])


def _build(vocab: dict[str, int], merges: Sequence[tuple[str, str]] | None) -> Tokenizer:
    """Return byte-level BPE with these merges, or a table of characters and bytes if `merges` is None."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocab=vocab, merges=list(merges or []), byte_fallback=merges is None))
    if merges is None:
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library.to_str().encode())


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what native code prints: gigatoken's trainer writes to the process's stdout and stderr directly."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream, _ in saved:
            os.dup2(null, stream)
        yield
    finally:
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)
