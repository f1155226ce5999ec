"""The corpus made into a dataset: Ray works through the partitions, and the manifest completes it.

Killed at any moment, the same call goes on with the partitions that are not finished. What is done with one
partition is in `shards`; this module knows their order, and what they have in common.
"""

import logging
import pickle
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

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
from gru.corpus.report import Report
from gru.corpus.shards import PARTS, PartitionResult, ShardContext, SpanSource
from gru.corpus.sources import Partition
from gru.corpus.template import parse_template
from gru.corpus.tokenizer import Tokenizer
from gru.errors import UserError, find_user_error

Progress = Callable[[str], None]
InParallel = Callable[..., Iterator[tuple[Any, Any]]]

_PIECE_BYTES = 1 << 20  # the tokenizer's sample is made of pieces of this size
_EXPANSION = 4  # of compressed text, roughly: it only decides how much is sampled
_EXAMPLES = 100  # places that a manifest names
_GIVEN = PrepareResources()  # to each task, where nothing else is said


def dataset_key(corpus: CorpusConfig, tokenizer: TokenizerConfig, files: list[sources.SourceFile] | None = None) -> str:
    """The name of the dataset that these would make of the sources as they are now, or as they were listed."""
    listing = [[file.path, file.size, file.modified] for file in files or sources.list_files(corpus)]
    given = tokenizers.load(tokenizer.path).digest if tokenizer.path else None
    return content_key(corpus, tokenizer, FORMAT_VERSION, listing, given)


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    directory: str,
    progress: Progress,
    resources: PrepareResources = _GIVEN,
) -> Dataset:
    """Make the dataset, or what is still missing of it, with the Ray that is running, whose tasks get `resources`.

    Raises UserError if the sources cannot be read, hold nothing to train on or to hold out, or the disk is full.
    """
    manifest_file = storage.join(directory, MANIFEST)
    if storage.exists(manifest_file):
        return _tidied(open_dataset(directory))
    try:
        with storage.full_disk_is_user_error(directory):
            manifest = _make(corpus, tokenizer, directory, progress, resources)
            storage.write_json(manifest_file, manifest.model_dump(mode="json"))
    except Exception as error:
        if not storage.exists(manifest_file):  # else somebody made the same, and cleared our unfinished files away
            if user_error := find_user_error(error):
                raise user_error from None
            raise
    return _tidied(open_dataset(directory))


def _tidied(dataset: Dataset) -> Dataset:
    """The dataset, with nothing beside it of what was made on the way, or left by tries that were killed."""
    whole = {MANIFEST, TOKENIZER, *(shard.name for shard in dataset.manifest.shards)}
    for name in storage.names(dataset.directory):
        made = storage.final_name(name)
        if name == PARTS or (name not in whole and (made in whole or made.endswith(".parquet"))):
            storage.remove(storage.join(dataset.directory, name))
    return dataset


def _make(
    corpus: CorpusConfig, config: TokenizerConfig, directory: str, progress: Progress, resources: PrepareResources
) -> Manifest:
    parse_template(corpus.template)
    files = sources.list_files(corpus)
    key = dataset_key(corpus, config, files)
    if cluster.is_too_small(resources, 1):
        progress(f"waiting: {cluster.describe_shortage('prepare', resources)}")
    in_parallel = partial(_in_parallel, resources)
    partitions = sources.plan(files, corpus, partial(_map, in_parallel))
    progress(sources.describe(partitions))
    tokenizer = _make_tokenizer(corpus, config, partitions, directory, key, progress, in_parallel)
    context = ShardContext(directory, corpus, tokenizer.digest)
    context = replace(
        context, parallel=len(partitions) * resources.cpus < cluster.total_resources(resources.labels)["CPU"]
    )
    key = content_key(key, tokenizer.digest)
    drafts = _drafts(context, key, partitions, progress, in_parallel)
    equal, similar = _repeated(context, drafts, progress)
    parts = _finish(
        context, key, drafts, {i: _either(equal, similar, i) for i in {*equal, *similar}}, progress, in_parallel
    )
    dropped = sum((Counter(part.dropped) for part in parts), Counter[str]())
    for reason, masks in (("duplicate", equal), ("near_duplicate", similar)):
        dropped += Counter({reason: int(sum(mask.sum() for mask in masks.values()))})
    return _manifest(parts, dropped, corpus, config, tokenizer)


def recorded_sources(corpus: CorpusConfig) -> list[Source]:
    """What the manifest of a dataset would say of its sources as they are now, all of which are read for that.

    Raises UserError as `documents` does."""
    read: list[SpanSource] = []
    for partition in sources.plan(sources.list_files(corpus), corpus):
        for span in partition:
            report = Report()
            deque(documents(span, corpus, report), maxlen=0)
            read.append(SpanSource(span.file.path, span.file.name, span.file.size, report.digests[0]))
    return _by_file(read)


def _by_file(spans: Iterable[SpanSource]) -> list[Source]:
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
    made = [shard for part in parts for shard in part.shards]
    train, heldout = (
        sum((shard.counts for shard in made if shard.split == split), Counts()) for split in ("train", "heldout")
    )
    examples = [example for part in parts for example in part.examples][:_EXAMPLES]
    if not train.documents:
        left = "".join(f"; {count:,} dropped: {reason}" for reason, count in sorted(dropped.items()))
        first = f"; {examples[0]}" if examples else ""
        raise UserError(f"corpus.sources: no document to train on in {', '.join(corpus.sources)}{left}{first}")
    if not heldout.documents:
        raise UserError(
            f"corpus.heldout_share = {corpus.heldout_share}: none of the {train.documents:,} documents is held out; "
            "raise the share, or cut the corpus finer with corpus.partition_bytes"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        tokenizer=config,
        sources=_by_file(source for part in parts for source in part.sources),
        train=train,
        heldout=heldout,
        dropped=dict(sorted(dropped.items())),
        replaced=sum(part.replaced for part in parts),
        examples=examples,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        tokenizer_digest=tokenizer.digest,
        heldout_digest=f"{sum(int(part.heldout, 16) for part in parts) % 2**256:064x}",
        shards=made,
    )
    return manifest.model_copy(update={"digest": manifest.content_digest()})


# The tokenizer


def _make_tokenizer(
    corpus: CorpusConfig,
    config: TokenizerConfig,
    partitions: list[Partition],
    directory: str,
    key: str,
    progress: Progress,
    in_parallel: InParallel,
) -> Tokenizer:
    """Load or train the tokenizer, and write it to the dataset; an earlier try's is used again."""
    marker = storage.join(directory, PARTS, TOKENIZER)
    if storage.exists(marker) and (made := storage.read_json(marker))["key"] == key:
        return load_tokenizer(directory, made["digest"])
    if config.path:
        tokenizer = tokenizers.load(config.path)
    else:
        progress(f"making a {config.kind} tokenizer")
        [(_, made_json)] = in_parallel(_train, [(corpus, config, partitions)])
        tokenizer = Tokenizer(made_json)
    storage.write_bytes(storage.join(directory, TOKENIZER), tokenizer.json)
    storage.write_json(marker, {"key": key, "digest": tokenizer.digest})
    return tokenizer


def _train(task: tuple[CorpusConfig, TokenizerConfig, list[Partition]]) -> bytes:
    corpus, config, partitions = task
    return tokenizers.train_tokenizer(config, _sample(corpus, config.sample_bytes, partitions)).json


def _sample(corpus: CorpusConfig, sample_bytes: int, partitions: list[Partition]) -> Iterator[str]:
    """About `sample_bytes` of training text from all over the corpus: pieces of it, in the order of a hash.

    A file that cannot be cut gives only a share of its documents, so that no one file is the whole sample.
    """
    piece = min(_PIECE_BYTES, corpus.partition_bytes)
    spans = [fine for partition in partitions for span in partition for fine in sources.cut_finer(span, piece)]
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


def _drafts(
    context: ShardContext, key: str, partitions: list[Partition], progress: Progress, in_parallel: InParallel
) -> list[PartitionResult]:
    """What comes of each partition. One that fails does not keep the others from being finished."""
    parts = _finished(context, key, "draft")
    earlier = sum((part.counts for part in parts.values()), Counts())
    begun, made = time.monotonic(), Counts()
    failed: dict[int, UserError] = {}
    left = [(index, partition) for index, partition in enumerate(partitions) if index not in parts]
    task = partial(_draft, context=context, key=key)
    for (index, _), part in in_parallel(task, left, failed):
        parts[index] = part
        made += part.counts
        done = earlier + made
        progress(
            f"{len(parts)}/{len(partitions)} partitions, {done.documents:,} documents, "
            f"{done.bytes / 1e6:,.1f} MB, {made.bytes / 1e6 / (time.monotonic() - begun):,.1f} MB/s"
        )
    if failed:
        more = f" (and {len(failed) - 1:,} more partitions failed)" if len(failed) > 1 else ""
        raise UserError(f"{failed[min(failed)]}{more}")
    return [parts[index] for index in range(len(partitions))]


def _draft(item: tuple[int, Partition], context: ShardContext, key: str) -> PartitionResult:
    index, partition = item
    part = shards.draft(context, index, partition)
    _save(context, key, "draft", index, part)
    return part


def _repeated(
    context: ShardContext, drafts: list[PartitionResult], progress: Progress
) -> tuple[dict[int, duplicates.Array], dict[int, duplicates.Array]]:
    """Masks of the documents that equal, or are similar to, an earlier one, by partition."""
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


def _either(first: dict[int, duplicates.Array], second: dict[int, duplicates.Array], index: int) -> duplicates.Array:
    masks = [masks[index] for masks in (first, second) if index in masks]
    return np.logical_or.reduce(masks)


def _finish(
    context: ShardContext,
    key: str,
    drafts: list[PartitionResult],
    repeated: dict[int, duplicates.Array],
    progress: Progress,
    in_parallel: InParallel,
) -> list[PartitionResult]:
    """Put the shards in their place: the drafts themselves, or what is left of them without the repeated documents."""
    parts = _finished(context, key, "final")
    left = [(index, drafts[index], repeated[index]) for index in sorted(repeated) if index not in parts]
    for (index, *_), part in in_parallel(partial(_without, context=context, key=key), left):
        parts[index] = part
        progress(f"{len(parts)}/{len(repeated)} partitions without their duplicates")
    for index, part in enumerate(drafts):
        for shard in part.shards if index not in repeated else ():
            storage.move(context.part_file(shard.name), storage.join(context.directory, shard.name))
    return [parts.get(index, part) for index, part in enumerate(drafts)]


def _without(item: tuple[int, PartitionResult, duplicates.Array], context: ShardContext, key: str) -> PartitionResult:
    index, draft, repeated = item
    part = shards.rewrite_without(context, index, draft, repeated)
    _save(context, key, "final", index, part)
    return part


def _save(context: ShardContext, key: str, step: str, index: int, part: PartitionResult) -> None:
    record = {"key": key, "part": part.model_dump(mode="json")}
    storage.write_json(context.part_file(f"{step}-{index:05d}.json"), record)


def _finished(context: ShardContext, key: str, step: str) -> dict[int, PartitionResult]:
    """What earlier tries of the same dataset have saved."""
    parts = {}
    for name in storage.names(storage.join(context.directory, PARTS)):
        if name.startswith(f"{step}-") and name.endswith(".json"):
            record = storage.read_json(context.part_file(name))
            if record["key"] == key:
                parts[int(name.removeprefix(f"{step}-")[:-5])] = PartitionResult.model_validate(record["part"])
    return parts


# Ray


def _map(in_parallel: InParallel, function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
    """`map`, by Ray."""
    given = list(items)
    done = dict(in_parallel(function, given))
    return [done[item] for item in given]


def _in_parallel(
    resources: PrepareResources,
    function: Callable[[Any], Any],
    items: list[Any],
    failed: dict[int, UserError] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) as each one is ready. A task whose worker dies is tried again.

    Raises the first UserError; with `failed`, which takes them by the item's first element, all items are tried.
    """
    import ray.data

    if not items:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items(
            [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)],
            override_num_blocks=len(items),
        )
        with warnings.catch_warnings():
            # Ray 2.60 calls this way to set max_retries deprecated, and has no other; its default is for ever.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            results = rows.map(
                partial(_task, function=function),
                num_cpus=resources.cpus,
                memory=resources.memory,
                label_selector=resources.labels or None,
                max_retries=3,
            )
        for row in results.iter_rows():
            item, result = items[row["index"]], pickle.loads(row["result"])
            if not isinstance(result, UserError):
                yield item, result
            elif failed is None:
                raise result
            else:
                failed[item[0]] = result


def _task(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Items and results are objects of ours, which pass from process to process in Ray's memory, never by a file."""
    try:
        with storage.full_disk_is_user_error("shards"):
            result = function(pickle.loads(row["item"]))
    except UserError as error:  # a value, since Ray would log and retry what is raised
        result = error
    return {"index": row["index"], "result": pickle.dumps(result)}
