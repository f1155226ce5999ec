"""The file with what was left out of one partition, as JSON Lines for people to look at.

This module does not know why something was left out.
"""

import json
from functools import partial

from gru import storage
from gru.corpus.report import Report

_CHARACTERS = 4096  # most characters of a text in the file


class DroppedWriter:
    """The writer of one JSON Lines file, which exists once `close` has been called, and only if it has a line.

    path: of the file; None: nothing is written.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._file: storage.NewFile | None = None

    def follow(self, report: Report, source: str) -> None:
        """Write what is left out according to the report from now on, as being of that source file."""
        if self._path is not None:
            report.left_out = partial(self.write, source)

    def write(self, source: str, dropped: dict[str, str | int]) -> None:
        """Append a line: a document left out, with its `reason`, and `text` or `message`."""
        if self._path is None:
            return
        if self._file is None:
            self._file = storage.NewFile(self._path)
        line = {"source": source} | dropped
        text = line.get("text")
        if isinstance(text, str) and len(text) > _CHARACTERS:
            line |= {"text": text[:_CHARACTERS], "characters": len(text)}
        self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")

    def close(self) -> None:
        """Complete the file."""
        if self._file is not None:
            self._file.commit()
            self._file = None

    def abandon(self) -> None:
        """Remove the file if it was not closed."""
        if self._file is not None:
            self._file.abandon()
