"""Files under the storage path, local or on whatever fsspec opens (s3://...).

A file written here is whole or absent: local ones are renamed into place, object stores do so themselves.
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
from pathlib import Path
from typing import Any

import fsspec

from gru.errors import UserError


def is_local(path: str) -> bool:
    return "://" not in path


def absolute(path: str, base: str | Path) -> str:
    """`path` itself if it is a URL or absolute, else under `base`."""
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.normpath(Path(base) / Path(path).expanduser())


def normalize(path: str, base: str | Path) -> str:
    """The same storage always in the same words: absolute, and a URL without a slash at its end."""
    found = absolute(path, base)
    return found if is_local(found) else found.rstrip("/")


def join(path: str, *parts: str) -> str:
    return "/".join([path.rstrip("/"), *parts])


def check_writable(path: str) -> None:
    """Raise UserError if nothing can be written under `path`."""
    probe = join(path, f".writable-{os.getpid()}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except (OSError, ImportError, ValueError) as error:  # ValueError: a protocol that fsspec does not know
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"storage = {path!r}: cannot write there: {reason}") from None


def exists(path: str) -> bool:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.exists(inner)


def names(path: str) -> list[str]:
    """Names directly under a directory, sorted; none if it does not exist."""
    filesystem, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    if not filesystem.isdir(inner):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(inner, detail=False))


def read_bytes(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
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
    """The name that a file which is being written will have; that of any other is its own."""
    return re.sub(r"^\.(.+)\.[0-9a-f]{32}\.tmp$", r"\1", name)


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def upload(directory: Path, path: str, last: str) -> None:
    """Copy a flat local directory to `path`; the file named `last` goes last and marks it complete."""
    for file in sorted(directory.iterdir(), key=lambda file: file.name == last):
        write_bytes(join(path, file.name), file.read_bytes())


def remove(path: str) -> None:
    """Remove a file or a directory with all that is in it; nothing happens if it is absent."""
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
    """SHA-256 of a file. Raises OSError."""
    with fsspec.open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


class NewFile:
    """A file to write that appears at `path` when it is committed, whole; until then, and if it never is, it has
    another name beside it. Counts its bytes and takes its SHA-256 on the way. Raises OSError.
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
        if self._local:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._filesystem.mv(self._temporary, self._path)

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()  # which writes what is left, and fails again if the disk is full
        with suppress(OSError):
            self._filesystem.rm(self._temporary)


def move(path: str, target: str) -> None:
    """Give a file another name; nothing happens if that is done already."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    _, outer = fsspec.core.url_to_fs(target)
    if filesystem.exists(inner) or not filesystem.exists(outer):
        filesystem.mv(inner, outer)


@contextmanager
def full_disk_is_user_error(path: str) -> Iterator[None]:
    """Raises UserError instead of the OSError of a disk that is full, or takes nothing more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UserError(
            f"storage: cannot write {path}: {error.strerror}; what is finished stays: make room and run the same again"
        ) from None
