"""Checkpoints: directories of safetensors and JSON files, each complete once its `digests.json` exists and matches.

This module knows names and digests of files, and not what a learner stores in them. Loading executes no code from a
file.
"""

import json
import logging
import math
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gru import storage
from gru.digests import DIGESTS, DamagedFiles, read_verified
from gru.errors import UserError

STATE = "state.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file stem and name, such as tensors["model"]["embedding.weight"]."""
    state: dict[str, Any]
    """Plain JSON: the step, the identity of the run, the points to log, ..."""
    path: str | None = None
    """The directory that it was loaded from."""

    @property
    def average(self) -> dict[str, Tensor]:
        """The averaged weights, which are served."""
        return self.tensors["ema"]

    @property
    def step(self) -> int:
        """The number of steps that were trained."""
        return self.state["step"]

    @property
    def heldout_loss(self) -> float | None:
        """The held-out loss in nats per token; None if it was not measured with these weights."""
        return self.state.get("heldout_loss")


def save(checkpoint: Checkpoint, path: str) -> None:
    """Write a checkpoint to storage, file by file; the last file, the digests, completes it.

    If the storage raises an error, removes what was written, as far as the storage allows it, and raises that error:
    a partial checkpoint must not fill up a disk that is already full.
    """
    digests: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        storage.write_bytes(storage.join(path, name), data)
        digests[name] = storage.sha256(data)

    try:
        for stem, tensors in checkpoint.tensors.items():
            write(f"{stem}.safetensors", save_tensors(tensors))
        write(STATE, json.dumps(checkpoint.state, indent=1).encode())
        storage.write_json(storage.join(path, DIGESTS), digests)
    except Exception:
        with suppress(Exception):
            storage.remove(path)
        raise


def load(path: str) -> Checkpoint:
    """Read a checkpoint and verify its digests. Raises DamagedFiles."""
    files = read_verified(path)
    tensors = {
        name.removesuffix(".safetensors"): load_tensors(data)
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(tensors, json.loads(files[STATE]), path)


def new_name(step: int) -> str:
    """Return a unique name, so that a step that is trained again does not overwrite a checkpoint that is being read."""
    return f"step-{step:09d}-{secrets.token_hex(3)}"


def paths(run: str) -> list[str]:
    """Return the paths of a run's checkpoint directories, newest step first, incomplete ones included."""
    names = [name for name in storage.names(run) if re.fullmatch(r"step-\d{9}-[0-9a-f]{6}", name)]
    return [storage.join(run, name) for name in sorted(names, reverse=True)]


def newest(run: str, identity: dict[str, Any]) -> str | None:
    """Return the path of a run's newest undamaged checkpoint; log a warning for each damaged one.

    Raises UserError if it belongs to a run with another `identity` (dataset digest, model, ...).
    """
    for path in paths(run):
        try:
            checkpoint = load(path)
        except DamagedFiles as damage:
            log.warning("skipping a damaged checkpoint: %s", damage)
            continue
        for key, expected in identity.items():
            actual = checkpoint.state["identity"].get(key)
            if actual != expected:
                raise UserError(f"{path}: cannot resume: {_difference(key, actual, expected)}")
        return path
    return None


def _difference(key: str, actual: Any, expected: Any) -> str:
    if isinstance(actual, dict) and isinstance(expected, dict):
        name = next(name for name in actual | expected if actual.get(name) != expected.get(name))
        return _difference(f"{key}.{name}", actual.get(name), expected.get(name))
    return f"its {key} is {actual}, but this run's is {expected}"


def discard_newer(run: str, resumed: str | None) -> None:
    """Remove the checkpoints that are newer than the resumed one: they are damaged, and `prune` must not count them.

    If no checkpoint is resumed, removes nothing: the storage may only appear to be empty.
    """
    for path in paths(run) if resumed else []:
        if path == resumed:
            return
        storage.remove(path)


def best_heldout_loss(run: str) -> float:
    """Return the lowest held-out loss among the run's checkpoints; infinity if none has one."""
    return min((loss for _, loss in _measured(paths(run))), default=math.inf)


def prune(run: str, keep: int) -> None:
    """Remove the checkpoints that are `spare`. Nothing may be writing one."""
    for path in spare(run, keep):
        storage.remove(path)


def spare(run: str, keep: int) -> list[str]:
    """Return all but the `keep` newest checkpoints and the one with the lowest held-out loss; incomplete ones too."""
    complete = [path for path in paths(run) if storage.exists(storage.join(path, DIGESTS))]
    retained = set(complete[:keep])
    if measured := list(_measured(complete)):
        retained.add(min(measured, key=lambda pair: pair[1])[0])
    return [path for path in paths(run) if path not in retained]


def _measured(checkpoints: list[str]) -> Iterator[tuple[str, float]]:
    """Yield the path and held-out loss of each checkpoint that has one."""
    for path in checkpoints:
        with suppress(FileNotFoundError, ValueError):  # incomplete or damaged
            loss = storage.read_json(storage.join(path, STATE)).get("heldout_loss")
            if loss is not None:
                yield path, loss
