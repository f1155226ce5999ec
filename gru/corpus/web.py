"""Files of web servers (http://, https://): what a server says about a file, and how to read it.

What may pass (status 5xx, a refused or broken connection, silence) is tried again before it counts. This module does
not know the formats of the files.
"""

import io
import re
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
import urllib3

from gru.errors import GaveUp, UserError

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # waits between attempts
CONNECT_SECONDS = 20.0  # to wait for a connection
READ_SECONDS = 60.0  # to wait for the next bytes; a whole download may take any time

_BLOCK = 1 << 20  # fewest bytes that are asked for at once
_MOST_BYTES = 64 << 20  # most bytes that are read ahead for a sequential reader
_CHUNK = 1 << 16  # bytes that are read at a time: so many are read again, at most, after a connection broke
_PROBE_BYTES = 4096  # bytes that are asked for to see what the server does; some compress only longer answers
_PASSING = {408, 425, 429}  # statuses below 500 that may pass
_PROBLEMS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
_DECODED = {"gzip", "x-gzip", "deflate"}  # values of Content-Encoding that urllib3 decodes
_ENCODING_OF = {".gz": ("gzip", "x-gzip"), ".zst": ("zstd",)}  # as which servers send files that are compressed anyway


class WebInfo(NamedTuple):
    """What a server says about a file."""

    size: int  # in bytes, as they are sent
    version: str  # ETag or time of modification; empty if it says neither
    seekable: bool  # whether it sends the bytes that are asked for, of the file as it is


def file_name(url: str) -> str:
    """Return the last component of a URL's path, or the host if it has no path."""
    parts = urlsplit(url)
    return unquote(parts.path.rstrip("/").rsplit("/", 1)[-1]) or (parts.hostname or url)


def without_password(url: str) -> str:
    """Return a URL without user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def probe(url: str, compression: str) -> WebInfo:
    """Ask the server about a file, reading only its first bytes.

    compression: of the file by its name, such as ".gz". Raises UserError if the server refuses it or does not tell its
    size, GaveUp if the server cannot be reached or fails.
    """
    with requests.Session() as session:
        response = _get(session, url, f"bytes=0-{_PROBE_BYTES - 1}")
        if response.status_code == 416 and _total(response) is None:  # the answer of some servers for an empty file
            response = _get(session, url, None)
        with response:
            ranges = response.status_code in (206, 416)
            size = _total(response) if ranges else _content_length(response)
            if size is None and not _foreign_encoding(response, compression):
                size = _size_by_head(session, url)
            if size is None:
                raise UserError(
                    f"{without_password(url)}: the server does not tell its size; copy it to a disk or bucket first"
                )
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            return WebInfo(size, version, ranges and not _foreign_encoding(response, compression))


def _size_by_head(session: requests.Session, url: str) -> int | None:
    """Return the size of a file by a request without the file, which some servers answer only there."""
    try:
        response = session.head(url, headers={"Accept-Encoding": "identity"}, timeout=_timeouts(), allow_redirects=True)
    except _PROBLEMS:
        return None
    return _content_length(response) if response.ok else None


def open_file(url: str, size: int, seekable: bool, compression: str) -> io.BufferedReader:
    """Open a file for reading; the arguments are those of `probe` and its result.

    Reading raises UserError if the file has changed, GaveUp if the server fails too often.
    """
    return io.BufferedReader(_WebFile(url, size, seekable, compression), _BLOCK)


class _WebFile(io.RawIOBase):
    """A file of a web server; where its connection breaks, another one continues if the server sends ranges."""

    def __init__(self, url: str, size: int, seekable: bool, compression: str) -> None:
        self._url, self._size, self._seekable, self._compression = url, size, seekable, compression
        self._session = requests.Session()
        self._response: requests.Response | None = None
        self._position = 0
        self._stop = 0  # the end of the bytes that the response has
        self._ahead = _BLOCK // 2  # the fewest bytes of the last request
        self._waits = iter(RETRY_SECONDS)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self._seekable:
            raise io.UnsupportedOperation("the server sends the file from its beginning only")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset != self._position:
            self._drop_response()
        self._position = base + offset
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._drop_response()
            self._session.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not (self._seekable and self._position >= self._size):
            if self._response is None:
                self._request(len(view))
            assert self._response is not None
            decode = not self._seekable and _foreign_encoding(self._response, self._compression) != ""
            try:
                data = self._response.raw.read(min(len(view), _CHUNK), decode_content=decode)
            except _PROBLEMS as error:
                self._wait_after(_reason(error))
                continue
            if not data and self._is_short(decode):
                self._wait_after("it ended early")
                continue
            view[: len(data)] = data
            self._position += len(data)
            self._waits = iter(RETRY_SECONDS) if data else self._waits
            if self._seekable and self._position >= self._stop:
                self._response = None  # the connection is free for the next one
            return len(data)
        return 0

    def _is_short(self, decode: bool) -> bool:
        return self._seekable or (not decode and self._position < self._size)

    def _request(self, length: int) -> None:
        """Ask for the bytes from the position on."""
        if not self._seekable:
            self._response = _get(self._session, self._url, None)
            _check_encoding(self._response, self._url, self._compression)
            return
        self._ahead = min(2 * self._ahead, _MOST_BYTES) if self._position == self._stop else _BLOCK
        self._stop = min(self._position + max(length, self._ahead), self._size)
        response = _get(self._session, self._url, f"bytes={self._position}-{self._stop - 1}")
        total = _total(response) if response.status_code in (206, 416) else _content_length(response)
        if total not in (None, self._size):
            response.close()
            raise UserError(f"{without_password(self._url)}: changed while it was read; run the same command again")
        sent = re.match(r"bytes (\d+)-(\d+)", response.headers.get("Content-Range", ""))
        encoding = _foreign_encoding(response, self._compression)
        if response.status_code != 206 or encoding or (sent and int(sent[1]) != self._position):
            response.close()
            raise GaveUp(
                f"{without_password(self._url)}: the server did not send the bytes that it was asked for, as it did "
                f"before ({response.status_code} {response.reason}{', ' * bool(encoding)}{encoding})"
            )
        self._response = response
        self._stop = min(self._stop, int(sent[2]) + 1) if sent else self._stop

    def _wait_after(self, reason: str) -> None:
        """Wait before the next attempt. Raises GaveUp if there is none."""
        self._drop_response()
        place = f"the connection broke at byte {self._position:,} of {self._size:,} ({reason})"
        if self._position and not self._seekable:
            raise GaveUp(
                f"{without_password(self._url)}: cannot be read: {place}, and the server sends it from the beginning "
                "only: run the same command again, or download it first"
            )
        seconds = next(self._waits, None)
        if seconds is None:
            raise GaveUp(f"{without_password(self._url)}: cannot be read: {place} {_attempts()}")
        time.sleep(seconds)

    def _drop_response(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _get(session: requests.Session, url: str, byte_range: str | None) -> requests.Response:
    """Return the server's answer with status 200, 206 or 416, its body not yet read.

    byte_range: value of the header Range. Raises UserError for a mistake, GaveUp after several failures.
    """
    shown = without_password(url)
    headers = {"Accept-Encoding": "identity"} | ({"Range": byte_range} if byte_range else {})
    for seconds in (*RETRY_SECONDS, None):
        try:
            response = session.get(url, headers=headers, stream=True, timeout=_timeouts())
        except _PROBLEMS as error:
            if mistake := _mistake(error):
                raise UserError(f"cannot read {shown}: {mistake}") from None
            reason = _reason(error)
        else:
            if response.status_code in (200, 206, 416):
                return response
            response.close()
            reason = f"{response.status_code} {response.reason}"
            if response.status_code in (404, 410):
                raise UserError(f"no such file: {shown} ({reason})")
            if response.status_code < 500 and response.status_code not in _PASSING:
                raise UserError(f"cannot read {shown}: {reason}")
        if seconds is not None:
            time.sleep(seconds)
    raise GaveUp(f"cannot read {shown}: {reason} {_attempts()}")


def _attempts() -> str:
    return f"in each of {len(RETRY_SECONDS) + 1} attempts"


def _timeouts() -> tuple[float, float]:
    return CONNECT_SECONDS, READ_SECONDS


def _mistake(error: BaseException) -> str | None:
    """Return why a request that failed would always fail; None if it may pass."""
    if isinstance(error, requests.TooManyRedirects):
        return f"the server redirects in a loop (more than {requests.models.DEFAULT_REDIRECT_LIMIT} times)"
    if isinstance(error, ValueError):  # requests' errors of invalid URLs and unknown protocols
        return str(error)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not valid: {cause.verify_message}"
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return f"its host is not known: {cause.strerror}"
    return None


def _reason(error: BaseException) -> str:
    """Return in few words why a request failed, which the libraries wrap several times."""
    causes = [*_causes(error)]
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    if any(isinstance(cause, urllib3.exceptions.ConnectTimeoutError | requests.ConnectTimeout) for cause in causes):
        return f"no connection within {CONNECT_SECONDS:g} seconds"
    if any(isinstance(cause, TimeoutError | urllib3.exceptions.TimeoutError | requests.Timeout) for cause in causes):
        return f"no answer within {READ_SECONDS:g} seconds"
    return str(causes[-1]).splitlines()[0] if str(causes[-1]) else type(causes[-1]).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _total(response: requests.Response) -> int | None:
    """Return the size of the whole file by the header Content-Range of an answer with a part of it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2].strip()
    return int(total) if total.isdecimal() else None


def _content_length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _foreign_encoding(response: requests.Response, compression: str) -> str:
    """Return the compression that the server adds to the file, although it is asked not to; empty if none.

    A server that sends a .gz file as "gzip" adds none: it describes the file.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding in ("", "identity", *_ENCODING_OF.get(compression, ())) else encoding


def _check_encoding(response: requests.Response, url: str, compression: str) -> None:
    encoding = _foreign_encoding(response, compression)
    if encoding and encoding not in _DECODED:
        response.close()
        raise UserError(
            f"{without_password(url)}: the server sends it only with Content-Encoding: {encoding}; download it first"
        )
