"""The leftovers of preparations: work files of a finished dataset, and unfinished datasets that nothing will finish.

An unfinished dataset resumes only while its sources are as they were. This module does not know how a dataset is made.
"""

import time
from collections.abc import Callable

from pydantic import BaseModel, ValidationError

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import MANIFEST, TOKENIZER, Dataset
from gru.corpus.shards import WORK_DIRECTORY
from gru.errors import GaveUp, UserError

_INPUTS = "inputs.json"
_UNUSED_SECONDS = 24 * 3600  # time without a change to any file after which no process works on a dataset any more
_STALE_SECONDS = 3600  # time without a change after which no task writes a temporary file any more


class _Inputs(BaseModel):
    """The inputs of an unfinished dataset, which lie beside its work files."""

    key: str
    corpus: CorpusConfig
    tokenizer: TokenizerConfig


def record_inputs(directory: str, key: str, corpus: CorpusConfig, tokenizer: TokenizerConfig) -> None:
    """Write what an unfinished dataset is made of, so that it can be seen later whether it can still be finished."""
    inputs = _Inputs(key=key, corpus=corpus, tokenizer=tokenizer)
    storage.write_json(_inputs_file(directory), inputs.model_dump(mode="json"))


def _inputs_file(directory: str) -> str:
    return storage.join(directory, WORK_DIRECTORY, _INPUTS)


def remove_temporary_files(directory: str, now: float | None = None) -> None:
    """Remove the temporary files of killed tasks from an unfinished dataset, if unchanged for an hour.

    Younger ones stay, since another process may be preparing the same dataset.
    """
    before = (time.time() if now is None else now) - _STALE_SECONDS
    for file in storage.files(directory):
        if storage.is_leftover(file.name.rsplit("/", 1)[-1]) and (file.modified or before) < before:
            storage.remove(storage.join(directory, file.name))


def remove_work_files(dataset: Dataset) -> Dataset:
    """Remove the work files of this and of killed attempts from a finished dataset, and return it."""
    complete = {MANIFEST, TOKENIZER, *(shard.name for shard in dataset.manifest.shards)}
    for name in storage.names(dataset.directory):
        final = storage.final_name(name)
        if name == WORK_DIRECTORY or (name not in complete and (final in complete or final.endswith(".parquet"))):
            storage.remove(storage.join(dataset.directory, name))
    return dataset


def remove_unreachable(
    directory: str,
    key_of: Callable[[CorpusConfig, TokenizerConfig], str],
    progress: Callable[[str], None],
    now: float | None = None,
) -> None:
    """Remove the unfinished datasets beside `directory` whose sources have changed, if unused for a day.

    key_of: returns the key of the dataset of these configs and of the sources as they are now. A dataset stays if its
    sources cannot be listed now, since they may come back.
    """
    before = (time.time() if now is None else now) - _UNUSED_SECONDS
    parent, own = directory.rstrip("/").rsplit("/", 1)
    for name in storage.names(parent):
        other = storage.join(parent, name)
        if name == own or storage.exists(storage.join(other, MANIFEST)) or not storage.exists(_inputs_file(other)):
            continue
        if (storage.last_modified(other) or before) < before and _is_unreachable(other, key_of):
            storage.remove(other)
            progress(f"removed {other}: an unfinished dataset of sources that have changed since")


def _is_unreachable(directory: str, key_of: Callable[[CorpusConfig, TokenizerConfig], str]) -> bool:
    """Whether no run will finish the dataset, because its configs now lead to another key."""
    try:
        inputs = _Inputs.model_validate(storage.read_json(_inputs_file(directory)))
        return key_of(inputs.corpus, inputs.tokenizer) != inputs.key
    except (ValidationError, ValueError, OSError, UserError, GaveUp):
        return False
