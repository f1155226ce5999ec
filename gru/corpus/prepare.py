"""The preparation of a dataset: Ray processes the partitions in parallel, and the manifest completes the dataset.

Killed at any moment, the same call resumes with the partitions that are not finished. The work on one partition is in
`shards`; this module plans the partitions and combines their results.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from gru import cluster, storage
from gru.config import CorpusConfig, PrepareResources, TokenizerConfig, content_key
from gru.corpus import duplicates, shards, sources
from gru.corpus import tokenizer as tokenizers
from gru.corpus.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    Counts,
    Dataset,
    Manifest,
    Source,
    load_tokenizer,
    open_dataset,
)
from gru.corpus.documents import document_hash, documents, is_heldout
from gru.corpus.parallel import InParallel, map_in_parallel, run_in_parallel
from gru.corpus.report import Report
from gru.corpus.shards import WORK_DIRECTORY, PartitionResult, ShardContext, SpanSource
from gru.corpus.sources import Partition
from gru.corpus.template import parse_template
from gru.corpus.tokenizer import Tokenizer
from gru.errors import UserError, find_user_error

ReportProgress = Callable[[str], None]

_SAMPLE_SPAN_BYTES = 1 << 20  # size of the spans that the tokenizer's training sample consists of
_EXPANSION = 4  # rough ratio of text to compressed bytes; it only decides how much is sampled
_EXAMPLES = 100  # most examples of problems in a manifest
_DEFAULT_RESOURCES = PrepareResources()


def dataset_key(corpus: CorpusConfig, tokenizer: TokenizerConfig, files: list[sources.SourceFile] | None = None) -> str:
    """Return the key of the dataset of these configs and of the sources as they are now, or as listed in `files`."""
    listing = [[file.path, file.size, file.modified] for file in files or sources.list_files(corpus)]
    tokenizer_digest = tokenizers.load(tokenizer.path).digest if tokenizer.path else None
    return content_key(corpus, tokenizer, FORMAT_VERSION, listing, tokenizer_digest)


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    directory: str,
    progress: ReportProgress,
    resources: PrepareResources = _DEFAULT_RESOURCES,
) -> Dataset:
    """Prepare the dataset, or its pending partitions, on the running Ray, each task with `resources`.

    Raises UserError if the sources cannot be read, have no document to train on or to hold out, or the disk is full.
    """
    manifest_file = storage.join(directory, MANIFEST)
    if storage.exists(manifest_file):
        return _remove_leftovers(open_dataset(directory))
    try:
        with storage.full_disk_is_user_error(directory):
            manifest = _build(corpus, tokenizer, directory, progress, resources)
            storage.write_json(manifest_file, manifest.model_dump(mode="json"))
    except Exception as error:
        if not storage.exists(manifest_file):  # else another process finished this dataset and removed our work files
            if user_error := find_user_error(error):
                raise user_error from None
            raise
    return _remove_leftovers(open_dataset(directory))


def _remove_leftovers(dataset: Dataset) -> Dataset:
    """Remove the work files of this and of killed attempts from a finished dataset, and return it."""
    complete = {MANIFEST, TOKENIZER, *(shard.name for shard in dataset.manifest.shards)}
    for name in storage.names(dataset.directory):
        final = storage.final_name(name)
        if name == WORK_DIRECTORY or (name not in complete and (final in complete or final.endswith(".parquet"))):
            storage.remove(storage.join(dataset.directory, name))
    return dataset


def _build(
    corpus: CorpusConfig, config: TokenizerConfig, directory: str, progress: ReportProgress, resources: PrepareResources
) -> Manifest:
    """Write the tokenizer and all shards, and return the manifest."""
    parse_template(corpus.template)
    files = sources.list_files(corpus)
    key = dataset_key(corpus, config, files)
    if cluster.is_too_small(resources, 1):
        progress(f"waiting: {cluster.describe_shortage('prepare', resources)}")
    in_parallel = partial(run_in_parallel, resources)
    partitions = sources.plan(files, corpus, partial(map_in_parallel, in_parallel))
    progress(sources.describe_plan(partitions))
    tokenizer = _make_tokenizer(corpus, config, partitions, directory, key, progress, in_parallel)
    context = ShardContext(directory, corpus, tokenizer.digest)
    context = replace(
        context, parallel=len(partitions) * resources.cpus < cluster.total_resources(resources.labels)["CPU"]
    )
    key = content_key(key, tokenizer.digest)
    drafts = _write_drafts(context, key, partitions, progress, in_parallel)
    equal, similar = _find_repeated(context, drafts, progress)
    repeated = {index: _union(equal, similar, index) for index in {*equal, *similar}}
    results = _write_shards(context, key, drafts, repeated, progress, in_parallel)
    dropped = sum((Counter(result.dropped) for result in results), Counter[str]())
    for reason, masks in (("duplicate", equal), ("near_duplicate", similar)):
        dropped += Counter({reason: int(sum(mask.sum() for mask in masks.values()))})
    return _manifest(results, dropped, corpus, config, tokenizer)


def recorded_sources(corpus: CorpusConfig) -> list[Source]:
    """Read all sources and return their entries in the manifest of a dataset prepared now.

    Raises UserError as `documents` does.
    """
    spans: list[SpanSource] = []
    for partition in sources.plan(sources.list_files(corpus), corpus):
        for span in partition:
            report = Report()
            deque(documents(span, corpus, report), maxlen=0)
            spans.append(SpanSource(span.file.path, span.file.name, span.file.size, report.digests[0]))
    return _merge_spans(spans)


def _merge_spans(spans: Iterable[SpanSource]) -> list[Source]:
    """Return one source per file, with one digest over the digests of its spans."""
    digests: dict[tuple[str, str, int], list[str]] = {}
    for path, name, size, digest in spans:
        digests.setdefault((path, name, size), []).append(digest)
    return [
        Source(name=name, size=size, digest=d[0] if len(d) == 1 else storage.sha256(bytes.fromhex("".join(d))))
        for (_, name, size), d in digests.items()
    ]


def _manifest(
    parts: list[PartitionResult],
    dropped: Counter[str],
    corpus: CorpusConfig,
    config: TokenizerConfig,
    tokenizer: Tokenizer,
) -> Manifest:
    """Combine the results of all partitions. Raises UserError if a split has no document."""
    all_shards = [shard for part in parts for shard in part.shards]
    train, heldout = (
        sum((shard.counts for shard in all_shards if shard.split == split), Counts()) for split in ("train", "heldout")
    )
    examples = [example for part in parts for example in part.examples][:_EXAMPLES]
    if not train.documents:
        reasons = "".join(f"; {count:,} dropped: {reason}" for reason, count in sorted(dropped.items()))
        first = f"; {examples[0]}" if examples else ""
        raise UserError(f"corpus.sources: no document to train on in {', '.join(corpus.sources)}{reasons}{first}")
    if not heldout.documents:
        raise UserError(
            f"corpus.heldout_share = {corpus.heldout_share}: none of the {train.documents:,} documents is held out; "
            "raise it, or lower corpus.partition_bytes, which cuts large text files into more documents"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        tokenizer=config,
        sources=_merge_spans(source for part in parts for source in part.sources),
        train=train,
        heldout=heldout,
        dropped=dict(sorted(dropped.items())),
        replaced=sum(part.replaced for part in parts),
        examples=examples,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        tokenizer_digest=tokenizer.digest,
        heldout_digest=f"{sum(int(part.heldout, 16) for part in parts) % 2**256:064x}",
        shards=all_shards,
    )
    return manifest.model_copy(update={"digest": manifest.content_digest()})


# The tokenizer


def _make_tokenizer(
    corpus: CorpusConfig,
    config: TokenizerConfig,
    partitions: list[Partition],
    directory: str,
    key: str,
    progress: ReportProgress,
    in_parallel: InParallel,
) -> Tokenizer:
    """Load or train the tokenizer and write it to the dataset, or load the one that an earlier attempt wrote."""
    marker = storage.join(directory, WORK_DIRECTORY, TOKENIZER)
    if storage.exists(marker) and (written := storage.read_json(marker))["key"] == key:
        return load_tokenizer(directory, written["digest"])
    if config.path:
        tokenizer = tokenizers.load(config.path)
    else:
        progress(f"training a {config.kind} tokenizer")
        [(_, tokenizer_json)] = in_parallel(_train_task, [(corpus, config, partitions)])
        tokenizer = Tokenizer(tokenizer_json)
    storage.write_bytes(storage.join(directory, TOKENIZER), tokenizer.json)
    storage.write_json(marker, {"key": key, "digest": tokenizer.digest})
    return tokenizer


def _train_task(item: tuple[CorpusConfig, TokenizerConfig, list[Partition]]) -> bytes:
    """Train the tokenizer on a sample of the corpus and return its JSON."""
    corpus, config, partitions = item
    return tokenizers.train_tokenizer(config, _sample(corpus, config.sample_bytes, partitions)).json


def _sample(corpus: CorpusConfig, sample_bytes: int, partitions: list[Partition]) -> Iterator[str]:
    """Yield about `sample_bytes` of training text: spans of the whole corpus, in the order of a hash.

    Of a file that cannot be cut only a share of the documents is sampled, so that no single file is the whole sample.
    """
    span_bytes = min(_SAMPLE_SPAN_BYTES, corpus.partition_bytes)
    spans = [piece for partition in partitions for span in partition for piece in sources.cut_finer(span, span_bytes)]
    sizes = [span.size * (1 if span.file.divisible else _EXPANSION) for span in spans]
    total, taken = sum(sizes), 0.0
    for index in sorted(range(len(spans)), key=lambda index: document_hash(str(index).encode())):
        span, size = spans[index], sizes[index]
        if span.heldout or not size:
            continue
        share = min(1.0, sample_bytes * max(1 / 8, size / total) / size)
        for text in documents(span, corpus, Report()):
            document = document_hash(text.encode())
            if span.file.kind == "text" and not corpus.separator:
                yield text[: int(len(text) * share)]
            elif document >= (1 - share) * 2**64 and not is_heldout(span, document, corpus):
                yield text
        taken += size * share
        if taken >= sample_bytes:
            return


# The partitions


def _write_drafts(
    context: ShardContext, key: str, partitions: list[Partition], progress: ReportProgress, in_parallel: InParallel
) -> list[PartitionResult]:
    """Write the drafts of the pending partitions and return all results. If one fails, the others still finish."""
    parts = _load_results(context, key, "draft")
    earlier = sum((part.counts for part in parts.values()), Counts())
    started, new = time.monotonic(), Counts()
    failed: dict[int, UserError] = {}
    pending = [(index, partition) for index, partition in enumerate(partitions) if index not in parts]
    task = partial(_draft_task, context=context, key=key)
    for (index, _), part in in_parallel(task, pending, failed):
        parts[index] = part
        new += part.counts
        done = earlier + new
        progress(
            f"{len(parts)}/{len(partitions)} partitions, {done.documents:,} documents, "
            f"{done.bytes / 1e6:,.1f} MB, {new.bytes / 1e6 / (time.monotonic() - started):,.1f} MB/s"
        )
    if failed:
        more = f" (and {len(failed) - 1:,} more partitions failed)" if len(failed) > 1 else ""
        raise UserError(f"{failed[min(failed)]}{more}")
    return [parts[index] for index in range(len(partitions))]


def _draft_task(item: tuple[int, Partition], context: ShardContext, key: str) -> PartitionResult:
    """Write the draft of one partition, and save its result."""
    index, partition = item
    part = shards.draft(context, index, partition)
    _save_result(context, key, "draft", index, part)
    return part


def _find_repeated(
    context: ShardContext, drafts: list[PartitionResult], progress: ReportProgress
) -> tuple[dict[int, duplicates.Array], dict[int, duplicates.Array]]:
    """Return the masks of the documents that equal, and of those that are similar to, an earlier one, by partition."""
    if context.corpus.deduplicate == "none":
        return {}, {}
    counts = [part.documents for part in drafts]
    progress(f"looking for duplicates among {sum(counts):,} documents")
    equal = duplicates.find_equal(counts, lambda index: shards.read_fingerprints(context, index).hashes)
    if context.corpus.deduplicate == "exact":
        return equal, {}
    return equal, duplicates.find_similar(
        counts, lambda index: shards.read_fingerprints(context, index).signatures, equal, context.corpus.near_similarity
    )


def _union(first: dict[int, duplicates.Array], second: dict[int, duplicates.Array], index: int) -> duplicates.Array:
    """Return the mask of the documents of a partition that are in either mask."""
    masks = [masks[index] for masks in (first, second) if index in masks]
    return np.logical_or.reduce(masks)


def _write_shards(
    context: ShardContext,
    key: str,
    drafts: list[PartitionResult],
    repeated: dict[int, duplicates.Array],
    progress: ReportProgress,
    in_parallel: InParallel,
) -> list[PartitionResult]:
    """Write the final shards and return the results: drafts are moved, or rewritten without repeated documents."""
    parts = _load_results(context, key, "final")
    pending = [(index, drafts[index], repeated[index]) for index in sorted(repeated) if index not in parts]
    for (index, *_), part in in_parallel(partial(_rewrite_task, context=context, key=key), pending):
        parts[index] = part
        progress(f"{len(parts)}/{len(repeated)} partitions rewritten without duplicates")
    for index, part in enumerate(drafts):
        for shard in part.shards if index not in repeated else ():
            storage.move(context.work_file(shard.name), storage.join(context.directory, shard.name))
    return [parts.get(index, part) for index, part in enumerate(drafts)]


def _rewrite_task(
    item: tuple[int, PartitionResult, duplicates.Array], context: ShardContext, key: str
) -> PartitionResult:
    """Write the shards of one partition without its repeated documents, and save the result."""
    index, draft, repeated = item
    part = shards.rewrite_without(context, index, draft, repeated)
    _save_result(context, key, "final", index, part)
    return part


def _save_result(context: ShardContext, key: str, step: str, index: int, part: PartitionResult) -> None:
    record = {"key": key, "part": part.model_dump(mode="json")}
    storage.write_json(context.work_file(f"{step}-{index:05d}.json"), record)


def _load_results(context: ShardContext, key: str, step: str) -> dict[int, PartitionResult]:
    """Return the results that earlier attempts at the same dataset have saved, by partition."""
    parts = {}
    for name in storage.names(storage.join(context.directory, WORK_DIRECTORY)):
        if name.startswith(f"{step}-") and name.endswith(".json"):
            record = storage.read_json(context.work_file(name))
            if record["key"] == key:
                parts[int(name.removeprefix(f"{step}-")[:-5])] = PartitionResult.model_validate(record["part"])
    return parts
