"""The sections of the configuration for the dataset: [corpus] with its sources and filters, and [tokenizer].

This module does not know the other sections, or where the values come from.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gru.config_fields import CHAT_TEMPLATE, ChatTemplate, PositiveInt, Section, with_pattern

BUILT_IN_SOURCES = ("python-stdlib",)
Format = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "html"]
Normalization = Literal["none", "NFC", "NFKC"]
_DELIMITER = r"""[^\r\n"]"""


def _check_delimiter(text: str) -> str:
    if not re.fullmatch(_DELIMITER, text):
        raise ValueError("must be one character, and no double quote or line end")
    return text


def _check_paths(value: Any) -> Any:
    paths = value if isinstance(value, list) else [value]
    if value in ("", []) or not all(isinstance(path, str) for path in paths):
        raise ValueError("must be a path or URL, or a list of them")
    return value


def _check_header(names: list[str]) -> list[str]:
    if len({*names}) < len(names):
        raise ValueError("must not have a name twice")
    return names


def _check_pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"must be a regular expression ({error})") from None
    return text


def _check_language(text: str) -> str:
    if not re.fullmatch("[a-z]{2,3}", text):
        raise ValueError('must be an ISO 639 code, as in "en"')
    return text


Delimiter = Annotated[str, with_pattern(_DELIMITER), AfterValidator(_check_delimiter)]
Header = Annotated[list[str], Field(min_length=1), AfterValidator(_check_header)]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
Language = Annotated[str, AfterValidator(_check_language)]


@dataclass(frozen=True)
class SourceOptions:
    """How the files of one source are found and read: its table with the defaults of [corpus] filled in."""

    key: str
    """The key of the table: `corpus.sources`, or `corpus.source.0`, `corpus.source.1`, ..."""
    index: int
    """Position in `CorpusConfig.source_options()`."""
    paths: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    format: Format
    encoding: str
    separator: str | None
    template: str
    delimiter: str | None
    quoting: bool | None
    header: tuple[str, ...] | None
    weight: float
    limit: int | None

    def key_of(self, name: str) -> str:
        """Return the full name of a key of this source, for messages."""
        return f"corpus.{name}" if self.key == "corpus.sources" else f"{self.key}.{name}"


class SourceConfig(Section):
    """A source with settings of its own; absent keys are those of [corpus]."""

    path: Annotated[str | list[str], BeforeValidator(_check_paths)] = Field(
        description="File, directory, glob or URL, or a list of them. A file that several sources match belongs to the "
        "last of them.",
    )
    template: str | None = Field(None, min_length=1, description="As `corpus.template`.")
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0,
        description="How often an epoch reads the text of this source: 2.0 twice, 0.25 a quarter of its segments. "
        "Held-out text is not weighted.",
    )
    limit: PositiveInt | None = Field(
        None,
        description="Maximum documents of this source, the first in their order, with equal ones; what follows them "
        "is not read. Absent: all.",
    )
    include: list[str] | None = Field(None, description="As `corpus.include`.")
    exclude: list[str] | None = Field(None, description="As `corpus.exclude`.")
    format: Format | None = Field(None, description="As `corpus.format`.")
    encoding: str | None = Field(None, description="As `corpus.encoding`.")
    separator: str | None = Field(None, min_length=1, description="As `corpus.separator`.")
    delimiter: Delimiter | None = Field(None, description="As `corpus.delimiter`.")
    quoting: bool | None = Field(None, description="As `corpus.quoting`.")
    header: Header | None = Field(None, description="As `corpus.header`.")


class FilterConfig(Section):
    """Filters, all off by default. Each one counts the documents that it leaves out under its own reason."""

    keep_pattern: Pattern | None = Field(
        None,
        description="Regular expression of Python's `re`, as in `(?i)recipe`; documents that contain no match are left "
        "out. Absent: no such condition.",
    )
    drop_pattern: Pattern | None = Field(
        None,
        description="Regular expression of Python's `re`; documents that contain a match are left out. Absent: no such "
        "condition.",
    )
    languages: list[Language] = Field(
        [],
        description='Languages to keep, by ISO 639 code, as in ["en", "zh"]; documents in others, and those too short '
        "to tell (often below 20 letters), are left out. Needs the extra `languages` (py3langid). Empty: all.",
    )
    gopher_quality: bool = Field(
        False,
        description="Leave out documents that are not like English prose, by the rules of Gopher (Rae et al. 2021, "
        "A1.1): 50 to 100,000 words of 3 to 10 characters on average, few symbols, two stop words, and others. Words "
        "are counted by the white space between them: not for Chinese or other scripts without it.",
    )
    gopher_repetition: bool = Field(
        False,
        description="Leave out documents that repeat their own lines, paragraphs or n-grams of words, by the limits of "
        "Gopher (Rae et al. 2021, table A1). In scripts without white space between words, only lines and paragraphs "
        "count.",
    )
    mask_emails: bool = Field(False, description="Replace e-mail addresses by `email@example.com`.")
    mask_ips: bool = Field(
        False,
        description="Replace public IP addresses by `192.0.2.1` or `2001:db8::1`; a version number of four parts looks "
        "like one.",
    )


class CorpusConfig(Section):
    """The text: where it is, how it is read, cleaned, deduplicated and held out."""

    sources: list[str] = Field(
        [],
        description="Files, directories, globs or URLs (https://, s3://) to read; `python-stdlib` is the Python source "
        "code of the running interpreter's standard library.",
    )
    source: list[SourceConfig] = Field(
        [], description="Sources with settings of their own: tables [[corpus.source]] with `path` and more."
    )
    include: list[str] = Field(
        [],
        description="Patterns of the files to read in a directory, as in .gitignore (`*.c`, `src/**/*.py`). Empty: "
        "those with an extension of `format`.",
    )
    exclude: list[str] = Field(
        [], description="Patterns of the files to leave out of a directory or glob, as in .gitignore (`tests/`)."
    )
    format: Format = Field(
        "auto",
        description="Format of the sources; `auto` decides by extension: .txt, .md, .jsonl, .json, .csv, .tsv, "
        ".parquet, .html, with .gz, .zst, .bz2 or .xz behind it if compressed; members of .zip and .tar are read too. "
        "Source code (.py) is read as text where a source, a glob or `include` names it.",
    )
    encoding: str = Field(
        "utf-8",
        description="Encoding of text, JSON and CSV, such as `latin-1` or `gb18030`. A byte order mark of UTF-8, "
        "UTF-16 or UTF-32 counts more.",
    )
    separator: str | None = Field(
        None,
        min_length=1,
        description="Text between two documents of a text file. Absent: the file is one document.",
    )
    template: str = Field(
        "{text}",
        min_length=1,
        description="Text to make from a record of JSON, CSV or Parquet, with the names of its fields in braces; "
        "{meta.title} is a nested field, {title|name|} the first that has text, where none is needed, and "
        "{author|Anonymous} the word Anonymous if no field has text. A list becomes lines, chat messages the form of "
        "`chat_template`. A record that is a string fills the only field. A record that lacks a field is left out.",
    )
    chat_template: ChatTemplate = Field(
        CHAT_TEMPLATE,
        description="Text to make from each message of a chat, that a record of the corpus holds (a list with `role` "
        "and `content`) or the endpoint gets.",
    )
    delimiter: Delimiter | None = Field(
        None, description="Character between two fields of CSV. Absent: a tab in .tsv, else a comma."
    )
    quoting: bool | None = Field(
        None,
        description="Whether a field of CSV that begins with a double quote extends to the next single one. Absent: "
        "not in .tsv.",
    )
    header: Header | None = Field(
        None,
        description="Names of the fields of CSV files without a line of names. Absent: the first line has them.",
    )
    filter: FilterConfig = FilterConfig()
    dropped: str | None = Field(
        None,
        description="Path or URL of a directory for the documents that are left out, as JSON Lines with their reasons. "
        "Absent: they are only counted.",
    )
    on_bad: Literal["drop", "replace", "fail"] = Field(
        "drop",
        description="Treatment of a document that is not valid UTF-8: leave it out (`drop`), put U+FFFD in place of "
        "the invalid bytes (`replace`), or stop (`fail`). Broken records and files are left out; with `fail` they "
        "stop the job. What is left out is counted.",
    )
    normalization: Normalization = Field("none", description="Unicode normalization form of the documents.")
    min_characters: Annotated[int, Field(ge=1)] = Field(
        1, description="Length of the shortest document to keep; shorter ones are left out."
    )
    max_characters: PositiveInt | None = Field(
        None, description="Length of the longest document to keep; longer ones are left out. Absent: no limit."
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact",
        description="Keep only the first of several equal documents in the whole corpus (`exact`), or of several equal "
        "or similar ones (`near`, for which one process needs 3 KB of memory per document).",
    )
    near_similarity: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="Minimum Jaccard similarity of the 5-character shingles of two documents that are `near`."
    )
    heldout: Literal["hash", "tail"] = Field(
        "hash",
        description="Text that is held out from training: documents chosen by a hash of their content (`hash`), or the "
        "end of the corpus (`tail`). Where the hash chooses none, it is the document with the lowest hash, or of one "
        "document and of text files the end of the last one.",
    )
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01,
        description="Share of the corpus that is held out: of its documents (`hash`), or of its bytes (`tail`).",
    )
    partition_bytes: PositiveInt = Field(
        32 << 20,
        description="Bytes of input in one partition, the unit of work; larger files are cut, except compressed ones, "
        ".json, and text in another encoding than UTF-8.",
    )
    segment_tokens: PositiveInt = Field(
        65_536,
        description="Minimum tokens in a segment (a Parquet row group); only the last one of a shard may have fewer.",
    )

    @model_validator(mode="after")
    def check(self) -> "CorpusConfig":
        """Check the keys that depend on each other."""
        if not self.sources and not self.source:
            raise ValueError('needs sources = ["path"], or tables [[corpus.source]] with a path')
        return self

    @property
    def paths(self) -> list[str]:
        """All paths and URLs of the sources."""
        return [path for options in self.source_options() for path in options.paths]

    def source_options(self) -> list[SourceOptions]:
        """Return the options of each source: those of `sources` first, then one for each table."""
        tables = [("corpus.sources", SourceConfig(path=self.sources))] if self.sources else []
        tables += [(f"corpus.source.{index}", table) for index, table in enumerate(self.source)]
        return [self._options(index, key, table) for index, (key, table) in enumerate(tables)]

    def _options(self, index: int, key: str, table: SourceConfig) -> SourceOptions:
        def chosen(name: str) -> Any:
            value = getattr(table, name)
            value = getattr(self, name) if value is None else value
            return tuple(value) if isinstance(value, list) else value

        shared = ("include", "exclude", "format", "encoding", "separator", "template", "delimiter", "quoting", "header")
        paths = (table.path,) if isinstance(table.path, str) else tuple(table.path)
        values = {name: chosen(name) for name in shared}
        return SourceOptions(key=key, index=index, paths=paths, weight=table.weight, limit=table.limit, **values)


class TokenizerConfig(Section):
    """The tokenizer: trained on the corpus, or loaded from a file."""

    kind: Literal["bpe", "char", "byte", "word"] = Field(
        "bpe",
        description="Kind of tokenizer: `bpe` (byte-level), `char` (characters, with bytes for those outside the "
        "vocabulary), `byte`, or `word` (words between spaces, for text that is tokenized already).",
    )
    path: str | None = Field(
        None,
        description="Path of an existing tokenizer.json to use instead of training one; the other keys of this "
        "section are then not used.",
    )
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        4096, description="Maximum number of tokens in the vocabulary of `bpe`, `char` and `word`."
    )
    sample_bytes: PositiveInt = Field(
        50_000_000, description="Bytes of text that the tokenizer is trained on, sampled from the whole corpus."
    )
