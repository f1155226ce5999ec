"""Web servers on this machine that behave as those of other people: with and without ranges, compressing, failing."""

import base64
import functools
import gzip
import io
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Ranges(BaseHTTPRequestHandler):
    """Serves the files of a directory, or the bytes of them that are asked for."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # else each answer waits 40 ms, for Nagle's algorithm

    def __init__(self, *args: Any, directory: Path) -> None:
        self.directory = directory
        super().__init__(*args)

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def content(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def do_GET(self) -> None:
        name = unquote(self.path.split("?")[0]).lstrip("/")
        if not (self.directory / name).is_file():
            return self.send_error(404)
        data = self.content(name)
        start, stop = 0, len(data)
        if ranges := self.headers.get("Range"):
            first, last = ranges.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else stop, stop)
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{zlib.crc32(data)}"')
        self.send_more_headers(name)
        self.end_headers()
        if self.command == "GET":
            self.send_data(data[start:stop])

    def send_more_headers(self, name: str) -> None: ...

    def send_data(self, data: bytes) -> None:
        self.wfile.write(data)


class Whole(SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges."""

    def log_message(self, *_: Any) -> None: ...


class BreaksOff(Whole):
    """Says how long a file is, and sends half of it."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        outputfile.write(data[: len(data) // 2])


class Resets(Ranges):
    """Ends each connection after a part of what it has announced."""

    def send_data(self, data: bytes) -> None:
        self.wfile.write(data[:50_000])
        self.close_connection = True


class Compresses(Ranges):
    """Compresses everything, asked or not, and sends ranges of the compressed file."""

    encoding = "gzip"

    def content(self, name: str) -> bytes:
        return gzip.compress(super().content(name), mtime=0)

    def send_more_headers(self, name: str) -> None:
        self.send_header("Content-Encoding", self.encoding)


class CompressesWholeFiles(Whole):
    """Compresses everything, and knows no ranges."""

    def send_head(self) -> Any:
        data = gzip.compress(Path(self.translate_path(self.path)).read_bytes())
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)


class UnknownEncoding(Compresses):
    encoding = "compress"


class NamesCompressedFiles(Ranges):
    """Describes .gz files, which are sent as they are, as gzip (Apache's AddEncoding)."""

    def send_more_headers(self, name: str) -> None:
        if name.endswith(".gz"):
            self.send_header("Content-Encoding", "x-gzip")


class Chunks(BaseHTTPRequestHandler):
    """Sends a text without saying how long it is; in the answer to HEAD it says so."""

    protocol_version = "HTTP/1.1"
    data = "line\n" * 1000

    def __init__(self, *args: Any, directory: Path) -> None:
        super().__init__(*args)

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.send_response(200)
        if "silent" not in self.path:
            self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in [self.data[:2000], self.data[2000:], ""]:
            self.wfile.write(f"{len(piece):x}\r\n{piece}\r\n".encode())


class Status(Whole):
    """Answers with the status that is the first part of the path."""

    def do_GET(self) -> None:
        self.send_error(int(self.path.split("/")[1]))


class FailsTwice(Ranges):
    """Answers two requests for each range with an error or not at all."""

    seen: dict[tuple[Any, str | None], int]

    def do_GET(self) -> None:
        key = (self.server, self.headers.get("Range"))
        FailsTwice.seen[key] = count = FailsTwice.seen.get(key, 0) + 1
        if count == 1:
            return self.send_error(503)
        if count == 2:
            self.close_connection = True
            return None
        return super().do_GET()


class Redirects(Ranges):
    """Redirects /to/NAME to /NAME, and /loop/NAME to itself."""

    def do_GET(self) -> None:
        directory = self.path.split("/")[1]
        target = {"to": self.path[3:], "loop": self.path, "ftp": "ftp://127.0.0.1/x"}.get(directory)
        if target is None:
            return super().do_GET()
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None


class Protected(Ranges):
    """Wants the name and password "me:se@cret"."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Basic {base64.b64encode(b'me:se@cret').decode()}":
            return self.send_error(401)
        return super().do_GET()


class WithoutHead(Ranges):
    """Refuses HEAD, as the servers of signed URLs do."""

    def do_HEAD(self) -> None:
        self.send_error(403)


class Silent(Ranges):
    """Sends the beginning of a file, and then nothing until it is stopped."""

    ended: threading.Event

    def send_data(self, data: bytes) -> None:
        self.wfile.write(data[:10])
        self.wfile.flush()
        self.ended.wait()


class Slow(Whole):
    """Sends a file in small pieces."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while data := source.read(2):
            outputfile.write(data)
            time.sleep(0.15)


class Grows(Ranges):
    """Has a longer file after the first two requests."""

    requests = 0

    def content(self, name: str) -> bytes:
        Grows.requests += 1
        return super().content(name) + b"more\n" * (Grows.requests > 2)


@contextmanager
def serve(handler: Any, directory: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=directory))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
