"""One checkpoint: a directory of safetensors and JSON, complete when `digests.json` is there and true.

Knows names and digests of files; it does not know what a learner keeps in them. Nothing that is loaded can
execute code.
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
    """`tensors` by file stem and name, such as tensors["model"]["embedding.weight"]; `state` is plain JSON."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: str | None = None
    """The directory that it was loaded from."""

    @property
    def average(self) -> dict[str, Tensor]:
        """The averaged weights, which are served."""
        return self.tensors["ema"]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def heldout_loss(self) -> float | None:
        """Nats per token, if it was measured with these weights."""
        return self.state.get("heldout_loss")


def save(checkpoint: Checkpoint, path: str) -> None:
    """Write a checkpoint to storage, a file at a time; it is complete, and found, with the last of them. Raises what
    the storage raises, with as much of it gone as the storage lets go: half a checkpoint must not fill a full disk."""
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
    """Raises DamagedFiles."""
    files = read_verified(path)
    tensors = {
        name.removesuffix(".safetensors"): load_tensors(data)
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(tensors, json.loads(files[STATE]), path)


def new_name(step: int) -> str:
    """A name never used before: a step that is reached again must not overwrite what is being read."""
    return f"step-{step:09d}-{secrets.token_hex(3)}"


def paths(run: str) -> list[str]:
    """Paths of a run's checkpoint directories, newest step first, whole or not."""
    found = [name for name in storage.names(run) if re.fullmatch(r"step-\d{9}-[0-9a-f]{6}", name)]
    return [storage.join(run, name) for name in sorted(found, reverse=True)]


def newest(run: str, identity: dict[str, Any]) -> str | None:
    """The path of the newest undamaged checkpoint of a run; damaged ones are named in the log.

    Raises UserError if it was made from anything but `identity` (dataset digest, model, ...).
    """
    for path in paths(run):
        try:
            checkpoint = load(path)
        except DamagedFiles as damage:
            log.warning("checkpoint not used: %s", damage)
            continue
        for key, wanted in identity.items():
            found = checkpoint.state["identity"].get(key)
            if found != wanted:
                raise UserError(f"{path}: cannot resume: {_difference(key, found, wanted)}")
        return path
    return None


def _difference(key: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        name = next(name for name in found | wanted if found.get(name) != wanted.get(name))
        return _difference(f"{key}.{name}", found.get(name), wanted.get(name))
    return f"its {key} is {found}, but this run's is {wanted}"


def discard_others(run: str, used: str | None) -> None:
    """Remove the checkpoints that are newer than the one in use: they are damaged, and must not count as kept.

    Without one in use nothing is removed: storage may only seem to be empty."""
    for path in paths(run) if used else []:
        if path == used:
            return
        storage.remove(path)


def best_heldout_loss(run: str) -> float:
    """The lowest of the run's checkpoints; infinity if there is none."""
    return min((loss for _, loss in _measured(paths(run))), default=math.inf)


def prune(run: str, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the one with the lowest held-out loss. What is incomplete has
    been given up and goes too."""
    complete = [path for path in paths(run) if storage.exists(storage.join(path, DIGESTS))]
    kept = set(complete[:keep])
    if measured := list(_measured(complete)):
        kept.add(min(measured, key=lambda pair: pair[1])[0])
    for path in paths(run):
        if path not in kept:
            storage.remove(path)


def _measured(found: list[str]) -> Iterator[tuple[str, float]]:
    """Checkpoints with a held-out loss, and that loss."""
    for path in found:
        with suppress(FileNotFoundError, ValueError):  # half-made, or damaged
            loss = storage.read_json(storage.join(path, STATE)).get("heldout_loss")
            if loss is not None:
                yield path, loss
