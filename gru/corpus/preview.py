"""A preview of a dataset from a sample of the corpus: its files, fields, documents, and what would be left out.

It takes seconds for a corpus of any size, and no Ray. This module does not know how a preview is printed.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from gru.config import CorpusConfig, TokenizerConfig
from gru.config_corpus import Normalization, SourceOptions
from gru.corpus import tokenizer as tokenizers
from gru.corpus.documents import text_digest
from gru.corpus.excerpts import PIECE_BYTES, Excerpt, Excerpts, Group, group_of
from gru.corpus.listing import SourceFile, list_files
from gru.corpus.report import no_documents
from gru.corpus.template import parse_template
from gru.corpus.tokenizer import Tokenizer

_SAMPLE_BYTES = 8 << 20  # of text, of all sources
_LEAST_SAMPLE_BYTES = 1 << 19  # of text, of each source
_SECONDS = 3.0  # for reading the sample
_TOKENIZER_BYTES = 1 << 20  # of text that the tokenizer is trained on, and of other text that it is tried on
_PIECE_CHARACTERS = 1 << 14  # of text that is encoded at once
_WORD_CHARACTERS = 128  # of the longest word in a piece, since the time of training grows with the square of a word
_SHOWN_DOCUMENTS = 5  # of all sources
_SHOWN_CHARACTERS = 2000  # of each
_TRAINING_GROWTH = 0.8  # exponent of the text's size in the time of training, as measured from 2 MB to 30 MB
_TRIAL_FACTOR = 5.0  # time of training the trial tokenizer over that of training the other, for 2 MB of Python
_LONG_WORD = re.compile(rf"\S{{{_WORD_CHARACTERS + 1}}}")
_WRITING = 1.25  # time of reading, hashing and writing over that of reading: an estimate


@dataclass
class ShownDocument:
    """The beginning of a document as it will be."""

    file: str
    characters: int | None  # of the whole document; None if only a part of it was read
    text: str


@dataclass
class Estimate:
    """The size of a dataset or of a source's part of it, as far as a sample tells."""

    documents: float = 0.0
    bytes: float = 0.0  # of the text as UTF-8
    tokens: float = 0.0
    seconds: float = 0.0  # of work for one core

    def __add__(self, other: "Estimate") -> "Estimate":
        sums = (a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return Estimate(*sums)

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(*(value * factor for value in vars(self).values()))


@dataclass
class SourcePreview:
    """What is known about one source."""

    key: str  # its table in the configuration
    paths: tuple[str, ...]
    template: str | None  # None: it has no records
    weight: float
    files: dict[str, int]  # number of files, by format and compression
    file_bytes: int
    sampled_documents: int = 0
    sampled_bytes: float = 0.0  # of the files
    complete: bool = False  # whether the sample is all of the source
    empty_fields: dict[str, float] = field(default_factory=dict)  # share of records without anything in a field
    dropped: dict[str, int] = field(default_factory=dict)  # of the sample, by reason
    replaced: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    shown: list[ShownDocument] = field(default_factory=list)
    expected: Estimate = field(default_factory=Estimate)


@dataclass
class Preview:
    """What `prepare` would do with a corpus."""

    sources: list[SourcePreview]
    passed_over: dict[str, int]  # number of files in the sources' directories that are not read, by extension
    expected: Estimate
    bytes_per_token: float  # 0 if the sample has no text
    cores: int
    seconds: float  # expected, on these cores
    partitions: int = 1  # about; one is prepared without a Ray

    def require_documents(self) -> None:
        """Raise UserError if the sample has no document, and was not only ended by its time."""
        dropped = sum((Counter(source.dropped) for source in self.sources), Counter[str]())
        complete = all(source.complete for source in self.sources)
        if any(source.sampled_documents for source in self.sources) or not (dropped or complete):
            return
        examples = {reason: found for source in self.sources for reason, found in source.examples.items()}
        raise no_documents(self.sources, dropped, examples, self.passed_over)


def look(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, cores: int, store: str | None = None, seconds: float = _SECONDS
) -> Preview:
    """Return the preview of a corpus. store: the storage, as in `list_files`. seconds: time for reading the sample.

    Raises UserError as `prepare` does, where the mistake is in the configuration or in the sample.
    """
    sources = corpus.source_options()
    for options in sources:
        parse_template(options.template, options.key_of("template"))
    listing = list_files(corpus, store)
    seen: set[bytes] | None = None if corpus.deduplicate == "none" else set()
    samples = []
    ends_at = time.monotonic() + seconds
    for number, options in enumerate(sources):
        files = [file for file in listing.files if file.options.index == options.index]
        now = time.monotonic()
        deadline = now + max(0.0, ends_at - now) / (len(sources) - number)
        most_bytes = max(_LEAST_SAMPLE_BYTES, _SAMPLE_BYTES // len(sources))
        samples.append(_Sample(options, files, Excerpts(files, corpus, most_bytes, deadline), seen))
    shares = [math.ceil((_SHOWN_DOCUMENTS - i) / len(samples)) for i in range(len(samples))]
    previews = [sample.preview(corpus, max(1, shown)) for sample, shown in zip(samples, shares, strict=True)]
    training = _measure_tokens(tokenizer, corpus.normalization, samples, previews)
    expected = sum((preview.expected for preview in previews), Estimate())
    size = sum(file.size for file in listing.files)
    passed_over = sum((sample.source.report.passed_over for sample in samples), Counter(listing.passed_over))
    longest = max((sample.longest for sample in samples), default=0.0)
    partitions = max(len(sources), math.ceil(size / corpus.partition_bytes))
    busy = min(cores, partitions)
    return Preview(
        sources=previews,
        passed_over=dict(passed_over),
        expected=expected,
        bytes_per_token=expected.bytes / expected.tokens if expected.tokens else 0.0,
        cores=cores,
        seconds=training + _WRITING * max(expected.seconds / busy, longest),
        partitions=partitions,
    )


class _Sample:
    """The excerpts of one source."""

    def __init__(
        self, options: SourceOptions, files: list[SourceFile], excerpts: Excerpts, seen: set[bytes] | None
    ) -> None:
        self.options, self.files, self.source = options, files, excerpts
        self.excerpts = [*excerpts]
        self.duplicates = 0
        if seen is not None:
            for excerpt in self.excerpts:
                count = len(excerpt.texts)
                excerpt.texts = _without_repetitions(excerpt.texts, seen)
                self.duplicates += count - len(excerpt.texts)
        self.documents = sum(len(excerpt.texts) for excerpt in self.excerpts)
        self.longest = 0.0
        """Seconds that the longest file takes which is not divided among cores."""

    def texts(self) -> Iterable[str]:
        return (text for excerpt in self.excerpts for text in excerpt.texts)

    def preview(self, corpus: CorpusConfig, shown: int) -> SourcePreview:
        """Return what the sample tells, but for the tokens."""
        report = self.source.report
        if self.duplicates:
            report.dropped["duplicate"] += self.duplicates
        records = self.source.records or any(file.kind not in ("text", "html", "archive") for file in self.files)
        return SourcePreview(
            key=self.options.key,
            paths=self.options.paths,
            template=self.options.template if records else None,
            weight=self.options.weight,
            files=dict(Counter(f"{file.kind}{file.compression}" for file in self.files)),
            file_bytes=sum(file.size for file in self.files),
            sampled_documents=self.documents,
            sampled_bytes=sum(excerpt.covered for excerpt in self.excerpts),
            complete=self.source.complete,
            empty_fields=self._empty_fields(),
            dropped=dict((+report.dropped).most_common()),  # without reasons that concern no document
            replaced=report.replaced,
            examples=report.examples,
            shown=self._shown(shown),
            expected=self._expected(corpus),
        )

    def _empty_fields(self) -> dict[str, float]:
        """Return the share of the records that have nothing in a field, by its name."""
        records = self.source.records
        fields = {name: 1 - filled / records for name, filled in self.source.filled.items()}
        for file in [file for file in self.files if file.kind == "parquet" and not file.compression][:1]:
            fields = _parquet_nulls(file) | fields
        return fields

    def _shown(self, count: int) -> list[ShownDocument]:
        """Return some documents, of different excerpts as far as there are so many."""
        depth = max((len(excerpt.texts) for excerpt in self.excerpts), default=0)
        return [
            *islice(
                (
                    _beginning(excerpt.file, excerpt.texts[index])
                    for index in range(min(depth, count))
                    for excerpt in self.excerpts
                    if index < len(excerpt.texts)
                ),
                count,
            )
        ]

    def _expected(self, corpus: CorpusConfig) -> Estimate:
        """Return the expected size of the source, from that of its groups of files."""
        groups: dict[Group, list[SourceFile]] = {}
        for file in self.files:
            groups.setdefault(group_of(file), []).append(file)
        total = Estimate()
        for group, files in groups.items():
            excerpts = [excerpt for excerpt in self.excerpts if group_of(excerpt.file) == group]
            estimate = _extrapolate(group, files, excerpts or self.excerpts, corpus)
            total += estimate
            size = sum(file.size for file in files)
            for file in files:
                if not file.divisible and size:
                    self.longest = max(self.longest, estimate.seconds * file.size / size)
        if self.options.limit and total.documents > self.options.limit:  # equal ones count
            share = self.options.limit / total.documents
            total, self.longest = total.scaled(share), self.longest * share
        seconds = total.seconds  # of reading, also what is repeated
        total = total.scaled(self.documents / (self.documents + self.duplicates) if self.documents else 1.0)
        return replace(total, seconds=seconds)


def _beginning(file: SourceFile, text: str) -> ShownDocument:
    whole = file.size <= 2 * PIECE_BYTES or not group_of(file).undivided
    return ShownDocument(file.name, len(text) if whole else None, text[:_SHOWN_CHARACTERS])


def _without_repetitions(texts: list[str], seen: set[bytes]) -> list[str]:
    """Return the texts whose digests are not in `seen`, and add them."""
    kept = []
    for text in texts:
        if (digest := text_digest(text.encode())) not in seen:
            seen.add(digest)
            kept.append(text)
    return kept


def _extrapolate(group: Group, files: list[SourceFile], excerpts: list[Excerpt], corpus: CorpusConfig) -> Estimate:
    """Return the size of the text of files in a group, given excerpts of some of them."""
    size, covered = sum(file.size for file in files), sum(excerpt.covered for excerpt in excerpts)
    if not covered:
        return Estimate()
    read = sum(excerpt.read_bytes for excerpt in excerpts)
    documents = sum(excerpt.documents for excerpt in excerpts) * size / covered
    content = sum(excerpt.bytes for excerpt in excerpts) * size / covered
    seconds = sum(excerpt.seconds for excerpt in excerpts)
    if group.undivided:
        growth = content / size if group.compression and size else 1.0
        pieces = sum(max(1, math.ceil(file.size * growth / corpus.partition_bytes)) for file in files)
        documents = pieces * sum(bool(excerpt.texts) for excerpt in excerpts) / len(excerpts)
    return Estimate(documents, content, 0.0, seconds * content / read if read else seconds * size / covered)


def _parquet_nulls(file: SourceFile) -> dict[str, float]:
    """Return the share of nulls in each column but lists, by the statistics of a file; 0 where it has none."""
    nulls: Counter[str] = Counter()
    try:
        with file.open() as opened:
            metadata = pq.ParquetFile(opened).metadata
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    column = metadata.row_group(group).column(index)
                    statistics = column.statistics
                    name, *inner = column.path_in_schema.split(".list.")
                    known = statistics is not None and statistics.has_null_count and not inner
                    nulls[name] += statistics.null_count if known else 0
    except (OSError, pa.ArrowException):
        return {}
    return {name: count / max(1, metadata.num_rows) for name, count in nulls.items()}


def _measure_tokens(
    config: TokenizerConfig, normalization: Normalization, samples: Sequence[_Sample], previews: list[SourcePreview]
) -> float:
    """Set the expected tokens, and add the time of encoding. Return the expected time of training the tokenizer."""
    if not any(sample.documents for sample in samples):
        return 0.0
    share = _TOKENIZER_BYTES // len(samples)
    pools = [_pieces(sample.texts(), 2 * share) for sample in samples]
    training, started = 0.0, time.monotonic()
    if config.path:
        tokenizer = tokenizers.load(config.path, normalization)
    else:
        parts = [piece for pool in pools for piece in pool[: len(pool) // 2 or 1]]
        if config.kind == "bpe":
            tokenizer, factor = tokenizers.train_trial_tokenizer(config.vocab_size, parts), _TRIAL_FACTOR
        else:
            tokenizer, factor = tokenizers.train_tokenizer(config, parts), 1.0
        trained = sum(len(part.encode()) for part in parts)
        size = min(config.sample_bytes, sum(preview.expected.bytes for preview in previews))
        growth = max(1.0, size / trained) ** _TRAINING_GROWTH
        training = (time.monotonic() - started) * growth / factor
    for pool, preview in zip(pools, previews, strict=True):
        if pool:
            _add_tokens(preview.expected, tokenizer, pool[len(pool) // 2 :])
    return training


def _add_tokens(expected: Estimate, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Set the tokens of an estimate by those of some text, and add the time to encode them."""
    tokenizer.encode_batch(texts[:1])  # builds the encoder
    started = time.monotonic()
    ids, _ = tokenizer.encode_batch(texts)
    seconds = time.monotonic() - started
    factor = expected.bytes / sum(len(text.encode()) for text in texts)
    expected.tokens = len(ids) * factor + expected.documents
    expected.seconds += seconds * factor


def _pieces(texts: Iterable[str], most_bytes: int) -> list[str]:
    """Return text of about so many bytes, cut into pieces, so that a half of them is about half of the text."""
    pieces: list[str] = []
    left = most_bytes
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            size = _WORD_CHARACTERS if _LONG_WORD.search(piece) else _PIECE_CHARACTERS
            pieces += [piece[start : start + size] for start in range(0, len(piece), size)]
            left -= len(piece.encode())
            if left <= 0:
                return pieces
    return pieces
