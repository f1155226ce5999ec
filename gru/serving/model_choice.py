"""The choice of a model for a request, and the description of the models for clients."""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any

from gru.config import ServeConfig
from gru.generation.state_cache import CachedState
from gru.serving.loaded_model import LoadedModel
from gru.serving.protocol import ApiError, previous_not_found


def describe(model: LoadedModel) -> dict[str, Any]:
    """Return the model's object of /v1/models."""
    version = model.version
    return {
        "id": version.name if model.alias == "champion" else f"{version.name}@{model.alias}",
        "object": "model",
        "created": version.created,
        "owned_by": "gru",
        "version": version.version,
        "alias": model.alias,
        "run_id": version.run_id,
        "bits_per_byte": version.bits_per_byte if math.isfinite(version.bits_per_byte) else None,
        "digest": model.bundle.digest,
    }


def choose_model(
    models: Sequence[LoadedModel], name: str | None, config: ServeConfig, sticky: str | None
) -> LoadedModel:
    """Return the model for a request that names NAME, NAME@ALIAS, NAME:VERSION or nothing. Raises ApiError.

    Of the requests that give neither alias nor version, the canary gets its share; those with the same `sticky` text
    always go to the same model.
    """
    if not models:
        raise ApiError(503, "no model is loaded yet", code="no_model")
    default = models[0]
    if name in (None, default.version.name):
        canary = next((each for each in models[1:] if each.alias == config.canary.alias and each.healthy), None)
        return canary if canary and fraction_of(sticky) < config.canary.share else default
    for each in models:
        if name in (f"{each.version.name}@{each.alias}", f"{each.version.name}:{each.version.version}"):
            return each
    known = ", ".join(repr(f"{each.version.name}@{each.alias}") for each in models)
    message = f"the model {name!a} does not exist; available models: {default.version.name!r}, {known}"
    raise ApiError(404, message, "model", "model_not_found")


def choose_previous(
    models: Sequence[LoadedModel], name: str | None, config: ServeConfig, owner: str, previous: str
) -> tuple[LoadedModel, CachedState]:
    """Return the model that has the state after the owner's response `previous`, and the state. Raises ApiError.

    A name with neither alias nor version is that of the canary, too.
    """
    chosen = choose_model(models, name, config, "")
    for model in models if name in (None, models[0].version.name) else [chosen]:
        if state := model.engine.turn_state(owner, previous):
            return model, state
    raise previous_not_found()


def fraction_of(sticky: str | None) -> float:
    """Return a number from 0 to 1: always the same for the same text, and a random one for None."""
    if sticky is None:
        return random.random()
    return int.from_bytes(hashlib.blake2b(sticky.encode(errors="replace"), digest_size=8).digest()) / 2**64
