"""The report on the spans that were read: documents left out, by reason, and examples of what was wrong.

`ProblemLog` decides for each problem what `corpus.on_bad` asks for. This module does not know the formats.
"""

from collections import Counter
from dataclasses import dataclass, field

from gru.config import CorpusConfig
from gru.corpus.sources import Span
from gru.errors import UserError

_EXAMPLES = 5  # examples in a report


@dataclass
class Report:
    """What was left out of the spans that were read, and the digests of their bytes."""

    dropped: Counter[str] = field(default_factory=Counter)  # number of documents left out, by reason
    replaced: int = 0  # number of documents in which U+FFFD replaces invalid bytes
    examples: list[str] = field(default_factory=list)  # the first problems: file, place and what is wrong
    digests: list[str] = field(default_factory=list)  # SHA-256 of the bytes of each span


class ProblemLog:
    """The problems of one span, counted in a report. Raises UserError instead if `corpus.on_bad` is "fail"."""

    def __init__(self, span: Span, corpus: CorpusConfig, report: Report) -> None:
        self.span, self.corpus, self._report = span, corpus, report

    def drop(self, reason: str, message: str) -> None:
        """Count a document that is left out. Raises UserError if `corpus.on_bad` is "fail"."""
        if self.corpus.on_bad == "fail":
            raise UserError(f"{self.span.file.path}: {message}")
        self._report.dropped[reason] += 1
        self._add_example(message)

    def drop_missing_field(self) -> None:
        """Count a record that lacks a field of the template, which is never an error."""
        self._report.dropped["missing_field"] += 1

    def replaces(self, reason: str, message: str) -> bool:
        """Count a document with invalid bytes: True if they are to be replaced, False if the document is left out."""
        if self.corpus.on_bad == "replace":
            self._report.replaced += 1
            self._add_example(message)
            return True
        self.drop(reason, message)
        return False

    def replaces_invalid_utf8(self, position: int) -> bool:
        """As `replaces`, for a document that is not UTF-8 at byte `position` of the file."""
        where = " of the unpacked text" if self.span.file.compression else ""
        return self.replaces("invalid_utf8", f"not valid UTF-8 at byte {position}{where}")

    def decode(self, data: bytes, start: int) -> str | None:
        """Return the text of a document that starts at byte `start`, or None if it is not UTF-8 and left out."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return data.decode(errors="replace") if self.replaces_invalid_utf8(start + error.start) else None

    def _add_example(self, message: str) -> None:
        if len(self._report.examples) < _EXAMPLES:
            self._report.examples.append(f"{self.span.file.name}: {message}")
