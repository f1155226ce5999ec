"""The rules of quality and repetition by which Gopher's corpus was filtered: Rae et al. 2021, appendix A1.1.

https://arxiv.org/abs/2112.11446. Words are what white space separates. Fractions of characters are of those in lines,
in paragraphs or in words, without the white space between them.
"""

import re
import string
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST_WORDS, _MOST_WORDS = 50, 100_000
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS = ("•", "-", "*")
_ELLIPSES = ("...", "…")
_PARAGRAPH_END = re.compile(r"\r?\n\s*\n")

# Most characters that may be in ... as a fraction of all (table A1)
_TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # the most frequent n-gram, by n
_DUPLICATE_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # n-grams that were there before, by n
_DUPLICATES, _DUPLICATE_CHARACTERS = 0.30, 0.20  # lines or paragraphs that were there before; their characters

_BLOCK = re.compile(r".{1,1048576}\S*", re.DOTALL)  # so that not all words of a long text are in memory


def quality_problem(text: str) -> str | None:
    """Return the first rule of quality that a text breaks, such as `gopher_words`; None if it keeps all."""
    words = text.split(maxsplit=_MOST_WORDS)  # a longer text has its rest as one more
    count = len(words)
    if not _LEAST_WORDS <= count <= _MOST_WORDS:
        return "gopher_words"
    if not 3 <= sum(map(len, words)) / count <= 10:
        return "gopher_word_length"
    if text.count("#") > 0.1 * count:
        return "gopher_hashes"
    if sum(map(text.count, _ELLIPSES)) > 0.1 * count:
        return "gopher_ellipses"
    lines = _lines(text)
    if sum(line.lstrip().startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "gopher_bullets"
    if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "gopher_ellipsis_lines"
    if sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) < 0.8 * count:
        return "gopher_letters"
    if len(_STOP_WORDS & {word.strip(string.punctuation).lower() for word in words}) < 2:
        return "gopher_stop_words"
    return None


def repetition_problem(text: str) -> str | None:
    """Return the first rule of repetition that a text breaks, such as `gopher_top_2_gram`; None if it keeps all.

    Of equal lines, paragraphs and n-grams the first is none of the duplicates.
    """
    for name, parts in (("line", _lines(text)), ("paragraph", _PARAGRAPH_END.split(text.strip()))):
        unique = set(parts)
        if len(parts) - len(unique) > _DUPLICATES * len(parts):
            return f"gopher_duplicate_{name}s"
        characters = sum(map(len, parts))
        if characters - sum(map(len, unique)) > _DUPLICATE_CHARACTERS * characters:
            return f"gopher_duplicate_{name}_characters"
    words, lengths = _words(text)
    ends = np.concatenate([[0], np.cumsum(lengths[words])])  # ends[i]: characters in the words before word i
    for grams in _repeated_grams(words, max(_DUPLICATE_GRAMS)):
        n = grams.n
        if n in _TOP_GRAMS and _top_characters(grams, ends) > _TOP_GRAMS[n] * ends[-1]:
            return f"gopher_top_{n}_gram"
        if n in _DUPLICATE_GRAMS and _duplicate_characters(grams, ends) > _DUPLICATE_GRAMS[n] * ends[-1]:
            return f"gopher_duplicate_{n}_grams"
    return None


def _lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def _words(text: str) -> tuple[Array, Array]:
    """Return the number of each word's form [words], and the length of each form in characters [forms]."""
    forms: dict[str, int] = {}
    blocks = [
        np.array([forms.setdefault(word, len(forms)) for word in block[0].split()], dtype=np.int64)
        for block in _BLOCK.finditer(text)
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *blocks]), np.array([*map(len, forms)], dtype=np.int64)


class _Grams(NamedTuple):
    """The n-grams of words that occur more than once in a text."""

    n: int
    starts: Array  # [occurrences], ascending: the word that each begins with
    groups: Array  # [occurrences]: the same number for equal ones
    first: Array  # [groups]: index of the first word of the first n-gram of each group, groups of one included
    counts: Array  # [groups]: how many are equal


def _repeated_grams(words: Array, most: int) -> Iterator[_Grams]:
    """Yield the repeated n-grams for n = 2 to `most`.

    Two n-grams are equal if their first n - 1 words and their last n - 1 words are, which must be repeated themselves.
    words: the number of each word's form [words].
    """
    numbers = words  # of the (n - 1)-gram that starts at each word [n-grams + 1]; -1 if it is not repeated
    for n in range(2, most + 1):
        starts = np.flatnonzero((numbers[:-1] >= 0) & (numbers[1:] >= 0))
        keys = numbers[starts] * (len(words) + 1) + numbers[starts + 1]
        _, first, groups, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        repeated = counts[groups] > 1
        numbers = np.full(max(len(numbers) - 1, 0), -1)
        numbers[starts[repeated]] = groups[repeated]
        yield _Grams(n, starts[repeated], groups[repeated], starts[first], counts)


def _top_characters(grams: _Grams, ends: Array) -> int:
    """Return the characters in all occurrences of the most frequent n-gram; 0 if none is repeated."""
    if not len(grams.starts):
        return 0
    most = grams.counts.max()
    first = grams.first[grams.counts == most]
    return int((ends[first + grams.n] - ends[first]).max() * most)  # of equally frequent ones the longest


def _duplicate_characters(grams: _Grams, ends: Array) -> int:
    """Return the characters in all n-grams that were there before; those in several of them count once."""
    starts = grams.starts[grams.first[grams.groups] != grams.starts]
    stops = np.minimum(starts + grams.n, np.append(starts[1:], len(ends)))  # up to where the next one begins
    return int((ends[stops] - ends[starts]).sum())
