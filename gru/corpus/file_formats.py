"""The formats of files, by the extensions of their names.

This module does not know where the files are, or what they contain.
"""

import os
from collections.abc import Mapping
from typing import Literal, cast

Kind = Literal["text", "jsonl", "json", "csv", "parquet", "html", "archive"]

_KINDS: dict[str, Kind] = {
    **{".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"},
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".html": "html", ".htm": "html"},
}
# Text as well, but as often beside a corpus as part of it: read only if the user names or includes it.
_ALSO_TEXT: dict[str, Kind] = dict.fromkeys(
    [".markdown", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".rs", ".go"], "text"
)
_COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
_ARCHIVES = {".zip": "", ".tar": "", ".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}  # with their compression
_LONGEST_EXTENSION = 16  # a longer one, with its dot, is rather a part of the name
EXTENSIONS = f"{', '.join((*_KINDS, *_ARCHIVES))} (optionally with {', '.join(_COMPRESSION)})"
"""The extensions of the files that are read in a directory, in words."""


def file_format(name: str, format: str, explicit: bool) -> tuple[Kind | None, str]:
    """Return (kind or None, compression) of a file by the extension of its name.

    format: as `corpus.format`. For an explicit file, which the user has named, it counts and not the extension. An
    archive stays one: the format is that of its members.
    """
    stem, extension = os.path.splitext(name.lower())  # noqa: PTH122  (faster than a Path)
    if extension in _ARCHIVES:
        return "archive", _ARCHIVES[extension]
    compression = extension if extension in _COMPRESSION else ""
    if compression:
        extension = os.path.splitext(stem)[1]  # noqa: PTH122
    if extension == ".tar":
        return "archive", compression
    kind = _KINDS.get(extension)
    if kind is None and (explicit or format != "auto"):
        kind = _ALSO_TEXT.get(extension)
    if format == "auto":
        return kind, compression
    return (cast(Kind, format) if explicit or kind == format else None), compression


def extension(name: str) -> str:
    """Return the extension of a name for counting: ".jpg", ".log.gz"; empty for none, and for numbers as in x.0001."""
    stem, last = os.path.splitext(name.lower())  # noqa: PTH122
    if last in _COMPRESSION:
        last = os.path.splitext(stem)[1] + last  # noqa: PTH122
    return "" if last[1:].isdecimal() or len(last) > _LONGEST_EXTENSION else last


def describe_extensions(counts: Mapping[str, int]) -> str:
    """Return numbers of files by extension in words, the most frequent first: `3 .jpg, 1 without extension`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {extension or 'without extension'}" for extension, count in ordered)
