"""Limits on what clients may cost Serve's HTTP proxies: headers, slow requests, connections. It knows no models.

A proxy accepts requests before any API key is checked. Serve 2.60 runs uvicorn in it without limits: a header may have
any size, and a connection may stay open for ever. `install` runs in each proxy when it starts, because Serve is told to
call it by an environment variable (`gru.ray_internals.PROXY_CALLBACK`).
"""

import asyncio
import math
import resource
import urllib.error
import urllib.request
from typing import Any, ClassVar

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gru import ray_internals
from gru.serving.middleware import BODY_SECONDS, REQUEST_ID, replay
from gru.serving.protocol import ApiError

INSTALL = "gru.serving.http_limits.install"
HEADER_BYTES = 64 << 10  # in the path and headers of a request, or between two parts of its body
MAX_HEADERS = 256
MAX_PIPELINED = 16  # requests that a client sends on a connection before the answer to the first
REQUEST_SECONDS = 10.0  # within which the headers of a request must arrive
WRITE_SECONDS = 60.0  # for which a client may read nothing of its answer
LINGER_SECONDS = 5.0  # for which the rest of a refused request is dropped: closed at once, the answer could get lost
MAX_CONNECTIONS = 4096  # per proxy, or half of the files that it may open if that is less
BODY_START_BYTES = 64 << 10  # a request with a larger body is passed on when this much has arrived
# Headers by which a client would change for how long, or whether to the end, Serve executes its request.
SERVE_HEADERS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}


def install() -> list[Middleware]:
    """Make uvicorn in this process use LimitedProtocol. Return the middlewares of Serve's HTTP proxy.

    Called in a proxy. The process may then have as many files open as MAX_CONNECTIONS needs, if the system permits it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * MAX_CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    ray_internals.use_http_protocol(LimitedProtocol)
    return [Middleware(ProxyMiddleware)]


def are_missing(url: str) -> bool:
    """Whether the HTTP server at `url` accepts headers larger than HEADER_BYTES. False if it does not answer."""
    request = urllib.request.Request(f"{url}/-/healthz", headers={"x-padding": "a" * HEADER_BYTES})
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 431
    except OSError:
        return False


def max_connections() -> int:
    """Return how many connections this process accepts."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)


class ProxyMiddleware:
    """Passes a request on with headers that Serve can read, when its body or the first part of a large one has arrived.

    So a slow client does not take one of the places that Serve has for requests. It gets a 408 after BODY_SECONDS.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"] = readable_headers(scope["headers"])
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and len(body) < BODY_START_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message["body"]
                    more = message["more_body"]
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, replay(bytes(body), receive, more), send)


def readable_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers for Serve.

    Serve decodes some headers as UTF-8, and answers 500 if that fails: those in Latin-1 become UTF-8 here. A malformed
    request id is left out, so that Serve makes one, which is in the answer and in the access log.
    """
    readable = []
    for name, value in headers:
        if name in SERVE_HEADERS or (name == b"x-request-id" and not REQUEST_ID.fullmatch(value.decode("latin-1"))):
            continue
        try:
            value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1").encode()
        readable.append((name, value))
    return readable


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's connection of a client, with limits. A request that exceeds one is refused, and the connection closed.

    A connection is idle while no request of it has arrived with all its headers. If there are too many connections, the
    one that has been idle for longest is closed; if none is idle, the new one is refused.
    """

    _idle: ClassVar[dict["LimitedProtocol", None]] = {}  # of this process, those idle for longest first

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_bytes = 0  # of the current request
        self._unparsed_bytes = 0  # since the parser last found the end of something
        self._problem: ApiError | None = None  # why the request is refused
        self._refused = False
        self._running: Any = None  # the request that is being answered; `cycle` is the last that has arrived
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle[self] = None
        self._start_timer(REQUEST_SECONDS)
        if len(self.connections) > max_connections():
            longest = next(iter(self._idle))
            if longest is self:
                self._refuse(ApiError(503, "too many connections", code="overloaded"))
            else:
                self._idle.pop(longest)
                longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        for timer in (self._timer, self._write_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self in self._idle and self._timer is None:
            unread = self.cycle is not None and self.cycle.more_body  # the rest of a request that has its answer
            self._start_timer(BODY_SECONDS if unread else REQUEST_SECONDS)
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > HEADER_BYTES and not self._refused:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._problem = ApiError(429, f"more than {MAX_PIPELINED} requests wait on this connection")
            raise self._problem
        self._idle.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if not self.pipeline:
            self._idle[self] = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _watch_writing(self, before: float) -> None:
        """Close the connection if its client has read nothing since `before` bytes were unsent."""
        unsent = self.transport.get_write_buffer_size()
        if unsent >= before:
            self.transport.abort()
        else:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self._watch_writing, unsent)

    def _should_upgrade(self) -> bool:
        return False  # the endpoint has no WebSockets

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser has rejected."""
        self._refuse(self._problem or ApiError(400, "this is not a request of HTTP/1.1"))

    def _count(self, size: int) -> None:
        """Count bytes of a header, or of a trailer."""
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            self._problem = _too_large()
            raise self._problem

    def _start_timer(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        """Close a connection whose request did not arrive in time, or that lingered."""
        if self._refused or not self._unparsed_bytes or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._refuse(ApiError(408, f"the headers did not arrive within {REQUEST_SECONDS:.0f} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error if no answer has begun, and close the connection after LINGER_SECONDS at most."""
        self._refused = True
        self._idle[self] = None
        if not self.pipeline and (
            self.cycle is None or self.cycle.response_complete or not self.cycle.response_started
        ):
            response = error.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(response.body))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.pipeline or not self.transport.can_write_eof():  # an answer is being written, or this is TLS
            self.transport.close()
            return
        self.flow.resume_reading()
        self.transport.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._start_timer(LINGER_SECONDS)


def _too_large() -> ApiError:
    return ApiError(431, f"the headers of a request may have at most {HEADER_BYTES:,} bytes and {MAX_HEADERS} lines")
