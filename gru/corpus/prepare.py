"""The preparation of a dataset: Ray processes the partitions in parallel, and the manifest completes the dataset.

Killed at any moment, the same call resumes with the partitions that are not finished. The work on one partition is in
`shards`; this module plans the partitions and combines their results.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig, content_key
from gru.config_stages import PrepareResources
from gru.corpus import leftovers, shards
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
from gru.corpus.documents import documents
from gru.corpus.duplicates import Array
from gru.corpus.limits import find_used
from gru.corpus.listing import SourceFile, list_files
from gru.corpus.parallel import TaskRunner
from gru.corpus.partitions import Partition, describe_plan, plan
from gru.corpus.report import Report, no_documents
from gru.corpus.rewrite import HoldOut, rewrite
from gru.corpus.selection import Selection, select
from gru.corpus.shards import WORK_DIRECTORY, PartitionResult, ShardContext, SpanSource
from gru.corpus.template import parse_template
from gru.corpus.tokenizer import Tokenizer
from gru.corpus.tokenizer_sample import sample
from gru.errors import GaveUp, UserError, find_user_error
from gru.terminal import counted

ReportProgress = Callable[[str], None]

_WORK_VERSION = 2  # of the work files: those of another version are made again
_EXAMPLES = 20  # most examples of each kind of problem in a manifest
_DEFAULT_RESOURCES = PrepareResources()


def dataset_key(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, files: list[SourceFile] | None = None, store: str | None = None
) -> str:
    """Return the key of the dataset of these configs and of the sources as they are now, or as listed in `files`.

    store: the storage, as in `list_files`.
    """
    listing = [[file.path, file.size, file.modified] for file in files or list_files(corpus, store).files]
    tokenizer_digest = tokenizers.load(tokenizer.path, corpus.normalization).digest if tokenizer.path else None
    return content_key(corpus, tokenizer, FORMAT_VERSION, listing, tokenizer_digest)


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    directory: str,
    progress: ReportProgress,
    resources: PrepareResources = _DEFAULT_RESOURCES,
    start_ray: Callable[[], None] = lambda: None,
) -> Dataset:
    """Prepare the dataset, or its pending partitions, each in a task on Ray with `resources`.

    start_ray: makes Ray ready for use; called only if there is more than one partition to do, or if `resources` are
    not the default ones. Without a Ray, the work is done in this process. Raises UserError if the sources cannot be
    read, have no document to train on or to hold out, or the disk is full; GaveUp if a web server stays away.
    """
    manifest_file = storage.join(directory, MANIFEST)
    if storage.exists(manifest_file):
        return leftovers.remove_work_files(open_dataset(directory))
    try:
        with storage.full_disk_is_user_error(directory):
            runner = TaskRunner(resources, start_ray, progress)
            manifest = _build(corpus, tokenizer, directory, progress, runner)
            storage.write_json(manifest_file, manifest.model_dump(mode="json"))
    except Exception as error:
        if not storage.exists(manifest_file):  # else another process finished this dataset and removed our work files
            if user_error := find_user_error(error):
                raise user_error from None
            raise
    return leftovers.remove_work_files(open_dataset(directory))


def _build(
    corpus: CorpusConfig, config: TokenizerConfig, directory: str, progress: ReportProgress, runner: TaskRunner
) -> Manifest:
    """Write the tokenizer and all shards, and return the manifest."""
    for options in corpus.source_options():
        parse_template(options.template, options.key_of("template"))
    if corpus.dropped:
        storage.check_writable(corpus.dropped, "corpus.dropped")
    store = storage_of(directory)
    leftovers.remove_unreachable(directory, partial(dataset_key, store=store), progress)
    leftovers.remove_temporary_files(directory)
    files, passed_over = list_files(corpus, store)
    key = dataset_key(corpus, config, files)
    leftovers.record_inputs(directory, key, corpus, config)
    partitions = plan(files, corpus, runner.map, find_used(files, corpus, runner.map))
    progress(describe_plan(partitions))
    tokenizer = _make_tokenizer(corpus, config, partitions, directory, key, progress, runner)
    dropped = corpus.dropped and storage.join(corpus.dropped, key)
    context = ShardContext(directory, corpus, tokenizer.digest, dropped=dropped)
    key = content_key(key, tokenizer.digest, _WORK_VERSION)
    drafts = _write_drafts(context, key, partitions, progress, runner)
    selection = select(context, drafts, partitions, progress)
    results = _write_shards(context, key, drafts, selection, progress, runner)
    counts = Counter(passed_over)
    for result in results:
        counts.update(result.passed_over)
    return _manifest(results, selection, dict(sorted(counts.items())), corpus, config, tokenizer)


def storage_of(directory: str) -> str:
    """Return the storage that a dataset's directory is in; the directory itself if it is elsewhere."""
    parts = directory.rstrip("/").rsplit("/", 2)
    return parts[0] if parts[1:2] == ["datasets"] else directory


def recorded_sources(corpus: CorpusConfig, directory: str) -> list[Source]:
    """Read all sources and return their entries in the manifest of a dataset prepared in this directory now.

    Raises UserError as `documents` does.
    """
    spans: list[SpanSource] = []
    files = list_files(corpus, storage_of(directory)).files
    for partition in plan(files, corpus, used=find_used(files, corpus)):
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
    selection: Selection,
    passed_over: dict[str, int],
    corpus: CorpusConfig,
    config: TokenizerConfig,
    tokenizer: Tokenizer,
) -> Manifest:
    """Combine the results of all partitions. Raises UserError if a split has no document."""
    all_shards = [shard for part in parts for shard in part.shards]
    train, heldout = (
        sum((shard.counts for shard in all_shards if shard.split == split), Counts()) for split in ("train", "heldout")
    )
    examples: dict[str, list[str]] = {}
    for part in parts:
        for reason, found in part.examples.items():
            examples[reason] = [*examples.get(reason, []), *found][:_EXAMPLES]
    dropped = selection.dropped.copy()
    for part in parts:
        dropped.update(part.dropped)
    dropped = +dropped  # without reasons that concern no document
    dropped_bytes = sum((Counter(part.dropped_bytes) for part in parts), Counter[str]())
    if heldout.documents and not train.documents:
        raise UserError(
            f"corpus.heldout_share = {corpus.heldout_share}: of {counted(heldout.documents, 'document')}, all is "
            "held out; lower it"
        )
    if not train.documents:
        raise no_documents(corpus.source_options(), dropped, examples, passed_over)
    if not heldout.documents:
        raise UserError(
            f"corpus.heldout_share = {corpus.heldout_share}: of {counted(train.documents, 'document')}, none is held "
            "out, and no text is left for it; add text"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        tokenizer=config,
        sources=_merge_spans(source for part in parts for source in part.sources),
        train=train,
        heldout=heldout,
        heldout_by=selection.heldout_by,
        dropped=dict(sorted(dropped.items())),
        dropped_bytes=dict(sorted(dropped_bytes.items())),
        passed_over=passed_over,
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
    runner: TaskRunner,
) -> Tokenizer:
    """Load or train the tokenizer and write it to the dataset, or load the one that an earlier attempt wrote."""
    marker = storage.join(directory, WORK_DIRECTORY, TOKENIZER)
    if storage.exists(marker) and (written := storage.read_json(marker))["key"] == key:
        return load_tokenizer(directory, written["digest"])
    if config.path:
        tokenizer = tokenizers.load(config.path, corpus.normalization)
    else:
        progress(f"training a {config.kind} tokenizer")
        if len(partitions) > 1:
            runner.start()
        [(_, tokenizer_json)] = runner.run(_train_task, [(corpus, config, partitions)])
        tokenizer = Tokenizer(tokenizer_json)
    storage.write_bytes(storage.join(directory, TOKENIZER), tokenizer.json)
    storage.write_json(marker, {"key": key, "digest": tokenizer.digest})
    return tokenizer


def _train_task(item: tuple[CorpusConfig, TokenizerConfig, list[Partition]]) -> bytes:
    """Train the tokenizer on a sample of the corpus and return its JSON."""
    corpus, config, partitions = item
    return tokenizers.train_tokenizer(config, sample(corpus, config.sample_bytes, partitions)).json


# The partitions


def _write_drafts(
    context: ShardContext, key: str, partitions: list[Partition], progress: ReportProgress, runner: TaskRunner
) -> list[PartitionResult]:
    """Write the drafts of the pending partitions and return all results. The first one that fails stops the others."""
    parts = _load_results(context, key, "draft")
    earlier = sum((part.counts for part in parts.values()), Counts())
    started, new = time.monotonic(), Counts()
    pending = [(index, partition) for index, partition in enumerate(partitions) if index not in parts]
    if pending:
        context = replace(context, parallel=runner.leaves_cpus_idle(len(pending)))
    task = partial(_draft_task, context=context, key=key)
    try:
        with closing(runner.run(task, pending)) as finished:
            for (index, _), part in finished:
                parts[index] = part
                new += part.counts
                done = earlier + new
                progress(
                    f"{len(parts)}/{counted(len(partitions), 'partition')}, {counted(done.documents, 'document')}, "
                    f"{done.bytes / 1e6:,.1f} MB, {new.bytes / 1e6 / (time.monotonic() - started):,.1f} MB/s"
                )
    except (UserError, GaveUp):
        if len(partitions) > 1:
            progress(f"stopping; {len(parts)} of {len(partitions)} partitions are finished and will not be made again")
        raise
    return [parts[index] for index in range(len(partitions))]


def _draft_task(item: tuple[int, Partition], context: ShardContext, key: str) -> PartitionResult:
    """Write the draft of one partition, and save its result."""
    index, partition = item
    part = shards.draft(context, index, partition)
    _save_result(context, key, "draft", index, part)
    return part


def _write_shards(
    context: ShardContext,
    key: str,
    drafts: list[PartitionResult],
    selection: Selection,
    progress: ReportProgress,
    runner: TaskRunner,
) -> list[PartitionResult]:
    """Write the final shards and return the results: drafts are moved, or rewritten as the selection says."""
    parts = _load_results(context, key, "final")
    pending = [
        (index, drafts[index], selection.removed.get(index, {}), selection.hold_out.get(index))
        for index in selection.changed
        if index not in parts
    ]
    with closing(runner.run(partial(_rewrite_task, context=context, key=key), pending)) as finished:
        for (index, *_), part in finished:
            parts[index] = part
            progress(f"{len(parts)}/{counted(len(selection.changed), 'partition')} rewritten")
    for index, part in enumerate(drafts):
        for shard in part.shards if index not in selection.changed else ():
            storage.move(context.work_file(shard.name), storage.join(context.directory, shard.name))
    return [parts.get(index, part) for index, part in enumerate(drafts)]


def _rewrite_task(
    item: tuple[int, PartitionResult, dict[str, Array], HoldOut | None], context: ShardContext, key: str
) -> PartitionResult:
    """Write the shards of one partition again, and save the result."""
    index, draft, removed, hold_out = item
    part = rewrite(context, index, draft, removed, hold_out)
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
