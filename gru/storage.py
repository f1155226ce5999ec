"""Files under the storage path, local or on whatever fsspec opens (s3://...).

A file written here is whole or absent: local ones are renamed into place, object stores do so themselves.
"""

import hashlib
import json
import os
import shutil
import uuid
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
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


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
