"""The sources: finds the input files and groups them into partitions.

A file is cut at any byte; the reader of a span moves both ends forward to the next boundary between documents. This
module does not know what the files contain, or who processes the partitions.
"""

import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import fsspec
import pathspec

from gru.config import BUILT_IN_SOURCES, CorpusConfig
from gru.errors import UserError

Kind = Literal["text", "jsonl", "json", "csv", "parquet"]

_KINDS: dict[str, Kind] = {
    **{".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"},
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet"},
}
# Text as well, but as often beside a corpus as part of it: read only if the user names or includes it.
_ALSO_TEXT: dict[str, Kind] = dict.fromkeys(
    [".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".rs", ".go"], "text"
)
_COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
_VERSION_KEYS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "created")
_STDLIB_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test", "lib2to3"),
    *("encodings", "pydoc_data", "turtledemo", "ensurepip", "lib-dynload"),
}  # fmt: skip

Mapper = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class SourceFile:
    """An input file."""

    path: str  # absolute path, or a URL
    size: int  # in bytes
    modified: str  # version of the file: its modification time or ETag
    kind: Kind
    compression: str  # ".gz", ".zst", ".bz2", ".xz" or ""
    name: str  # its name in the dataset: its path below the source that it belongs to
    seekable: bool = True  # False: the server sends it from the beginning only

    @property
    def divisible(self) -> bool:
        """Whether the file may be cut into spans."""
        return self.kind != "json" and not self.compression and self.seekable

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes. Raises OSError."""
        if "://" not in self.path:
            return open(self.path, "rb")  # noqa: PTH123  (making a Path takes longer than opening)
        options = {} if self.seekable else {"block_size": 0}
        return fsspec.open(self.path, "rb", **options).open()

    def changed(self, file: IO[bytes]) -> bool:
        """Whether the open file is no longer the one that was listed."""
        if "://" not in self.path:
            stat = os.fstat(file.fileno())
            return (stat.st_size, str(stat.st_mtime)) != (self.size, self.modified)
        filesystem, path = fsspec.core.url_to_fs(self.path)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        return (info["size"], _version(info)) != (self.size, self.modified)


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; where the file is cut, both ends move forward to the next document boundary."""

    file: SourceFile
    start: int
    end: int
    heldout: bool | None  # None: each document's hash decides
    quoted: tuple[bool, bool] = (False, False)  # CSV: whether the start and the end are inside quotes

    @property
    def whole(self) -> bool:
        """Whether the span is the whole file."""
        return self.start == 0 and self.end == self.file.size

    @property
    def size(self) -> int:
        return self.end - self.start


Partition = tuple[Span, ...]


def list_files(corpus: CorpusConfig) -> list[SourceFile]:
    """Return the files of all sources, in the order of the sources and sorted within each, without repetitions.

    Raises UserError if a source is absent, has no file to read, or has an unknown format.
    """
    by_path: dict[str, SourceFile] = {}
    for source in corpus.sources:
        files = _standard_library() if source in BUILT_IN_SOURCES else _find(source, corpus)
        for file in files:
            by_path.setdefault(file.path, file)
    return list(by_path.values())


def _find(source: str, corpus: CorpusConfig) -> list[SourceFile]:
    """Return the files of one source: a file, a directory or a glob, as a path or a URL."""
    url = source if "://" in source else str(Path(source).expanduser().absolute())
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        # A web server knows no directories, and a query may look like a glob.
        if url.startswith(("http://", "https://")) or filesystem.isfile(path):
            entries, root, named = {path: filesystem.info(path)}, str(PurePosixPath(path).parent), True
        elif filesystem.isdir(path):
            entries, root, named = filesystem.find(path, detail=True), path, False
        else:
            entries = filesystem.glob(path, detail=True) if re.search(r"[*?[]", path) else {}
            root, named = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0], True
        entries = {name: info for name, info in entries.items() if _is_file(name, info)}
        if named and not entries:
            raise UserError(f"corpus.sources: no such file: {source}")
        labels = {name: name.removeprefix(root).lstrip("/") for name in sorted(entries)}
        if not named:
            labels = {name: label for name, label in labels.items() if not _hidden(label)}
        labels = _select(labels, corpus, named)
        explicit = named or bool(corpus.include)
        files = [
            file
            for name, label in labels.items()
            if (file := _source_file(filesystem, url, name, label, entries[name], corpus.format, explicit))
        ]
    except FileNotFoundError:
        raise UserError(f"corpus.sources: no such file: {source}") from None
    except Exception as error:  # each file system has its own types of errors
        if isinstance(error, UserError):
            raise
        raise UserError(f"corpus.sources: cannot read {source}: {error}") from None
    if not files:
        filtered = " after corpus.include and corpus.exclude" if corpus.include or corpus.exclude else ""
        raise UserError(
            f"corpus.sources: nothing to read in {source}{filtered}: a directory's files are found by the extensions "
            f"{', '.join(_KINDS)} (optionally with {', '.join(_COMPRESSION)}); name others, match them by a glob, or "
            "add them to corpus.include"
        )
    return files


def _is_file(name: str, info: dict[str, Any]) -> bool:
    """Whether the entry is a file or a link to one. Links to directories may lead in circles, so they do not count."""
    return info["type"] == "file" or (info.get("islink", False) and Path(name).is_file())


def _hidden(label: str) -> bool:
    return any(part.startswith(".") for part in label.split("/"))


def _select(labels: dict[str, str], corpus: CorpusConfig, named: bool) -> dict[str, str]:
    """Return the entries that corpus.include and corpus.exclude leave; `include` is only for directories."""

    def matches(key: str, patterns: list[str]) -> set[str]:
        try:
            return set(pathspec.GitIgnoreSpec.from_lines(patterns).match_files(labels.values()))
        except ValueError as error:
            raise UserError(f"corpus.{key} = {patterns}: {error}") from None

    included = matches("include", corpus.include) if corpus.include and not named else set(labels.values())
    excluded = matches("exclude", corpus.exclude) if corpus.exclude else set()
    chosen = included - excluded
    return {name: label for name, label in labels.items() if label in chosen}


def _source_file(
    filesystem: Any, url: str, name: str, label: str, info: dict[str, Any], format: str, explicit: bool
) -> SourceFile | None:
    """Return the file of an entry, or None if its format is unknown and the user has not named it."""
    web = url.startswith(("http://", "https://"))
    kind, compression = _kind(name.split("?")[0] if web else name, format, explicit)
    if kind is None and explicit:
        raise UserError(
            f"corpus.sources: {name}: unknown format: set corpus.format to one of "
            f"{', '.join(dict.fromkeys(_KINDS.values()))}"
        )
    if kind is None:
        return None
    if not _is_unicode(name):
        shown = os.fsencode(name).decode(errors="replace")
        raise UserError(
            f"corpus.sources: {shown}: its name is not valid UTF-8: rename it, or name it in corpus.exclude"
        )
    if info.get("size") is None:
        raise UserError(f"corpus.sources: {name}: the server does not tell its size; copy it to a disk or bucket first")
    if "://" not in url:
        stat = os.stat(name)  # noqa: PTH116  (as above); follows links
        return SourceFile(name, stat.st_size, str(stat.st_mtime), kind, compression, label)
    seekable = True
    if web:
        with filesystem.open(name, block_size=0, headers={"Range": "bytes=0-0"}) as file:
            seekable = file.r.status == 206
    path = filesystem.unstrip_protocol(name)
    return SourceFile(path, info["size"], _version(info), kind, compression, label, seekable)


def _is_unicode(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _version(info: dict[str, Any]) -> str:
    """Return what changes when a remote file changes: its modification time or ETag; empty if there is neither."""
    version = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
    return str(version.timestamp() if isinstance(version, datetime) else version)


def _kind(name: str, format: str, explicit: bool) -> tuple[Any, str]:
    """Return (kind or None, compression) of a file. For an explicit one corpus.format counts, not its extension."""
    stem, extension = os.path.splitext(name.lower())  # noqa: PTH122  (as above)
    compression = extension if extension in _COMPRESSION else ""
    if compression:
        extension = os.path.splitext(stem)[1]  # noqa: PTH122
    kind = _KINDS.get(extension)
    if kind is None and (explicit or format != "auto"):
        kind = _ALSO_TEXT.get(extension)
    if format == "auto":
        return kind, compression
    return (format if explicit or kind == format else None), compression


def _standard_library() -> list[SourceFile]:
    """Return the Python files of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _STDLIB_SKIPPED
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"corpus.sources: python-stdlib: this interpreter has no Python source code in {root}")
    stats = [(path, path.relative_to(root).as_posix(), path.stat()) for path in sorted(paths)]
    return [SourceFile(str(p), s.st_size, str(s.st_mtime), "text", "", name) for p, name, s in stats]


def plan(files: list[SourceFile], corpus: CorpusConfig, mapper: Mapper = map) -> list[Partition]:
    """Group the files, in order, into partitions of about `partition_bytes`; larger files are cut.

    mapper: a `map`, possibly parallel, that counts the quotes in the spans of large CSV files.
    Raises UserError if the corpus has a held-out tail but cannot be cut in two.
    """
    groups: list[list[Span]] = []
    free_bytes = 0
    for span in _with_quotes(list(_spans(files, corpus)), mapper):
        if not groups or span.size > free_bytes:
            groups.append([])
            free_bytes = corpus.partition_bytes
        groups[-1].append(span)
        free_bytes -= span.size
    return [tuple(group) for group in groups]


def describe_plan(partitions: list[Partition]) -> str:
    """Return the plan in one line: number of files, bytes, partitions, and files that cannot be cut."""
    files = {span.file.path: span.file for partition in partitions for span in partition}
    whole = [file for file in files.values() if not file.divisible]
    size = sum(file.size for file in files.values())
    text = f"{_count(len(files), 'file')}, {size / 1e6:,.1f} MB, {_count(len(partitions), 'partition')}"
    if whole:
        text += f"; {_count(len(whole), 'file')} cannot be cut (compressed, .json, or from a server without ranges)"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _spans(files: list[SourceFile], corpus: CorpusConfig) -> Iterator[Span]:
    """Yield the spans of all files, cut where the held-out tail begins and about every `partition_bytes`."""
    if corpus.heldout == "hash":
        for file in files:
            yield from _cut(file, 0, file.size, None, corpus.partition_bytes)
        return
    total = sum(file.size for file in files)
    tail_start = total - math.ceil(total * corpus.heldout_share)
    heldout = trained = before = 0
    for file in files:
        cut = min(max(tail_start - before, 0), file.size)
        if not file.divisible:
            cut = file.size if cut * 2 > file.size else 0  # the larger part of the file decides
        if cut or not file.size:
            yield from _cut(file, 0, cut, False, corpus.partition_bytes)
        if cut < file.size:
            yield from _cut(file, cut, file.size, True, corpus.partition_bytes)
        before, trained, heldout = before + file.size, trained + cut, heldout + file.size - cut
    if not trained or not heldout:
        raise UserError(
            'corpus.heldout = "tail": the files cannot be cut, so all or none would be held out; use "hash"'
        )


def _cut(file: SourceFile, start: int, end: int, heldout: bool | None, size: int) -> Iterator[Span]:
    """Yield spans of equal size, at most `size` bytes each, for bytes [start, end) of a file."""
    pieces = max(math.ceil((end - start) / size), 1) if file.divisible else 1
    cuts = [start + (end - start) * i // pieces for i in range(pieces + 1)]
    for left, right in pairwise(cuts):
        yield Span(file, left, right, heldout)


def cut_finer(span: Span, size: int) -> list[Span]:
    """Return the span cut into spans of about `size` bytes; a CSV span is not cut, which needs its quotes."""
    return [span] if span.file.kind == "csv" else list(_cut(span.file, span.start, span.end, span.heldout, size))


def _with_quotes(spans: list[Span], mapper: Mapper) -> Iterator[Span]:
    """Set `quoted` of the spans of CSV files that are cut: a byte is inside quotes if an odd number precede it."""
    cut = [span for span in spans if span.file.kind == "csv" and not span.whole]
    counts = iter(mapper(_count_quotes, cut))
    inside: dict[str, bool] = {}
    for span in spans:
        if span.file.kind == "csv" and not span.whole:
            start = inside.get(span.file.path, False)
            inside[span.file.path] = start ^ bool(next(counts) % 2)
            span = Span(span.file, span.start, span.end, span.heldout, (start, inside[span.file.path]))
        yield span


def _count_quotes(span: Span) -> int:
    """Return the number of double quotes in a span."""
    with span.file.open() as file:
        file.seek(span.start)
        blocks = iter(partial(file.read, 1 << 20), b"")
        count, remaining = 0, span.size
        while remaining > 0 and (block := next(blocks, b"")):
            count += block[:remaining].count(b'"')
            remaining -= len(block)
        return count
