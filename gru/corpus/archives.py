"""The members of zip and tar archives, one after another, each up to the place where it is damaged.

This module does not know the formats of the members.
"""

import errno
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple

from gru.corpus.unpacking import BLOCK, Damage, error_reason

# What zipfile and tarfile raise for a member that is damaged, encrypted or packed in a way that they do not know.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError),
)
_INVALID_HEADERS = ("InvalidHeaderError", "TruncatedHeaderError")  # the others are the ways in which an archive ends
_STEP = 1 << 14  # bytes that are read at a time: of what comes before a damaged place, less than this is lost


class EndsInMember(Damage):
    """The archive cannot be read behind a member because that one is damaged, as its reader was told."""


class Gap(NamedTuple):
    """Bytes of a tar archive where the header of a member should be, and is damaged."""

    size: int  # in bytes, unpacked


class Member(NamedTuple):
    """A file in an archive, to be read before the next one."""

    name: str
    size: int  # in bytes, unpacked
    content: io.BufferedReader  # raises Damage


def zip_members(file: IO[bytes]) -> Iterator[Member]:
    """Yield the files in a zip archive, which is seekable. Raises Damage if its directory cannot be read."""
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise Damage(_reason(error), 0) from None
    for info in archive.infolist():
        if not info.is_dir():
            content = _Content(partial(archive.open, info))
            yield Member(_normal(info.filename), info.file_size, io.BufferedReader(content, BLOCK))


def tar_members(stream: io.BufferedReader) -> Iterator[Member | Gap]:
    """Yield the files in a tar archive. Behind a damaged header the next valid one is searched for.

    Raises Damage where the stream ends too early; EndsInMember if that is in a member whose content raised Damage.
    """
    archive, found, content = None, False, None
    try:
        readable: Any = _Available(stream)
        archive = _Tar.open(fileobj=readable, mode="r|", bufsize=BLOCK, tarinfo=_Header, ignore_zeros=True)
        while info := archive.next():
            if archive.invalid:
                yield Gap(archive.invalid * tarfile.BLOCKSIZE)
                archive.invalid = 0
            content = None
            archive.members.clear()  # else it remembers all of them
            found = True
            if info.isreg():
                content = _Content(partial(archive.extractfile, info))
                yield Member(_normal(info.name), info.size, io.BufferedReader(content, BLOCK))
        if archive.invalid:
            yield Gap(archive.invalid * tarfile.BLOCKSIZE)
    except (Damage, tarfile.TarError, EOFError) as error:
        if content and content.is_damaged:
            raise EndsInMember(_reason(error), 0) from None
        if isinstance(error, Damage):
            raise
        if not found and isinstance(error, tarfile.StreamError):  # it goes back, since no header is at the beginning
            raise Damage("no member of a tar archive is in it", 0) from None
        raise Damage(_reason(error), archive.offset if archive else 0) from None


@contextmanager
def seekable_copy(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Return a temporary copy on disk of a file that can be read from its beginning only."""
    with tempfile.TemporaryFile() as copy:
        while data := file.read(BLOCK):
            copy.write(data)
        copy.seek(0)
        yield copy


class _Available:
    """A stream that returns what it has before it raises an error."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.read = stream.read1


class _Tar(tarfile.TarFile):
    """A tar archive that counts its invalid headers."""

    invalid = 0
    """Number of blocks since the last member that are neither a header nor empty."""

    members: list[tarfile.TarInfo]


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.invalid += type(error).__name__ in _INVALID_HEADERS
            raise


class _Content(io.RawIOBase):
    """The bytes of a member, which is opened when they are read."""

    def __init__(self, open_member: Callable[[], Any]) -> None:
        self._open = open_member
        self._file: Any = None
        self._position = 0
        self._damage: Damage | None = None

    @property
    def is_damaged(self) -> bool:
        """Whether reading came to a damaged place."""
        return self._damage is not None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._damage:
            raise self._damage
        view, done = memoryview(buffer), 0
        try:
            self._file = self._file or self._open()
            while done < len(view) and (data := self._file.read(min(_STEP, len(view) - done))):
                view[done : done + len(data)] = data
                done += len(data)
        except (Damage, *_DAMAGE) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # of the disk or the network; zipfile seeks to damaged offsets
            self._damage = Damage(_reason(error), self._position + done)
            if not done:
                raise self._damage from None
        self._position += done
        return done


def _normal(name: str) -> str:
    """Return the name of a member as a path below the archive, in valid Unicode."""
    name = name.encode(errors="surrogateescape").decode(errors="replace").replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _reason(error: Exception) -> str:
    return error_reason(error).rstrip(".")
