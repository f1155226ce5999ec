"""The filters of documents and the masks of personal data that a config asks for; none by default.

This module does not know where a text comes from, or what becomes of one that is left out.
"""

import re
from collections.abc import Callable

from gru.config_corpus import FilterConfig
from gru.corpus.gopher import quality_problem, repetition_problem
from gru.corpus.languages import check_languages, language_problem
from gru.corpus.masking import mask_emails, mask_ips


class DocumentFilter:
    """The filters and masks of a config. Raises UserError if they need a library that is not installed."""

    def __init__(self, config: FilterConfig) -> None:
        self._masks = [mask for mask, on in ((mask_emails, config.mask_emails), (mask_ips, config.mask_ips)) if on]
        self._problems = _problems(config)

    def mask(self, text: str) -> str:
        """Return the text with placeholders for personal data."""
        for mask in self._masks:
            text = mask(text)
        return text

    def reason(self, text: str) -> str | None:
        """Return the first reason to leave a document out, the name of the rule that it breaks; None to keep it."""
        for problem in self._problems:
            if reason := problem(text):
                return reason
        return None


def _problems(config: FilterConfig) -> list[Callable[[str], str | None]]:
    """Return the functions that give a document's reason, those that take least time first."""
    problems: list[Callable[[str], str | None]] = []
    if config.keep_pattern is not None:
        keep = re.compile(config.keep_pattern)
        problems.append(lambda text: None if keep.search(text) else "keep_pattern")
    if config.drop_pattern is not None:
        drop = re.compile(config.drop_pattern)
        problems.append(lambda text: "drop_pattern" if drop.search(text) else None)
    if config.gopher_quality:
        problems.append(quality_problem)
    if config.gopher_repetition:
        problems.append(repetition_problem)
    if config.languages:
        wanted = check_languages(config.languages)
        problems.append(lambda text: language_problem(text, wanted))
    return problems
