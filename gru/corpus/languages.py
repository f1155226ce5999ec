"""The language of a document, by py3langid's model, which is loaded once per process.

This module does not know what becomes of a document.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gru.errors import UserError

_LEAST_PROBABILITY = 0.3  # poems of 20 Chinese characters and most English lines of 30 letters are above it
_PIECES, _PIECE_CHARACTERS = 20, 1000  # what is read of a long document: the model reads some 2 MB/s
# Codes of the model that ISO 639-3 counts as parts of another of its codes.
_VARIETIES = {
    "ar": {"ary", "arz"},
    "ku": {"sdh"},
    "no": {"nn"},
    "uz": {"uzs"},
    "zh": {"wuu", "yue"},
}


def check_languages(codes: Sequence[str]) -> frozenset[str]:
    """Return the codes, and those of their varieties.

    Raises UserError if the model has no such language, or py3langid is not installed.
    """
    known = set(_model().labels)
    if unknown := sorted(set(codes) - known):
        raise UserError(
            f"corpus.filter.languages: py3langid does not know {', '.join(unknown)}; it knows {' '.join(sorted(known))}"
        )
    return frozenset(codes).union(*(_VARIETIES.get(code, ()) for code in codes))


def language_problem(text: str, wanted: frozenset[str]) -> str | None:
    """Return `language` if the text is in none of the wanted languages, `language_unknown` if it is too short to tell.

    A long text is judged by pieces from all over it.
    """
    if len(text) > _PIECES * _PIECE_CHARACTERS:
        starts = range(0, len(text), len(text) // _PIECES)
        text = "\n".join(text[start : start + _PIECE_CHARACTERS] for start in starts)
    language, probability = _model().classify(text)
    if probability < _LEAST_PROBABILITY:
        return "language_unknown"
    return None if language in wanted else "language"


@lru_cache(maxsize=1)
def _model() -> Any:
    """Load the model: 1 s and 100 MB in each process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("corpus.filter.languages needs py3langid: pip install 'gru-pipeline[languages]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
