"""One checkpoint: a directory of safetensors and JSON, complete when `digests.json` is there and true.

Knows names and digests of files; it does not know what a learner keeps in them. Nothing that is loaded can
execute code.
"""

import json
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gru import storage
from gru.errors import UserError

DIGESTS = "digests.json"
STATE = "state.json"

log = logging.getLogger(__name__)


class DamagedFiles(Exception):
    """A directory whose files are not those that its digests.json promises."""


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by file stem and name, such as tensors["model"]["embedding.weight"]; `state` is plain JSON."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


def write_digests(directory: Path) -> None:
    """Write digests.json over the files of a flat directory, which completes it."""
    digests = {file.name: storage.sha256(file.read_bytes()) for file in sorted(directory.iterdir())}
    (directory / DIGESTS).write_text(json.dumps(digests, indent=1))


def read_verified(path: str) -> dict[str, bytes]:
    """The files that a directory's digests.json names. Raises DamagedFiles naming the first that is wrong."""
    try:
        digests = storage.read_json(storage.join(path, DIGESTS))
        files = {name: storage.read_bytes(storage.join(path, name)) for name in digests}
    except (FileNotFoundError, ValueError) as error:
        raise DamagedFiles(f"{path}: incomplete: {error}") from None
    for name, data in files.items():
        if storage.sha256(data) != digests[name]:
            raise DamagedFiles(f"{path}/{name}: its SHA-256 differs from the one in {DIGESTS}")
    return files


def save(checkpoint: Checkpoint, directory: Path) -> None:
    for stem, tensors in checkpoint.tensors.items():
        (directory / f"{stem}.safetensors").write_bytes(save_tensors(tensors))
    (directory / STATE).write_text(json.dumps(checkpoint.state, indent=1))
    write_digests(directory)


def load(path: str) -> Checkpoint:
    """Raises DamagedFiles."""
    files = read_verified(path)
    tensors = {
        name.removesuffix(".safetensors"): load_tensors(data)
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(tensors, json.loads(files[STATE]))


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
                raise UserError(f"{path}: cannot resume: its {key} is {found}, but this run's is {wanted}")
        return path
    return None


def discard_others(run: str, used: str | None) -> None:
    """Remove the checkpoints that are newer than the one in use: they are damaged, and must not count as kept."""
    for path in paths(run):
        if path == used:
            return
        storage.remove(path)


def prune(run: str, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints. What is incomplete has been given up and goes too."""
    complete = [path for path in paths(run) if storage.exists(storage.join(path, DIGESTS))]
    for path in paths(run):
        if path not in complete[:keep]:
            storage.remove(path)
