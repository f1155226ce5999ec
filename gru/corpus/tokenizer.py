"""The tokenizer: text to token ids and back, with the vocabulary in a Hugging Face `tokenizer.json`.

Decoding returns exactly the encoded text, whatever it contains: the bytes of a text are the bytes of its tokens, end to
end, and a special token written in a text is encoded as text. This module does not know shards or models.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from gru import storage
from gru.config import TokenizerConfig
from gru.config_corpus import Normalization
from gru.corpus.token_encoders import Encoder, Ends, Ids, choose_encoder, words_of
from gru.corpus.tokenizer_files import (
    END_OF_TEXT,
    WORD_PATTERN,
    byte_characters,
    read_tokenizer_file,
    with_end_of_text,
    without_normalizer,
)
from gru.errors import UserError

_COUNTED = 1 << 20  # tokens or characters whose bytes are counted at once
_SPARE_MERGES = 64  # merges that are trained beyond the vocabulary, as gigatoken repeats some
_SEPARATOR = b"\xff"  # occurs in no UTF-8 text
_CHARACTERS = byte_characters()


class Tokenizer:
    """A tokenizer.json, ready to encode and decode.

    name: what messages call it, such as its path.
    Raises UserError if it is of a kind that cannot encode every text and decode it again.
    """

    def __init__(self, json_bytes: bytes, name: str = "tokenizer.json") -> None:
        self.json = json_bytes
        self.name = name
        self.digest = hashlib.sha256(json_bytes).hexdigest()
        self._file = read_tokenizer_file(json_bytes)
        self.end_of_text = self._file.end_of_text
        self.token_bytes = self._file.token_bytes
        self.vocab_size = len(self.token_bytes)
        self._lengths = np.array([len(piece) for piece in self.token_bytes], dtype=np.uint32)

    @property
    def backend(self) -> str:
        """The encoder in use: `table`, `words`, `gigatoken` or `tokenizers`."""
        return self._encoder[0]

    def encode(self, text: str) -> Ids:
        """Return the token ids [tokens] of a text, without end of text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], parallel: bool = False) -> tuple[Ids, Ends]:
        """Return the token ids [tokens] of many texts end to end, and the end [texts] of each text in them.

        parallel: whether to use all cores, if the library can.
        Raises UserError naming the first text that has another number of bytes than its tokens.
        """
        ids, ends = self._encoder[1](texts, parallel)
        if self._count_bytes(ids) != sum(map(_count_bytes, texts)):
            self._report_loss(texts, ids, ends)
        return ids, ends

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, with U+FFFD in place of incomplete characters."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of token ids."""
        pieces = self.token_bytes
        return b"".join([pieces[index] for index in (ids.tolist() if isinstance(ids, np.ndarray) else ids)])

    @cached_property
    def _encoder(self) -> tuple[str, Encoder]:
        return choose_encoder(self._file)

    def _count_bytes(self, ids: Ids) -> int:
        """Return the number of bytes of token ids."""
        starts = range(0, len(ids), _COUNTED)
        return sum(int(np.take(self._lengths, ids[start : start + _COUNTED]).sum()) for start in starts)

    def _report_loss(self, texts: list[str], ids: Ids, ends: Ends) -> None:
        for text, part in zip(texts, np.split(ids, ends[:-1]), strict=True):
            if (encoded := self._count_bytes(part)) != (size := _count_bytes(text)):
                raise UserError(
                    f"{self.name}: loses text: the tokens of {text[:40]!r}... have {encoded:,} bytes, the text has "
                    f"{size:,}; use another tokenizer"
                )


def _count_bytes(text: str) -> int:
    """Return the number of UTF-8 bytes of a text."""
    if text.isascii():
        return len(text)
    starts = range(0, len(text), _COUNTED)
    return sum(len(text[start : start + _COUNTED].encode()) for start in starts)


def load(path: str, normalization: Normalization = "none") -> Tokenizer:
    """Read a tokenizer.json from a path or URL, and check that it returns texts in all scripts as they were.

    normalization: the form of the corpus' documents. Steps of the tokenizer's normalizer that change no text in that
    form are left out, so that texts in other forms are encoded exactly too.
    Raises UserError in one line with the path if the file is unreadable or loses text.
    """
    with _naming(path):
        tokenizer = Tokenizer(without_normalizer(with_end_of_text(storage.read_bytes(path)), normalization), path)
        assert tokenizer.backend  # choosing it encodes and decodes the probes
        return tokenizer


def read(path: str) -> Tokenizer:
    """Read a tokenizer.json that was loaded or trained before, without the check. Raises UserError as `load` does."""
    with _naming(path):
        return Tokenizer(storage.read_bytes(path), path)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the path in the errors of reading a tokenizer."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a tokenizer on a sample of text. The order of the texts does not matter."""
    if config.kind == "bpe":
        return _train_bpe(config.vocab_size, texts)
    counts: Counter[str] = Counter()
    if config.kind != "byte":
        for text in texts:
            counts.update(text if config.kind == "char" else words_of(text))
    if config.kind == "word":
        counts = Counter({word: count for word, count in counts.items() if len(word.encode()) > 1})
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))[: config.vocab_size - 257]
    return _build_words(frequent) if config.kind == "word" else _build_table(frequent)


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    import gigatoken

    data = _SEPARATOR.join(text.encode() for text in texts)
    spare = _SPARE_MERGES + vocab_size // 64
    with _silence():
        pieces, trained = gigatoken.train_bpe(data, vocab_size - 1 + spare, [], separator=_SEPARATOR)
    # The trainer lists a merge again where its counts of repeated characters are off, with another id for its bytes.
    vocab = {_spelled(pieces[byte]): byte for byte in range(256)}
    merges: dict[tuple[str, str], None] = {}
    for left, right in trained:
        if len(vocab) == vocab_size - 1:
            break
        merges.setdefault((_spelled(left), _spelled(right)))
        vocab.setdefault(_spelled(left + right), len(vocab))
    return _build_byte_level(vocab, list(merges))


def train_trial_tokenizer(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """Train byte-level BPE for an estimate, in a time that depends on the size of the texts and on little else.

    The trainer of `train_tokenizer` is faster, but takes minutes where few pairs repeat, as in random letters. Both
    need short words: of a word of n bytes, each merge reads all n.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return _build(library.model, library.pre_tokenizer, decoders.ByteLevel())


def _spelled(piece: bytes) -> str:
    """Return the spelling of bytes in a byte-level vocabulary."""
    return "".join([_CHARACTERS[byte] for byte in piece])


def _build_byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return byte-level BPE with these merges."""
    from tokenizers import decoders, models, pre_tokenizers

    before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return _build(models.BPE(vocab=vocab, merges=merges), before, decoders.ByteLevel())


def _build_words(words: list[str]) -> Tokenizer:
    """Return the dictionary of words, with bytes for those outside: byte-level BPE that merges whole words only."""
    from tokenizers import Regex, decoders, models, pre_tokenizers

    tokens = [*(_spelled(word.encode()) for word in words), *_CHARACTERS]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _build(model, pre_tokenizers.Sequence([split, spell]), decoders.ByteLevel())


def _build_table(characters: list[str]) -> Tokenizer:
    """Return the table of characters, with bytes for those outside."""
    from tokenizers import decoders, models

    tokens = [*characters, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(tokens)}
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _build(models.BPE(vocab=vocab, merges=[], byte_fallback=True), None, decoder)


def _build(model: Any, pre_tokenizer: Any, decoder: Any) -> Tokenizer:
    """Return a tokenizer of parts of the library tokenizers, with an end-of-text token."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library(model)
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.decoder = decoder
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
