"""The configuration: a record for each section of the TOML file, and `PipelineConfig` for the whole file.

Each part of the library takes its own section and sees no other. The descriptions here are the documentation:
`gru run --help` and the JSON Schema for editors show them.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gru.errors import UserError

BUILT_IN_SOURCES = ("python-stdlib",)
NO_MODEL = "none"  # train.init_digest if train.init_from was looked up, and there is no such model yet

PositiveInt = Annotated[int, Field(gt=0)]
_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
Share = Annotated[float, Field(ge=0, lt=1)]
GpuCount = Annotated[int, Field(ge=0, le=1)]
Cell = Literal["gru", "lstm", "rnn", "mingru"]


def _check_label(text: str) -> str:
    if not re.fullmatch(rf"([A-Za-z0-9.-]+/)?{_LABEL}", text):
        raise ValueError("must be the name of a label, as in pool or ray.io/market-type")
    return text


def _check_selector(text: str) -> str:
    if not re.fullmatch(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))", text):
        raise ValueError("must be a label's value, as in gpu, !gpu, in(a, b) or !in(a, b)")
    return text


_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # the syntax of Kubernetes and Ray
Labels = dict[Annotated[str, AfterValidator(_check_label)], Annotated[str, AfterValidator(_check_selector)]]


class Section(BaseModel):
    """The base of all sections: immutable, strict about types, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Format = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "html"]
Normalization = Literal["none", "NFC", "NFKC"]
CHAT_TEMPLATE = "{role}:\n{content}\n\n"


_CHAT_TEMPLATE = r"[^{}]*(\{role\}[^{}]*)?\{content\}[^{}]*"
_DELIMITER = r"""[^\r\n"]"""
_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+"


def _check_chat_template(text: str) -> str:
    if not re.fullmatch(_CHAT_TEMPLATE, text):
        raise ValueError("must have {content} once, perhaps {role} before it, and no other braces")
    return text


def _check_delimiter(text: str) -> str:
    if not re.fullmatch(_DELIMITER, text):
        raise ValueError("must be one character, and no double quote or line end")
    return text


def _check_origin(text: str) -> str:
    if not re.fullmatch(_ORIGIN, text):
        raise ValueError("must be as browsers send it, as in https://app.example.org: no path, no capitals; or *")
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


def _pattern(pattern: str) -> Any:
    """Return a field whose pattern editors know; the program's own check says in words what is wrong."""
    return Field(json_schema_extra={"pattern": f"^{pattern}$"})


ChatTemplate = Annotated[str, _pattern(_CHAT_TEMPLATE), AfterValidator(_check_chat_template)]
Delimiter = Annotated[str, _pattern(_DELIMITER), AfterValidator(_check_delimiter)]
Origin = Annotated[str, _pattern(f"({_ORIGIN})"), AfterValidator(_check_origin)]
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
        description="Maximum documents of this source, the first in their order, with equal ones; the others are "
        "read all the same, and counted. Absent: all.",
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


class ModelConfig(Section):
    """The architecture of the language model."""

    embedding: PositiveInt = Field(384, description="Width of the token embedding, shared with the output layer.")
    hidden: PositiveInt = Field(
        384, description="Width of the hidden state of each recurrent layer; multiples of 32 are fastest on CPUs."
    )
    layers: PositiveInt = Field(1, description="Number of residual recurrent blocks.")
    cell: Cell = Field(
        "gru",
        description="Recurrent cell of each block: `gru`, `lstm`, `rnn` (tanh), or `mingru`, whose gates do not read "
        "the hidden state.",
    )
    dropout: Share = Field(
        0.0, description="Dropout rate in training, on the inputs of each block and of the output layer."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Number type of the factors of matrix products in training; `auto`: bf16 where it is faster.",
    )


class TrainConfig(Section):
    """Training: optimizer, batches, workers and checkpoints."""

    # The keys for where and how training runs, which change the trained weights by rounding at most.
    PLACEMENT: ClassVar = (
        "workers",
        "min_workers",
        "threads",
        "checkpoint_seconds",
        "checkpoint_steps",
        "keep",
        "max_failures",
        "stall_seconds",
    )
    # The keys for the initial weights, which are the same whatever their name is.
    INITIAL: ClassVar = ("init_from", "init_digest")

    steps: PositiveInt = Field(1000, description="Number of optimizer steps.")
    batch_size: PositiveInt = Field(
        32, description="Number of lanes: the streams of text that all workers together read in parallel."
    )
    sequence_length: PositiveInt = Field(
        64, description="Tokens that each lane reads per step: the length of truncated backpropagation through time."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(4e-3, description="Peak learning rate of AdamW.")
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05,
        description="Learning rate at the end of the cosine schedule, as a ratio to `learning_rate`: 0.05 is a "
        "twentieth.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(50, description="Number of steps of linear warm-up.")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="Decay of AdamW's second moment.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="Weight decay of AdamW, on matrices only.")
    clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Maximum norm of the gradient; a larger gradient is scaled down to it."
    )
    ema_decay: Share = Field(
        0.995, description="Decay of the moving average of the weights; this average is evaluated and served."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Random seed of the initial weights, the order of the text and dropout."
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description="Model to start from instead of random weights: `NAME@ALIAS` or `NAME:VERSION` of the registry, "
        "`@champion` for this pipeline's own (random weights while it has none), or the path or URL of a bundle or "
        "checkpoint. Its averaged weights and its tokenizer are used: the shape in [model] must be the same, and keys "
        "of [tokenizer] must fit it or have their defaults. Schedule, optimizer and hidden states start anew. An alias "
        "is looked up once, when a run starts.",
    )
    init_digest: Annotated[str, Field(pattern=f"^([0-9a-f]{{64}}|{NO_MODEL})$")] | None = Field(
        None,
        description="Digest of the bundle that `init_from` must name, as `gru lineage` shows it; `none`: there is none "
        "yet. A run sets it when it looks up `init_from`. Absent: any.",
    )
    workers: PositiveInt = Field(
        1, description="Number of training processes (data parallelism), at most `batch_size`."
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="Minimum workers to train with if the cluster has no room for all `workers`: the run uses as many "
        "as fit, and adapts while the cluster grows and shrinks. Absent: all `workers` or none.",
    )
    bitwise_elastic: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Maximum workers that give bit-identical weights on CPUs, whatever their number: the lanes are "
        "computed in this many parts, with gradients summed in a fixed order. 0: plain data parallelism, where weights "
        "differ by rounding if the number of workers differs.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="CPU threads of each worker. 0: the machine's cores, divided among its workers, or 1 thread with "
        "`bitwise_elastic`, because the number of threads changes rounding.",
    )
    log_steps: PositiveInt = Field(10, description="Steps between two logged points.")
    heldout_steps: PositiveInt = Field(250, description="Steps between two measurements of the held-out loss.")
    heldout_tokens: PositiveInt = Field(100_000, description="Maximum held-out tokens that one measurement reads.")
    checkpoint_seconds: Annotated[float, Field(gt=0)] = Field(30, description="Seconds between two checkpoints.")
    checkpoint_steps: PositiveInt | None = Field(
        None, description="Steps between two checkpoints. Absent: `checkpoint_seconds` decides."
    )
    keep: PositiveInt = Field(
        2, description="Number of newest checkpoints to keep, besides the one with the lowest held-out loss."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3,
        description="Maximum worker failures to recover from before giving up. A drained node does not count; after "
        "it, and after a crash of Ray Train's controller, the count restarts.",
    )
    stall_seconds: Annotated[float, Field(ge=5)] = Field(
        45, description="Seconds without a finished step after which a worker counts as failed and is restarted."
    )

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        """Check the keys that depend on each other."""
        if self.init_digest and not self.init_from:
            raise ValueError("init_digest needs init_from")
        if self.workers > self.batch_size:
            raise ValueError(
                f"workers = {self.workers} exceeds batch_size = {self.batch_size}: each worker needs a lane"
            )
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers} exceeds workers = {self.workers}")
        if self.bitwise_elastic > self.batch_size:
            raise ValueError(
                f"bitwise_elastic = {self.bitwise_elastic} exceeds batch_size = {self.batch_size}: each part needs a "
                "lane"
            )
        if self.bitwise_elastic and self.workers > self.bitwise_elastic:
            raise ValueError(
                f"workers = {self.workers} exceeds bitwise_elastic = {self.bitwise_elastic}: each worker needs a part"
            )
        return self


class EvaluateConfig(Section):
    """Evaluation: scores on held-out text, and sampled texts."""

    batch_size: PositiveInt = Field(16, description="Number of streams of held-out text that are read in parallel.")
    heldout_bytes: PositiveInt = Field(4_000_000, description="Maximum bytes of held-out text that are scored.")
    prompt: str = Field("\n", description="Prompt of the sampled texts.")
    sample_tokens: PositiveInt = Field(200, description="Number of tokens in each sampled text.")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.5, 0.8, 1.0], min_length=1, description="Temperatures, at each of which one text is sampled."
    )


class RegistryConfig(Section):
    """Names in MLflow."""

    model: Name | None = Field(None, description="Name of the registered model. Absent: the pipeline's name.")
    experiment: Name | None = Field(None, description="Name of the MLflow experiment. Absent: the pipeline's name.")


class CanaryConfig(Section):
    """A second version of the model that answers a share of the requests."""

    alias: Name = Field("challenger", description="Alias of the version that answers a share of the requests.")
    share: Share = Field(
        0.0,
        description="Share of the requests that this version answers; all requests of a session go to the same "
        "version. 0: it is not loaded.",
    )


class ServeConfig(Section):
    """The HTTP endpoint."""

    host: str = Field("127.0.0.1", description="Address that the endpoint listens on.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="Port of the endpoint.")
    replicas: PositiveInt = Field(
        1, description="Number of replicas (serving processes); with `max_replicas` the minimum."
    )
    max_replicas: PositiveInt | None = Field(
        None,
        description="Maximum replicas; their number follows the tokens in flight. Absent: always `replicas`.",
    )
    tokens_per_replica: PositiveInt = Field(
        20_000,
        description="Tokens in flight (prompts and `max_tokens` of unfinished requests) per replica above which "
        "another one starts.",
    )
    slots: Annotated[int, Field(ge=4)] = Field(
        32, description="Number of texts that a replica generates together; other requests wait."
    )
    threads: PositiveInt = Field(
        1,
        description='Threads that compute each step of a model with `cell = "gru"`; use more than 1 only where each '
        "replica has that many idle cores. The texts do not depend on it.",
    )
    max_queue: PositiveInt = Field(256, description="Maximum requests that wait for a slot; more are refused (429).")
    max_tokens_in_flight: PositiveInt = Field(
        4_000_000, description="Maximum tokens in flight in a replica; further requests are refused (429)."
    )
    max_tokens: PositiveInt = Field(4096, description="Maximum tokens that one request may ask for.")
    max_prompt_tokens: PositiveInt = Field(200_000, description="Maximum tokens in a prompt.")
    max_body_bytes: PositiveInt = Field(
        8 << 20, description="Maximum bytes in the body of a request; larger ones are refused (413)."
    )
    request_seconds: Annotated[float, Field(gt=0)] = Field(
        600, description="Maximum seconds that a request may take; then it ends with an error (503)."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        64 << 20, description="Bytes of memory in each replica for the hidden states of sessions and the prefix cache."
    )
    keys: str | None = Field(
        None,
        description="Path of a file of lines from `gru key`; each request needs the key of one of them. Absent: none "
        "is needed.",
    )
    cors_origins: list[Origin] = Field(
        [],
        description="Origins of web pages that may send requests from a browser, such as `https://app.example.org`; "
        "`*`: all. Empty: none.",
    )
    chat_template: ChatTemplate | None = Field(
        None,
        description="Text to make from each message of a chat. The answer takes the place of the next `{content}`, and "
        "ends at the text after it. Absent: `corpus.chat_template`.",
    )
    poll_seconds: Annotated[float, Field(gt=0)] = Field(5, description="Seconds between two looks at `@champion`.")
    canary: CanaryConfig = CanaryConfig()

    @model_validator(mode="after")
    def check(self) -> "ServeConfig":
        """Check the keys that depend on each other."""
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is below replicas = {self.replicas}")
        return self


class Resources(Section):
    """The resources of the cluster that each process of a stage gets. They change results by rounding at most."""

    cpus: Annotated[float, Field(ge=0)] = Field(description="CPUs that Ray reserves for each process.")
    memory: PositiveInt | None = Field(
        None,
        description="Bytes of memory that Ray reserves for each process, without limiting it. Absent: none.",
    )
    labels: Labels = Field(
        {},
        description='Labels of nodes to run on: `{ pool = "gpu" }`, or as the value `!gpu` (not), `in(a, b)` (one of) '
        "or `!in(a, b)` (none of).",
    )

    def amounts(self) -> dict[str, float]:
        """Return the reserved amounts by Ray's names."""
        return {"CPU": self.cpus, "memory": self.memory or 0}


class PrepareResources(Resources):
    """The resources of each task of prepare."""

    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs that Ray reserves for each task.")


class GpuResources(Resources):
    """The resources of a stage whose processes can each compute on a GPU."""

    gpus: GpuCount = Field(0, description="GPUs of each process.")

    def amounts(self) -> dict[str, float]:
        return {**super().amounts(), "GPU": self.gpus}


class TrainResources(GpuResources):
    """The resources of each training worker."""

    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs that Ray reserves for each worker.")
    gpus: GpuCount = Field(
        0, description="GPUs of each worker: with 1 it trains on the GPU, and workers communicate through NCCL."
    )


class EvaluateResources(GpuResources):
    """The resources of the evaluate job, and of the promote job, which scores the current champion."""

    cpus: Annotated[float, Field(ge=0)] = Field(
        0,
        description="CPUs that Ray reserves for the evaluate job, and for the promote job. Without CPUs, GPU, memory "
        "and labels, they run on the head node.",
    )
    gpus: GpuCount = Field(
        0,
        description="GPUs of the evaluate job, and of the promote job: with 1 they score held-out text on the GPU. "
        "Texts are sampled on the CPU.",
    )


class ServeResources(Resources):
    """The resources of each serving replica."""

    cpus: Annotated[float, Field(ge=0)] = Field(
        0.5,
        description="CPUs that Ray reserves for each replica; fewer than 1 leaves room for other stages on a small "
        "machine.",
    )


class ResourcesConfig(Section):
    """The resources that Ray reserves for each stage. They change results by rounding at most."""

    prepare: PrepareResources = PrepareResources()
    train: TrainResources = TrainResources()
    evaluate: EvaluateResources = EvaluateResources()
    serve: ServeResources = ServeResources()


class PipelineConfig(Section):
    """The configuration of a pipeline, from text to a served model."""

    name: Name = Field("gru", description="Name of the pipeline, and of its experiment and model.")
    storage: str = Field("./store", description="Path or URL of the directory for datasets, runs and models.")
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    registry: RegistryConfig = RegistryConfig()
    serve: ServeConfig = ServeConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def model_name(self) -> str:
        return self.registry.model or self.name

    @property
    def experiment(self) -> str:
        return self.registry.experiment or self.name


def is_model_reference(text: str) -> bool:
    """Whether `text` names a model of the registry, as NAME@ALIAS, NAME:VERSION, or @ALIAS of the pipeline's own."""
    return re.fullmatch(rf"({_NAME})?@{_NAME}|{_NAME}:\d+", text) is not None


def load(source: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a TOML file, or a JSON object passed as text, apply `section.key=value` overrides, and validate.

    Raises UserError naming the file and the wrong key.
    """
    inline = str(source).lstrip().startswith("{")
    path = "configuration" if inline else source
    try:
        table = json.loads(str(source)) if inline else tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:  # invalid TOML, JSON or UTF-8
        raise UserError(f"{path}: not valid {'JSON' if inline else 'TOML'}: {error}") from None
    for override in overrides:
        _apply(table, override, "--set ")
    return _validated(table, str(path))


def changed(config: PipelineConfig, overrides: Sequence[str], option: str) -> PipelineConfig:
    """Return the configuration with `section.key=value` overrides.

    option: the command line option that they come from. Raises UserError naming it if an override is wrong.
    """
    table = config.model_dump()
    for override in overrides:
        _apply(table, override, option)
    return _validated(table, option.strip(" :"))


def _validated(table: dict[str, Any], where: str) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_explain(dict(e)) for e in error.errors())}") from None


def _apply(table: dict[str, Any], override: str, option: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"{option}{override}: must be section.key=value, as in train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set name=mine
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"{option}{override}: {part} is a value, not a section")
    table[parts[-1]] = value


# What a value must be, by pydantic's error type.
_TYPE_ERRORS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _explain(error: dict[str, Any]) -> str:
    """Return one of pydantic's errors in words: `train.steps: must be an integer >= 1, not 0`."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "configuration"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; known here: {', '.join(_keys_at(location[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: required but absent"
    value = error.get("input")
    shown = f", not {value!r}" if not isinstance(value, dict) else ""
    return f"{key}: {_requirement(error, location)}{shown}"


def _requirement(error: dict[str, Any], location: list[str]) -> str:
    """Return what a value must be, from one of pydantic's errors: `must be an integer >= 1`."""
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return _range(kind, context, isinstance(error.get("input"), int) and "int" in _type_at(location))
        case "string_pattern_mismatch":
            return f"must match the regular expression {context['pattern']}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "too_short" | "string_too_short":
            least = context["min_length"]
            return "must not be empty" if least == 1 else f"must have a length >= {least}"
    if kind in _TYPE_ERRORS:
        return f"must be {_TYPE_ERRORS[kind]}"
    message = error["msg"]
    return f"{message[0].lower()}{message[1:]}"


def _range(kind: str, context: dict[str, Any], integer: bool) -> str:
    """Return the range of a number: `must be an integer >= 1` or `must be a number < 1`."""
    noun = "an integer" if integer else "a number"
    match kind:
        case "greater_than":
            return f"must be {noun} >= {context['gt'] + 1}" if integer else f"must be {noun} > {context['gt']:g}"
        case "greater_than_equal":
            return f"must be {noun} >= {context['ge']:g}"
        case "less_than":
            return f"must be {noun} < {context['lt']:g}"
    return f"must be {noun} <= {context['le']:g}"


def _keys_at(location: list[str]) -> list[str]:
    """Return the keys of the section at this place."""
    record: type[BaseModel] = PipelineConfig
    for part in location:
        if not part.isdigit():
            inner = _record_of(record.model_fields[part].annotation)
            assert inner
            record = inner
    return list(record.model_fields)


def _type_at(location: list[str]) -> str:
    """Return the name of the type of the key at this place, which may be an element of a list."""
    record: type[BaseModel] = PipelineConfig
    annotation: Any = PipelineConfig
    for part in location:
        if part.isdigit():
            continue
        if part not in record.model_fields:
            break
        annotation = record.model_fields[part].annotation
        record = _record_of(annotation) or record
    return _type_name(annotation)


def describe() -> str:
    """Return every key with its type, default and description, in the layout of the TOML file."""
    return "\n".join(_describe(PipelineConfig, ""))


def _describe(record: type[BaseModel], section: str) -> Iterator[str]:
    sections: list[tuple[str, str, type[BaseModel]]] = []
    for name, field in record.model_fields.items():
        if inner := _record_of(field.annotation):
            heading = f"[[{section}{name}]]" if get_origin(field.annotation) is list else f"[{section}{name}]"
            sections.append((heading, f"{section}{name}.", inner))
            continue
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        yield f"  {section}{name}: {_type_name(field.annotation)} ({default})"
        yield f"      {field.description}"
    for heading, prefix, inner in sections:
        yield heading
        yield from _describe(inner, prefix)


def _record_of(annotation: Any) -> type[BaseModel] | None:
    """Return the record of a section, or of the tables of a list; None for other types."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"table of {_type_name(get_args(annotation)[1])}"
    inner = [_type_name(a) for a in get_args(annotation) if a is not type(None)]
    return " | ".join(inner) if inner else annotation.__name__


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def content_key(*parts: Any) -> str:
    """Return a short name for a result with these inputs: 16 hex digits of the SHA-256 of `parts` as JSON."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
