"""Compressed and damaged files: gzip, Zstandard, bzip2 and xz, read up to the place where they are damaged.

This module does not know what the files contain.
"""

import bz2
import hashlib
import io
import lzma
from typing import IO, Any

import ijson
import pyarrow as pa

BLOCK = 1 << 20  # bytes that are read at a time

_STEP = 1 << 12  # bytes that are unpacked at a time: of what comes before a damaged place, less than this is lost

# What readers raise for a damaged file. Arrow raises OSError too, without an errno.
DAMAGE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, ijson.JSONError)


def is_damage(error: BaseException) -> bool:
    """Whether the error comes from the content of a file, not from the disk or the network."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        return False
    return isinstance(error, DAMAGE)


def error_reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    reason = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
    text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return (text.splitlines() or [repr(error)])[0]


def unpack(file: IO[bytes], compression: str) -> io.BufferedReader:
    """Return a stream of all frames of a file; reading it raises one of `DAMAGE` if the file is damaged or truncated.

    compression: ".gz", ".zst", ".bz2", ".xz" or "".
    """
    stream: Any = file
    match compression:
        case ".gz" | ".zst":
            stream = pa.CompressedInputStream(file, "gzip" if compression == ".gz" else "zstd")
        case ".bz2":
            stream = bz2.BZ2File(file)
        case ".xz":
            stream = lzma.LZMAFile(file)  # noqa: SIM115
    return io.BufferedReader(_UntilDamage(stream), BLOCK)


class HashingFile(io.RawIOBase):
    """A file with the SHA-256 of all bytes that were read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def digest_of_all(self) -> str:
        """Read the rest of the file and return the SHA-256 of all of it, even if a reader has closed this object."""
        while data := self._file.read(BLOCK):
            self._sha256.update(data)
        return self._sha256.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._sha256.update(data)
        buffer[: len(data)] = data
        return len(data)


class _UntilDamage(io.RawIOBase):
    """A stream that returns everything before a damaged place, and raises the error only after that."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error:
            raise self._error
        view, done = memoryview(buffer), 0
        try:
            while done < len(view) and (count := self._stream.readinto(view[done : done + _STEP])):
                done += count
        except DAMAGE as error:
            if not done:
                raise
            self._error = error
        return done
