"""Compressed and damaged files: gzip, Zstandard, bzip2 and xz, read up to the place where they are damaged.

This module does not know what the files contain.
"""

import bz2
import hashlib
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import pyarrow as pa

from gru.errors import GaveUp, UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 1 << 20  # bytes that are read at a time
EXPANSION = 4  # rough ratio of text to compressed bytes, for deciding how much of a file is sampled

_STEP = 1 << 12  # bytes that are unpacked at a time: of what comes before a damaged place, less than this is lost
_CHUNK = 1 << 14  # packed bytes that are read at a time: so exactly is the place of a damage known
_MAGIC_BYTES = 6  # length of the longest magic number

_DAMAGE = (zlib.error, OSError, EOFError, lzma.LZMAError, zstd.ZstdError)  # what the decompressors raise


class Damage(Exception):
    """A file is damaged or truncated; all before that place was read before this is raised.

    position: the number of (packed) bytes before the damage; what comes after it is lost.
    """

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


def is_damage(error: BaseException) -> bool:
    """Whether an error of Arrow comes from the content of a file, not from the disk or the network."""
    if isinstance(error, OSError):  # Arrow raises it for damage too, without an errno
        return type(error) is OSError and error.errno is None
    return isinstance(error, pa.ArrowException)


def error_reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    reason = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
    text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return (text.splitlines() or [repr(error)])[0]


@contextmanager
def unreadable_is_user_error(path: str) -> Iterator[None]:
    """Raise UserError with the path for the errors of a disk, a remote file system or Arrow; others are defects."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | GaveUp):
            raise
        if "://" not in path and not isinstance(error, OSError | pa.ArrowException):
            raise  # a defect; a remote file system may raise errors of its own types
        raise UserError(f"{path}: cannot be read: {error_reason(error)}") from None


class HashingFile(io.RawIOBase):
    """A file with the SHA-256 of all bytes that were read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def digest(self) -> str:
        """Return the SHA-256 of what was read so far."""
        return self._sha256.hexdigest()

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


class UnpackedFile(io.RawIOBase):
    """The content of all members (frames, streams) of a compressed file, one after another.

    NULs behind a member are padding, as tapes and block devices leave; anything else that begins no further member is
    garbage, which ends the content. Reading raises Damage once everything before the damage was read.

    file: the compressed bytes.
    compression: ".gz", ".zst", ".bz2" or ".xz".
    """

    def __init__(self, file: IO[bytes], compression: str) -> None:
        self._file = file
        self._format = _FORMATS[compression]
        self._member: Any = None  # the decompressor of the current member
        self._packed = b""  # was read, but not unpacked yet
        self._position = 0  # number of bytes read before `_packed`
        self._damage: Damage | None = None
        self.garbage = 0
        """Number of bytes behind the last member that are not NUL, once the end was read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._damage:
            raise self._damage
        view, done = memoryview(buffer), 0
        try:
            while done < len(view) and (data := self._unpack(min(len(view) - done, _STEP))):
                view[done : done + len(data)] = data
                done += len(data)
        except Damage as error:
            self._damage = error
            if not done:
                raise
        return done

    def _unpack(self, size: int) -> bytes:
        """Return up to `size` bytes of the content; nothing at its end."""
        while self._member or self._begin_member():
            needs_input = self._member.needs_input
            if needs_input and not self._packed:
                self._read()
            ended = needs_input and not self._packed
            try:
                data = self._member.decompress(self._packed if needs_input else b"", size)
            except _DAMAGE as error:
                raise Damage(error_reason(error), self._position) from None
            if needs_input:
                self._position, self._packed = self._position + len(self._packed), b""
            if self._member.eof:
                self._packed = self._member.unused_data
                self._position -= len(self._packed)
                self._member = None
            elif ended and not data:
                raise Damage("it ends in the middle of the compressed data", self._position)
            if data:
                return data
        return b""

    def _begin_member(self) -> bool:
        """Begin the next member, behind the padding of the one before it; False at the end of the content."""
        first = not self._position and not self._packed
        while True:
            if not first:
                self._skip_padding()
            if len(self._packed) >= _MAGIC_BYTES or not self._read():
                break
        if not first and self._packed and not self._format.magic.match(self._packed):
            self.garbage, self._packed = len(self._packed), b""
            while data := self._file.read(BLOCK):
                self.garbage += len(data)
        if not self._packed:
            return False
        self._member = self._format.decompressor()
        return True

    def _skip_padding(self) -> None:
        """Leave out the NULs at the start of `_packed`."""
        rest = self._packed.lstrip(b"\0")
        self._position, self._packed = self._position + len(self._packed) - len(rest), rest

    def _read(self) -> bool:
        """Append the next bytes of the file to `_packed`; False if there are none."""
        data = self._file.read(_CHUNK)
        self._packed += data
        return bool(data)


class _GzipMember:
    """zlib's decompressor of one gzip member, with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)


def _zstd_member() -> zstd.ZstdDecompressor:
    """Return a decompressor for windows of any length, as `zstd --long=31` makes; the default is 128 MiB."""
    largest = zstd.DecompressionParameter.window_log_max.bounds()[1]
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: largest})


class _Format(NamedTuple):
    decompressor: Callable[[], Any]
    magic: re.Pattern[bytes]  # what a member begins with


_FORMATS = {
    ".gz": _Format(_GzipMember, re.compile(rb"\x1f\x8b")),
    ".zst": _Format(_zstd_member, re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),  # or a skippable frame
    ".bz2": _Format(bz2.BZ2Decompressor, re.compile(rb"BZh")),
    ".xz": _Format(lzma.LZMADecompressor, re.compile(rb"\xfd7zXZ\x00")),
}
