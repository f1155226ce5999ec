"""Directories that prove themselves: `digests.json`, written last, has the SHA-256 of every other file."""

import json
from pathlib import Path

from gru import storage

DIGESTS = "digests.json"


class DamagedFiles(Exception):
    """A directory whose files are not those that its digests.json promises."""


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
