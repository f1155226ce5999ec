"""Where text lies: finds the input files and cuts them into partitions.

A file is cut at any byte; whoever reads a span moves its ends on to the next border of documents. This module does
not know what is in the files, nor who works through the partitions.
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
# Text as well, but found beside a corpus as often as in one: read only if asked for.
_ALSO_TEXT: dict[str, Kind] = dict.fromkeys(
    [".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".rs", ".go"], "text"
)
_COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
_VERSION_KEYS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "created")
_STDLIB_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test", "lib2to3"),
    *("encodings", "pydoc_data", "turtledemo", "ensurepip", "lib-dynload"),
}  # fmt: skip
_CHUNK = 1 << 16

Mapper = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class SourceFile:
    path: str  # absolute, or a URL
    size: int
    modified: str  # whatever names this version of the file: its time of change or ETag
    kind: Kind
    compression: str  # ".gz", ".zst", ".bz2", ".xz" or none
    name: str  # what a dataset's rows call it: its path below the source it was found by
    seekable: bool = True  # false: the server sends it from the beginning only

    @property
    def divisible(self) -> bool:
        return self.kind != "json" and not self.compression and self.seekable

    def open(self) -> IO[bytes]:
        """Raises OSError."""
        if "://" not in self.path:
            return open(self.path, "rb")  # noqa: PTH123  (a Path would take longer than the opening)
        options = {} if self.seekable else {"block_size": 0}
        return fsspec.open(self.path, "rb", **options).open()

    def changed(self, file: IO[bytes]) -> bool:
        """Whether the file, which is open, is no more the one that was listed."""
        if "://" not in self.path:
            stat = os.fstat(file.fileno())
            return (stat.st_size, str(stat.st_mtime)) != (self.size, self.modified)
        filesystem, path = fsspec.core.url_to_fs(self.path)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        return (info["size"], _version(info)) != (self.size, self.modified)


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; where it is cut, both ends move on to the next border of documents."""

    file: SourceFile
    start: int
    end: int
    heldout: bool | None  # None: each document's hash decides
    quoted: tuple[bool, bool] = (False, False)  # CSV: whether the start and the end are inside of quotes

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end == self.file.size

    @property
    def size(self) -> int:
        return self.end - self.start


Partition = tuple[Span, ...]


def list_files(corpus: CorpusConfig) -> list[SourceFile]:
    """The files that the sources name, in the order of the sources and sorted within each.

    Raises UserError if a source is absent, holds nothing, or is of an unknown format.
    """
    found: dict[str, SourceFile] = {}
    for source in corpus.sources:
        files = _standard_library() if source in BUILT_IN_SOURCES else _find(source, corpus)
        for file in files:
            found.setdefault(file.path, file)
    return list(found.values())


def _find(source: str, corpus: CorpusConfig) -> list[SourceFile]:
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
    except Exception as error:  # each file system has its own
        if isinstance(error, UserError):
            raise
        raise UserError(f"corpus.sources: cannot read {source}: {error}") from None
    if not files:
        kept = " after corpus.include and corpus.exclude" if corpus.include or corpus.exclude else ""
        raise UserError(
            f"corpus.sources: nothing to read in {source}{kept}: files are known by {', '.join(_KINDS)} "
            f"({', '.join(_COMPRESSION)}); others must be named, included or matched by a glob"
        )
    return files


def _is_file(name: str, info: dict[str, Any]) -> bool:
    """Links to files are followed; those to directories are not, so that nothing is read twice or for ever."""
    return info["type"] == "file" or (info.get("islink", False) and Path(name).is_file())


def _hidden(label: str) -> bool:
    return any(part.startswith(".") for part in label.split("/"))


def _select(labels: dict[str, str], corpus: CorpusConfig, named: bool) -> dict[str, str]:
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
    web = url.startswith(("http://", "https://"))
    kind, compression = _kind(name.split("?")[0] if web else name, format, explicit)
    if kind is None and explicit:
        raise UserError(
            f"corpus.sources: {name}: its name does not tell the format: set corpus.format to one of "
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
        raise UserError(f"corpus.sources: {name}: its size is unknown; copy it to a disk or bucket first")
    if "://" not in url:
        stat = os.stat(name)  # noqa: PTH116  (as above); of what a link points to
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
    version = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
    return str(version.timestamp() if isinstance(version, datetime) else version)  # one of many, or of one file


def _kind(name: str, format: str, explicit: bool) -> tuple[Any, str]:
    """(kind or None, compression) of a file; one that is named has the format set, whatever its extension."""
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
    """Group the files, in order, into partitions of about `partition_bytes`, cutting those that are larger.

    mapper: a `map` that may work in parallel, for the quotes of large CSV files, which are counted once.
    Raises UserError if the corpus has a held-out tail but cannot be cut into two.
    """
    groups: list[list[Span]] = []
    room = 0
    for span in _with_quotes(list(_spans(files, corpus)), mapper):
        if not groups or span.size > room:
            groups.append([])
            room = corpus.partition_bytes
        groups[-1].append(span)
        room -= span.size
    return [tuple(group) for group in groups]


def describe(partitions: list[Partition]) -> str:
    """The plan in one line: files, bytes, partitions, and which files are too large for how they can be cut."""
    files = {span.file.path: span.file for partition in partitions for span in partition}
    whole = [file for file in files.values() if not file.divisible]
    size = sum(file.size for file in files.values())
    text = f"{_count(len(files), 'file')}, {size / 1e6:,.1f} MB, {_count(len(partitions), 'partition')}"
    if whole:
        text += f"; {len(whole):,} cannot be cut (compressed, .json, or sent from the beginning only)"
    return text


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _spans(files: list[SourceFile], corpus: CorpusConfig) -> Iterator[Span]:
    if corpus.heldout == "hash":
        for file in files:
            yield from _cut(file, 0, file.size, None, corpus.partition_bytes)
        return
    total = sum(file.size for file in files)
    border = total - math.ceil(total * corpus.heldout_share)
    heldout = trained = before = 0
    for file in files:
        cut = min(max(border - before, 0), file.size)
        if not file.divisible:
            cut = file.size if cut * 2 > file.size else 0  # it belongs to where the larger part of it lies
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
    pieces = max(math.ceil((end - start) / size), 1) if file.divisible else 1
    borders = [start + (end - start) * i // pieces for i in range(pieces + 1)]
    for left, right in pairwise(borders):
        yield Span(file, left, right, heldout)


def cut_finer(span: Span, size: int) -> list[Span]:
    """The span in pieces of about `size` bytes, where that takes no look into the file."""
    return [span] if span.file.kind == "csv" else list(_cut(span.file, span.start, span.end, span.heldout, size))


def _with_quotes(spans: list[Span], mapper: Mapper) -> Iterator[Span]:
    """Tell the spans of a CSV file that is cut whether their ends are inside of quotes: an odd number before them."""
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
    with span.file.open() as file:
        file.seek(span.start)
        blocks = iter(partial(file.read, 1 << 20), b"")
        count, left = 0, span.size
        while left > 0 and (block := next(blocks, b"")):
            count += block[:left].count(b'"')
            left -= len(block)
        return count


def document_bounds(file: IO[bytes], span: Span, separator: bytes = b"\n") -> tuple[int, int]:
    """Where the span really starts and ends in the file: behind the first separator that ends after its own ends.

    The two ends of the file stay. In CSV a separator in quotes is none; in Parquet the span's row groups are those
    that start in it.
    """
    if span.file.kind == "parquet":
        return span.start, span.end
    quoted = span.quoted if span.file.kind == "csv" else (None, None)
    start, end = (
        position if position in (0, span.file.size) else _next_border(file, position, separator, inside)
        for position, inside in zip((span.start, span.end), quoted, strict=True)
    )
    return start, end


def _next_border(file: IO[bytes], position: int, separator: bytes, quoted: bool | None) -> int:
    """quoted: whether `position` is in quotes; None where quotes mean nothing. Without a border: the file's end."""
    limit = position
    position = _apart(file, max(0, position - len(separator) + 1), separator)
    file.seek(position)
    data = b""
    while chunk := file.read(_CHUNK):
        data += chunk
        done = 0
        while (found := data.find(separator, done)) >= 0:
            if quoted is not None:
                quoted ^= data.count(b'"', done, found) % 2 == 1
            done = found + len(separator)
            if not quoted and position + done > limit:
                return position + done
        keep = max(done, len(data) - len(separator) + 1)
        if quoted is not None:
            quoted ^= data.count(b'"', done, keep) % 2 == 1
        position, data = position + keep, data[keep:]
    return position + len(data)


def _apart(file: IO[bytes], position: int, separator: bytes) -> int:
    """`position`, or one before it into which no separator reaches: from there separators that overlap, such as
    empty lines, are told apart as from the beginning of the file.
    """
    reach = len(separator) - 1
    while position and reach:
        start = max(0, position - reach)
        file.seek(start)
        found = file.read(position - start + reach).find(separator)
        if found < 0:
            break
        position = start + found
    return position
