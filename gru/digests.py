"""Directories that can be verified: `digests.json`, written last, has the SHA-256 of every other file."""

import json
from collections.abc import Mapping
from pathlib import Path

from gru import storage

DIGESTS = "digests.json"


class DamagedFiles(Exception):
    """A file of a directory is absent, or its SHA-256 differs from the one in digests.json."""


def write_digests(directory: Path) -> None:
    """Write digests.json for the files of a flat directory, which marks the directory complete."""
    digests = {file.name: storage.sha256(file.read_bytes()) for file in sorted(directory.iterdir())}
    (directory / DIGESTS).write_text(json.dumps(digests, indent=1))


def read_verified(path: str) -> dict[str, bytes]:
    """Return the content of each file named in digests.json. Raises DamagedFiles naming the first wrong file."""
    try:
        digests = storage.read_json(storage.join(path, DIGESTS))
        if odd := [name for name in digests if "/" in name or name in (".", "..")]:
            raise DamagedFiles(f"{path}: {DIGESTS} names {odd[0]!r}; expected names of files in this directory")
        files = {name: storage.read_bytes(storage.join(path, name)) for name in digests}
    except (FileNotFoundError, ValueError) as error:
        raise DamagedFiles(f"{path}: incomplete: {error}") from None
    for name, data in files.items():
        if storage.sha256(data) != digests[name]:
            raise DamagedFiles(f"{path}/{name}: its SHA-256 differs from the one in {DIGESTS}")
    return files


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over the digests of files, by name: that of the directory which has them."""
    return storage.sha256(json.dumps({name: storage.sha256(data) for name, data in sorted(files.items())}).encode())
