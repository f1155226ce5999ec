"""Files under the storage path, which is local or a URL that fsspec opens (s3://...).

A file is written whole or not at all: local files are renamed into place, and object stores are atomic themselves.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from gru.errors import UserError


def is_local(path: str) -> bool:
    """Whether `path` is a path and not a URL."""
    return "://" not in path


def absolute(path: str, base: str | Path) -> str:
    """Return `path` itself if it is a URL or absolute, else the path under `base`."""
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.normpath(Path(base) / Path(path).expanduser())


def normalize(path: str, base: str | Path) -> str:
    """Return the one spelling of a storage path: absolute, and a URL without a trailing slash."""
    full = absolute(path, base)
    return full if is_local(full) else full.rstrip("/")


def join(path: str, *parts: str) -> str:
    """Return `path` extended by names below it."""
    return "/".join([path.rstrip("/"), *parts])


def check_writable(path: str, key: str = "storage") -> None:
    """Raise UserError if no file can be written under `path`, which is the value of the config's `key`."""
    probe = join(path, f".writable-{os.getpid()}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except (OSError, ImportError, ValueError) as error:  # ValueError: fsspec does not know the protocol
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key} = {path!r}: cannot write there: {reason}") from None


def exists(path: str) -> bool:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.exists(inner)


def names(path: str) -> list[str]:
    """Return the sorted names directly under a directory; empty if it does not exist."""
    filesystem, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    if not filesystem.isdir(inner):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(inner, detail=False))


def last_modified(path: str) -> float | None:
    """Return when a file under a directory was last modified, as a Unix time; None if it has none or it is unknown."""
    filesystem, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    try:
        return max((filesystem.modified(name).timestamp() for name in filesystem.find(inner)), default=None)
    except (NotImplementedError, FileNotFoundError):  # a file system without times, or another process at work
        return None


class StoredFile(NamedTuple):
    """A file under a directory."""

    name: str
    """Its path below the directory."""
    size: int
    """Bytes."""
    modified: float | None
    """Unix time; None if the file system does not tell."""


def files(path: str) -> list[StoredFile]:
    """Return all files under a directory; none if it does not exist."""
    filesystem, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    inner = inner.rstrip("/")
    found = filesystem.find(inner, detail=True)
    return [
        StoredFile(name[len(inner) + 1 :], int(info.get("size") or 0), _modified(info)) for name, info in found.items()
    ]


def _modified(info: dict[str, Any]) -> float | None:
    """Return when a file was modified, by what its file system calls this."""
    times = (info.get(key) for key in ("mtime", "LastModified", "last_modified", "updated", "created"))
    match next((time for time in times if time is not None), None):
        case datetime() as time:
            return time.timestamp()
        case int() | float() as seconds:
            return float(seconds)
    return None


def read_bytes(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write a file, which replaces an earlier one only once it is complete."""
    if not is_local(path):
        with fsspec.open(path, "wb") as file:
            file.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(_temporary_name(target.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def _temporary_name(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex}.tmp"


def final_name(name: str) -> str:
    """Return the final name of a file that may still have a temporary name."""
    return re.sub(r"^\.(.+)\.[0-9a-f]{32}\.tmp$", r"\1", name)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is one that only a process that was killed leaves, unless one is writing it."""
    return final_name(name) != name or bool(re.fullmatch(r"\.writable-\d+", name))


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def upload(directory: Path, path: str, last: str) -> None:
    """Copy a flat local directory to `path`, the file named `last` at the end, which marks the copy complete."""
    for file in sorted(directory.iterdir(), key=lambda file: file.name == last):
        write_bytes(join(path, file.name), file.read_bytes())


def remove(path: str) -> None:
    """Remove a file, or a directory with all its content, if it exists."""
    if is_local(path):
        target = Path(path)
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        return
    filesystem, inner = fsspec.core.url_to_fs(path)
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with fsspec.open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


class NewFile:
    """A file being written under a temporary name, which `commit` renames to `path` once it is complete.

    Counts its bytes and computes their SHA-256. Raises OSError.
    """

    def __init__(self, path: str) -> None:
        self._filesystem, self._path = fsspec.core.url_to_fs(path)
        folder, name = self._path.rsplit("/", 1)
        self._temporary = f"{folder}/{_temporary_name(name)}"
        self._filesystem.makedirs(folder, exist_ok=True)
        self._local = is_local(path)
        self._file = self._filesystem.open(self._temporary, "wb")
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.closed = False

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True

    def commit(self) -> None:
        """Close the file and rename it to its final name."""
        if self._local:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._filesystem.mv(self._temporary, self._path)

    def abandon(self) -> None:
        """Remove the temporary file."""
        with suppress(OSError):
            self._file.close()  # flushes the buffer, and fails again if the disk is full
        with suppress(OSError):
            self._filesystem.rm(self._temporary)


def move(path: str, target: str) -> None:
    """Rename a file, unless an earlier call has already done so."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    _, outer = fsspec.core.url_to_fs(target)
    if filesystem.exists(inner) or not filesystem.exists(outer):
        filesystem.mv(inner, outer)


@contextmanager
def full_disk_is_user_error(path: str) -> Iterator[None]:
    """Raise UserError instead of the OSError of a full, read-only or limited disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UserError(
            f"storage: cannot write {path}: {error.strerror}; finished work is kept: free some space and "
            "run the same command again"
        ) from None
