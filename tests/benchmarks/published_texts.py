"""The texts of the published tables, cut into training, validation and test parts as the papers did.

The texts are not part of the project:

- War and Peace, `warpeace_input.txt` of Karpathy, Johnson and Fei-Fei (2015, arXiv:1506.02078), or a copy of it.
- The Penn Treebank as Mikolov et al. (2010) prepared it: `ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt` of
  simple-examples.tgz, or the same files from any copy of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gru.errors import UserError
from gru.storage import sha256

END_OF_LINE = "<eos>"
SPACE = "_"  # between the words of a line, in the table of characters
PTB_PARTS = ("train", "valid", "test")

Ids = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True)
class Text:
    """A text in three parts, each a stream of ids of its symbols, which are characters or words."""

    symbols: tuple[str, ...]
    """The symbols of all parts by id. As in the papers, a symbol that is only in the test part counts too."""
    train: Ids
    validation: Ids
    test: Ids

    @property
    def end_of_text(self) -> int:
        """The id that stands before the first symbol of a part. It is in no part."""
        return len(self.symbols)

    @property
    def vocab_size(self) -> int:
        return len(self.symbols) + 1

    @property
    def digest(self) -> str:
        """Digest of the symbols and of all parts."""
        parts = (self.train, self.validation, self.test)
        return sha256("\n".join([*self.symbols, *(sha256(part.tobytes()) for part in parts)]).encode())


def read_war_and_peace(path: Path) -> Text:
    """Return the characters of a text file: 80 % to train on, 10 % for validation, 10 % for the test.

    Line ends stay as they are, CR LF in this text. Raises UserError if it cannot be read or is too short.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: cannot read the text: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8") from None
    if len(text) < 10:
        raise UserError(f"{path}: has {len(text)} characters: expected a text of 10 or more, to cut into three parts")
    first, second = len(text) * 8 // 10, len(text) * 9 // 10
    return _as_ids(text[:first], text[first:second], text[second:])


def read_ptb_words(directory: Path) -> Text:
    """Return the words of the Penn Treebank, with `<eos>` at the end of each line; `<unk>` is a word like others."""
    return _as_ids(*([word for line in part for word in (*line, END_OF_LINE)] for part in _read_ptb(directory)))


def read_ptb_characters(directory: Path) -> Text:
    """Return the characters of the Penn Treebank, with `_` between words and `<eos>`, one symbol, after each line.

    `<unk>` is spelled out, as in Mikolov's ptb.char.train.txt, so there are 50 symbols.
    """
    return _as_ids(
        *([symbol for line in part for symbol in (*SPACE.join(line), END_OF_LINE)] for part in _read_ptb(directory))
    )


def _read_ptb(directory: Path) -> list[list[list[str]]]:
    """Return for each part its lines, and for each line its words."""
    parts = []
    for part in PTB_PARTS:
        path = directory / f"ptb.{part}.txt"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(
                f"{path}: cannot read it: {error.strerror}; expected the directory of ptb.train.txt, ptb.valid.txt and "
                "ptb.test.txt"
            ) from None
        parts.append([words for line in lines if (words := line.split())])
        if not parts[-1]:
            raise UserError(f"{path}: has no words")
    return parts


def _as_ids(*parts: Sequence[str]) -> Text:
    symbols = tuple(sorted({symbol for part in parts for symbol in part}))
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    train, validation, test = (np.array([ids[symbol] for symbol in part], dtype=np.uint32) for part in parts)
    return Text(symbols, train, validation, test)
