"""The report on the spans that were read: documents left out, by reason, and examples of what was wrong.

`ProblemLog` decides for each problem what `corpus.on_bad` asks for. This module does not know the formats.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gru.config import CorpusConfig
from gru.corpus.file_formats import describe_extensions
from gru.corpus.partitions import Span
from gru.errors import UserError

_EXAMPLES = 5  # examples of each reason in a report


@dataclass
class Report:
    """What was left out of the spans that were read, and the digests of their bytes."""

    dropped: Counter[str] = field(default_factory=Counter)  # number of documents left out, by reason
    dropped_bytes: Counter[str] = field(default_factory=Counter)  # bytes of the files that were lost, as far as known
    replaced: int = 0  # number of documents in which U+FFFD replaces invalid bytes
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first problems by reason: file, place, and why
    digests: list[str] = field(default_factory=list)  # SHA-256 of the bytes of each span
    passed_over: Counter[str] = field(default_factory=Counter)  # number of archive members not read, by extension
    on_record: Callable[[Any], None] | None = None
    """Called with each record before the template makes it a document."""
    left_out: Callable[[dict[str, str | int]], None] | None = None
    """Called with each document that is left out: its `reason`, and its `text`, or the `message` if it has none."""

    def clear(self) -> None:
        """Forget what was counted so far, but not the digests."""
        for counts in (self.dropped, self.dropped_bytes, self.examples, self.passed_over):
            counts.clear()
        self.replaced = 0

    def add(self, other: "Report") -> None:
        """Add what another report has counted."""
        self.dropped.update(other.dropped)
        self.dropped_bytes.update(other.dropped_bytes)
        self.passed_over.update(other.passed_over)
        self.replaced += other.replaced
        self.digests += other.digests
        for reason, found in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *found][:_EXAMPLES]

    def drop_document(self, reason: str, text: str) -> None:
        """Count a document that is left out by a rule, such as a filter, and hand on its text."""
        self.dropped[reason] += 1
        if self.left_out:
            self.left_out({"reason": reason, "text": text})


class ProblemLog:
    """The problems of one span, counted in a report. Raises UserError instead if `corpus.on_bad` is "fail"."""

    def __init__(self, span: Span, corpus: CorpusConfig, report: Report) -> None:
        self.span, self.corpus, self._report = span, corpus, report
        self.options = span.file.options
        self.on_record = report.on_record
        self.place: tuple[str, tuple[int, ...], int] = ("a record", (), 0)
        """Where the record is that a reader yielded last: a %-pattern, its numbers, and the record's bytes if known."""
        self.fields: Collection[str] | None = None
        """Names of all fields of the file, if its records have only those that the template names."""
        self.encoding = "utf-8"
        """The encoding of the file; positions in another one are counted in its text as UTF-8."""

    def drop(self, reason: str, message: str, size: int = 0, count: int = 1) -> None:
        """Count documents that are left out. Raises UserError if `corpus.on_bad` is "fail".

        size: bytes of the (unpacked) file that are lost with them, as far as known.
        """
        if self.corpus.on_bad == "fail":
            raise UserError(f"{self.span.file.path}: {message}")
        self._report.dropped[reason] += count
        self._report.dropped_bytes[reason] += size
        self._add_example(reason, message)
        if self._report.left_out:
            self._report.left_out({"reason": reason, "message": message} | ({"count": count} if count > 1 else {}))

    def drop_record(self, reason: str, what: str) -> None:
        """As `drop`, for the record at `place`, which is the subject of the sentence that `what` continues."""
        pattern, numbers, size = self.place
        self.drop(reason, f"{pattern % numbers} {what}", size)

    def replaces(self, reason: str, message: str, size: int = 0) -> bool:
        """Count a document with invalid bytes: True if they are to be replaced, False if the document is left out."""
        if self.corpus.on_bad == "replace":
            self._report.replaced += 1
            self._add_example("replaced", message)
            return True
        self.drop(reason, message, size)
        return False

    def replaces_invalid_utf8(self, position: int, size: int = 0) -> bool:
        """As `replaces`, for a document that is not valid in the file's encoding at byte `position` of its text."""
        where = " of the unpacked text" if self.span.file.compression else ""
        if self.encoding != "utf-8":
            where = " of its text as UTF-8"
        message = f"not valid {self.encoding.upper()} at byte {position}{where}"
        return self.replaces("invalid_utf8", message, size)

    def decode(self, data: bytes, start: int) -> str | None:
        """Return the text of a document that starts at byte `start`, or None if it is not valid and left out."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return data.decode(errors="replace") if self.replaces_invalid_utf8(start + error.start, len(data)) else None

    def _add_example(self, reason: str, message: str) -> None:
        examples = self._report.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{self.span.file.name}: {message}")


class _Source(Protocol):
    """A source with the key of its table in the configuration, and its paths."""

    @property
    def key(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]: ...


def no_documents(
    sources: Sequence[_Source],
    dropped: Mapping[str, int],
    examples: Mapping[str, list[str]],
    passed_over: Mapping[str, int],
) -> UserError:
    """Return the error of a corpus without a document to train on, which says what its sources have instead."""
    keys = ", ".join(source.key for source in sources)
    paths = ", ".join(path for source in sources for path in source.paths)
    reasons = "".join(f"; {count:,} dropped: {reason}" for reason, count in sorted(dropped.items()))
    reasons += f"; files not read: {describe_extensions(passed_over)}" if passed_over else ""
    first = "".join(f"; {found[0]}" for found in [*examples.values()][:1])
    return UserError(f"{keys}: no document to train on in {paths}{reasons}{first}")
