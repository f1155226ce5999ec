"""Warm start: look up `train.init_from` once per run, and put what it is into the configuration.

The jobs and the workflow then read from the configuration alone which model the run starts from, and with which
tokenizer, wherever its alias has moved since.
"""

from contextlib import suppress
from typing import TYPE_CHECKING

from gru.config import PipelineConfig, is_model_reference
from gru.config_stages import NO_MODEL
from gru.errors import UserError
from gru.registry.lineage import Lineage
from jobs import entry, stages
from jobs.results import PrepareResult

if TYPE_CHECKING:
    from gru.training.initial_model import InitialModel


def pinned(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with its initial model looked up: a version or path in `train.init_from`, its digest in
    `train.init_digest`, and its tokenizer in `tokenizer.path`. One that is looked up already stays as it is.

    An alias that was moved to the result of this very run stands for the model from which that started: the same
    configuration and sources are the same run. Raises UserError if there is no such model, or it does not fit.
    """
    reference, digest = config.train.init_from, config.train.init_digest
    if reference is None or digest == NO_MODEL:
        return config
    known = initial_model(config)
    if known and config.tokenizer.path == known.tokenizer_path:
        return config
    from gru.training.initial_model import fetch

    is_alias = False
    if is_model_reference(reference):
        entry.require_tracking()
        is_alias = "@" in reference
    is_there = known and known.is_stored() and not is_alias
    model = known if is_there else fetch(reference, config.storage, config.model_name)
    if digest not in (None, model.digest if model else NO_MODEL):
        raise UserError(f"train.init_digest = {digest!r}: that of {reference} is {model.digest if model else NO_MODEL}")
    if model is None:
        return _changed(config, reference, NO_MODEL, config.tokenizer.path)
    if is_alias and (lineage := model.lineage()):
        with suppress(UserError):  # what it started from may be gone
            began = (lineage.initial, lineage.initial_digest) if lineage.initial else (reference, NO_MODEL)
            earlier = pinned(_changed(config, *began, config.tokenizer.path))
            if _made(earlier, lineage):
                return earlier
    model.require_fit(config.model, config.tokenizer, config.corpus.normalization)
    return _changed(config, model.name, model.digest, model.tokenizer_path)


def _changed(config: PipelineConfig, name: str | None, digest: str | None, tokenizer: str | None) -> PipelineConfig:
    update = {
        "train": config.train.model_copy(update={"init_from": name, "init_digest": digest}),
        "tokenizer": config.tokenizer.model_copy(update={"path": tokenizer}),
    }
    return config.model_copy(update=update)


def _made(config: PipelineConfig, lineage: Lineage) -> bool:
    """Whether the run of this configuration, with the sources as they are, is the one that a model comes from."""
    prepared = stages.prepare_stage(config).result()
    return prepared is not None and stages.train_stage(config, prepared).key == _run_of(lineage)


def _run_of(lineage: Lineage) -> str | None:
    """The key of the training run that a model comes from, since two machines may know a storage by different paths."""
    return lineage.checkpoint.rstrip("/").split("/")[-2] if lineage.checkpoint else None


def initial_model(config: PipelineConfig) -> "InitialModel | None":
    """The model from which the run of a pinned configuration starts; None: it starts from random weights."""
    name, digest = config.train.init_from, config.train.init_digest
    if name is None or digest is None or digest == NO_MODEL:
        return None
    from gru.training.initial_model import InitialModel  # with torch, which prepare needs for nothing else

    return InitialModel(name, digest, config.storage)


def describe(config: PipelineConfig, model: "InitialModel | None", prepared: PrepareResult) -> list[str]:
    """Return lines for people about the start of the run of a pinned configuration, and about its held-out text."""
    if model is None:
        reference = config.train.init_from
        name = f"{config.model_name} has no earlier {reference}"
        return [f"{name}: starting from random weights"] if reference else []
    lineage = model.lineage()
    by, share = (lineage.heldout_by, lineage.heldout_share) if lineage else (None, None)
    now_by, now_share = prepared["heldout_by"], config.corpus.heldout_share
    # By hash, a document that is held out remains so, whatever else the corpus has.
    if now_by == by == "hash" and share is not None and share >= now_share:
        return [f"starting from {model}"]
    known = f"for {model.name} by {by}, {share}" if by else "for it, that is not recorded"
    note = (
        f"note: the scores may be too good: {model.name} may have been trained on text that is held out now "
        f"(by {now_by}, corpus.heldout_share = {now_share}; {known})"
    )
    return [f"starting from {model}", note]


def describe_cached(config: PipelineConfig, key: str) -> str:
    """Return in words why the finished run `key` of a pinned configuration is not trained further; "" if it is plain.

    It is not if the champion that it was to start from is its own result.
    """
    if config.train.init_from is None:
        return ""
    from gru.registry import versions
    from gru.training.initial_model import InitialModel

    champion = versions.resolve(config.model_name, versions.CHAMPION)
    if champion is None:
        return ""
    name = f"{champion.name}:{champion.version}"
    model = InitialModel(name, champion.bundle, config.storage)
    lineage = model.lineage() if model.is_stored() else None
    if lineage is None or _run_of(lineage) != key:
        return ""
    return (
        f"not trained again: it is @{versions.CHAMPION} ({name}) itself; other text, other settings or "
        f'train.init_from = "{name}" train it further'
    )
