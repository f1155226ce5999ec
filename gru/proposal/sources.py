"""The settings with which the files of a path are read: which of them, their format, encoding, separator and template.

They are chosen by a sample of the files. This module does not know the tokenizer or the model.
"""

import codecs
import csv
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from gru.config import CorpusConfig
from gru.config_corpus import BUILT_IN_SOURCES, Format, SourceConfig
from gru.corpus.excerpts import Excerpts
from gru.corpus.file_formats import describe_extensions, extension, file_format
from gru.corpus.listing import SourceFile, list_files
from gru.errors import UserError
from gru.proposal.settings import Setting
from gru.proposal.template import BODY_NAMES, TemplateChoice, choose_template
from gru.proposal.unreadable import describe_unreadable, suggest_conversion

_HEAD_BYTES = 1 << 16
_MOST_HEADS = 20  # files whose beginning is read
_SAMPLE_BYTES = 2 << 20  # of text
_SECONDS = 1.5  # for each of two samples of a path
_MOST_RECORDS = 300  # of one place
_SEPARATOR = "<|endoftext|>"
_LEAST_SHARE = 0.05  # of the bytes of source code, for an extension to be included


@dataclass(frozen=True)
class SourceChoice:
    """A path as the user typed it, and how it is read."""

    path: str
    settings: tuple[Setting, ...]  # keys of a table [[corpus.source]]
    has_records: bool
    is_chat: bool = False

    def table(self, path: str) -> SourceConfig:
        """Return the table for the path as it is to be opened."""
        return SourceConfig.model_validate({"path": path, **{each.key: each.value for each in self.settings}})


class _Head(NamedTuple):
    """The beginning of a file."""

    file: SourceFile
    data: bytes


def choose_source(path: str, absolute: str, store: str) -> SourceChoice:
    """Return how the files of a path, or of a URL, are read.

    absolute: the path as it is to be opened. store: the storage, whose files are not read. Raises UserError if there
    is nothing to read, or the records have no text.
    """
    settings = [*_choose_files(absolute, store)]
    files = list_files(_corpus(absolute, settings), store).files
    if not any(file.size or "://" in file.path for file in files):
        raise UserError(f"{path}: {'an empty file' if len(files) == 1 else 'all of its files are empty'}")
    heads = [*_heads(files)]
    settings += _choose_encoding(heads)
    settings += _choose_delimiter(heads)
    settings += _choose_separator(heads)
    if all(file.kind in ("text", "html") for file in files):
        return SourceChoice(path, tuple(settings), False)
    records = _sample_records(absolute, store, settings, files)
    if not records:
        has_records = any(file.kind not in ("text", "html", "archive") for file in files)
        return SourceChoice(path, tuple(settings), has_records)
    choice = choose_template(records)
    if choice is None and any(isinstance(record, dict) for record in records):
        names = ", ".join({str(name): None for record in records if isinstance(record, dict) for name in record})
        raise UserError(f"{path}: no field of its records has text; its fields: {names[:200]}")
    choice = choice or TemplateChoice("{text}", "")
    if choice.template != "{text}":
        settings.append(Setting("template", choice.template, choice.reason))
    return SourceChoice(path, tuple(settings), True, choice.chat)


def sample_texts(corpus: CorpusConfig, store: str) -> list[str]:
    """Return a sample of the documents of a corpus."""
    files = list_files(corpus, store).files
    excerpts = Excerpts(files, corpus, _SAMPLE_BYTES, time.monotonic() + _SECONDS)
    return [text for excerpt in excerpts for text in excerpt.texts]


def _corpus(path: str, settings: list[Setting]) -> CorpusConfig:
    table = {each.key: each.value for each in settings}
    return CorpusConfig(source=[SourceConfig.model_validate({"path": path, **table})])


def _choose_files(path: str, store: str) -> Iterator[Setting]:
    """Yield `include` and `format` where the extensions do not tell what is to be read."""
    if path in BUILT_IN_SOURCES or "://" in path:
        return
    if os.path.isfile(path):  # noqa: PTH113
        if file_format(path, "auto", True)[0] is None:
            yield Setting("format", _require_format(path), "by its content, as its extension does not tell")
    elif os.path.isdir(path):  # noqa: PTH112
        yield from _choose_in_directory(path, store)


def _choose_in_directory(path: str, store: str) -> Iterator[Setting]:
    everything = [Setting("include", ["*"], ""), Setting("format", "text", "")]
    counts, sizes = Counter[str](), Counter[str]()
    largest: dict[str, SourceFile] = {}
    try:
        files = list_files(_corpus(path, everything), store).files
    except UserError:
        if os.access(path, os.R_OK | os.X_OK) and not os.listdir(path):  # noqa: PTH208
            raise UserError(f"{path}: an empty directory") from None
        return  # one that cannot be read: listing it as it is says so
    for file in sorted(files, key=lambda file: -file.size):
        kind = extension(file.name)
        counts[kind] += 1
        sizes[kind] += file.size
        largest.setdefault(kind, file)
    read = {kind: size for kind, size in sizes.items() if file_format(f"a{kind}", "auto", False)[0]}
    others = sorted((kind for kind in sizes if kind and kind not in read), key=lambda kind: -sizes[kind])
    code = [kind for kind in others if file_format(f"a{kind}", "auto", True)[0]]
    size = sum(sizes[kind] for kind in code)
    if size > sum(read.values()):
        kinds = [kind for kind in code if sizes[kind] >= _LEAST_SHARE * size]
        yield Setting("include", [f"*{kind}" for kind in kinds], "most of the text here is in such files")
    elif not read:
        found = next(((kind, sniffed) for kind in others if (sniffed := _sniff(_head(largest[kind].path)))), None)
        if found is None:
            listed, conversion = describe_extensions(counts), suggest_conversion(counts)
            raise UserError(f"{path}: none of its files is text: {listed}{f'; {conversion}' if conversion else ''}")
        yield Setting("include", [f"*{found[0]}"], "no file here has an extension that is read by default")
        yield Setting("format", found[1], "by the content of these files")


def _require_format(path: str) -> Format:
    """Return the format of a file by its beginning. Raises UserError if it is none that can be read."""
    head = _head(path)
    if found := _sniff(head):
        return found
    if not head:
        raise UserError(f"{path}: an empty file")
    what = describe_unreadable(path, head) or "neither text, JSON nor Parquet, as far as its beginning tells"
    raise UserError(f"{path}: {what}")


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _sniff(head: bytes) -> Format | None:
    """Return the format of a file by its beginning; None if it is none that can be read."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if not head or b"\0" in head or describe_unreadable("", head):
        return None
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"{"):
        try:
            orjson.loads(start.split(b"\n", 1)[0])
        except orjson.JSONDecodeError:
            pass
        else:
            return "jsonl"
    if start.startswith((b"[{", b'["')):
        return "json"
    return "text"


def _heads(files: list[SourceFile]) -> Iterator[_Head]:
    """Yield the beginnings of some files that are text of a kind, at equal distances."""
    plain = [file for file in files if file.kind in ("text", "jsonl", "json", "csv") and not file.compression]
    for file in plain[:: len(plain) // _MOST_HEADS + 1]:
        try:
            with file.open() as opened:
                yield _Head(file, opened.read(_HEAD_BYTES))
        except OSError:
            continue  # the look at the corpus will say so


def _choose_encoding(heads: list[_Head]) -> Iterator[Setting]:
    """Yield the encoding if most files are not UTF-8, or another Unicode encoding with its mark."""
    broken = [head.data for head in heads if not head.data.startswith((b"\xff\xfe", b"\xfe\xff"))]
    broken = [data for data in broken if _decode(data, "utf-8") is None]
    if not broken or len(broken) <= len(heads) / 2:
        return
    for encoding in ("gb18030", "cp1252", "latin-1"):
        texts = [_decode(data, encoding) for data in broken]
        if None in texts:
            continue
        others = [character for text in texts if text for character in text if character > "\x7f"]
        if encoding == "gb18030" and sum("\u4e00" <= c <= "\u9fff" for c in others) < 0.7 * len(others):
            continue
        yield Setting("encoding", encoding, "not UTF-8; look whether the words below are right")
        return


def _decode(data: bytes, encoding: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return None


def _choose_delimiter(heads: list[_Head]) -> Iterator[Setting]:
    """Yield the delimiter of CSV whose first line has no comma."""
    for file, data in heads:
        if file.kind != "csv" or ".tsv" in extension(file.name):
            continue
        line = data.split(b"\n", 1)[0].decode("utf-8", "replace").strip("\r\ufeff")
        counts = {mark: len(next(csv.reader([line], delimiter=mark), [])) for mark in ",;\t|"}
        best = max(counts, key=lambda mark: counts[mark])
        if counts[","] == 1 < counts[best]:
            yield Setting("delimiter", best, "as in the first line")
        return


def _choose_separator(heads: list[_Head]) -> Iterator[Setting]:
    texts = [head.data for head in heads if head.file.kind == "text"]
    # In source code, the separator may be a part of the text.
    if texts and sum(_SEPARATOR.encode() in data for data in texts) > len(texts) / 2:
        yield Setting("separator", _SEPARATOR, "stands between documents")


def _sample_records(path: str, store: str, settings: list[Setting], files: list[SourceFile]) -> list[Any]:
    """Return records from all over the files, with all of their fields."""
    template = f"{{{'|'.join([*BODY_NAMES, *_parquet_columns(files)])}|}}"
    corpus = _corpus(path, [*settings, Setting("template", template, "")])
    excerpts = Excerpts(list_files(corpus, store).files, corpus, _SAMPLE_BYTES, time.monotonic() + _SECONDS)
    records: list[Any] = []
    place: list[Any] = []
    count = excerpts.report.on_record
    assert count

    def keep(record: Any) -> None:
        if len(place) < _MOST_RECORDS:
            place.append(record)
        count(record)

    excerpts.report.on_record = keep
    for _ in excerpts:
        records += place
        place.clear()
    return records + place


def _parquet_columns(files: list[SourceFile]) -> list[str]:
    """Return the names of the columns of some Parquet files, which are read only if a template names them."""
    names: dict[str, None] = {}
    for file in [file for file in files if file.kind == "parquet" and not file.compression][:_MOST_HEADS]:
        try:
            with file.open() as opened:
                names |= dict.fromkeys(pq.ParquetFile(opened).schema_arrow.names)
        except (OSError, pa.ArrowException):
            continue  # the look at the corpus will say so
    return [name for name in names if not set(name) & set("{}|!:") and not name.isdecimal() and name.strip()]
