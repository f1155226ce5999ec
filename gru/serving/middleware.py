"""Access control and the access log: the ASGI layer around the HTTP interface.

It knows paths and headers, but no models. Neither a key nor a text is ever logged.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gru.serving.auth import Keys
from gru.serving.protocol import ApiError

if TYPE_CHECKING:
    from gru.serving.metrics import Metrics

PROTECTED_PATHS = ("/v1/", "/metrics", "/tokenize", "/detokenize")  # paths that require a key, if there are keys
BODY_SECONDS = 30.0  # time within which a body must arrive
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLIENT_LEFT = 499  # status in log and metrics when no response was started

log = logging.getLogger("gru.access")


class AccessMiddleware:
    """Checks the API key, reads the body within its size limit, gives the request an id, and logs the request.

    Handlers find in the scope's state: `owner`, of the key; and `log_fields`, a dict for more fields of the log line.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys | None, max_body: int, metrics: "Metrics", adds_request_id: bool = True
    ) -> None:
        self._app, self._keys, self._max_body, self._metrics = app, keys, max_body, metrics
        self._adds_request_id = adds_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        scope.setdefault("state", {}).update(log_fields={}, owner="")
        response = _Response(send, request_id(headers), self._adds_request_id)
        try:
            scope["state"]["owner"] = self._owner(scope, headers)
            body = await read_body(headers, receive, self._max_body)
            await self._app(scope, replay(body, receive), response.send)
        except ApiError as error:
            scope["state"]["log_fields"]["error"] = str(error)
            await error.response()(scope, receive, response.send)
        except Exception:
            response.status = 500
            raise
        finally:
            self._log(scope, response, time.monotonic() - start)

    def _owner(self, scope: Scope, headers: dict[str, str]) -> str:
        """Return the owner of the request's key; "" where none is required. Raises ApiError (401)."""
        if self._keys is None or not scope["path"].startswith(PROTECTED_PATHS):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "an API key is required: Authorization: Bearer KEY", code="missing_api_key")
        found = self._keys.find(key.strip())
        if found is None:
            raise ApiError(401, "this API key is unknown", code="invalid_api_key")
        if found.expired:
            scope["state"]["log_fields"]["owner"] = found.owner
            raise ApiError(401, f"this API key was valid until {found.until}", code="expired_api_key")
        return found.owner

    def _log(self, scope: Scope, response: "_Response", seconds: float) -> None:
        self._metrics.record_request(scope["path"], response.status, seconds)
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": response.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": response.status,
            "seconds": round(seconds, 4),
            "owner": scope["state"]["owner"] or None,
            **scope["state"]["log_fields"],
        }
        log.info(json.dumps(fields))


class _Response:
    """What is sent for one request: adds the request id to the headers, if asked to, and remembers the status."""

    def __init__(self, send: Send, request_id: str, adds_request_id: bool) -> None:
        self.request_id, self._adds_request_id = request_id, adds_request_id
        self.status = CLIENT_LEFT
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._adds_request_id:
                header = (b"x-request-id", self.request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
        await self._send(message)


class JsonLines(logging.Formatter):
    """Formats the access log: a JSON object in each line. Those of requests are JSON already, others are problems."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno == logging.INFO:
            return message
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "problem": message})


def request_id(headers: dict[str, str]) -> str:
    """Return the client's request id if it is well-formed, otherwise a new one."""
    client_id = headers.get("x-request-id", "")
    return client_id if REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex


async def read_body(headers: dict[str, str], receive: Receive, max_bytes: int) -> bytes:
    """Read the whole body. Raises ApiError if it is too large or does not arrive.

    A Content-Length that is too large is refused before the body is read.
    """
    too_large = ApiError(413, f"the body of a request may have at most {max_bytes:,} bytes")
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() not in ("", "identity"):
        raise ApiError(415, f"Content-Encoding: {encoding!a} is not supported: send the body as it is", code="encoding")
    content_length = headers.get("content-length", "0")
    if content_length.isdecimal() and int(content_length[:20]) > max_bytes:
        raise too_large
    parts: list[Any] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the body ended early")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    return b"".join(parts)


def replay(body: bytes, receive: Receive, more: bool = False) -> Receive:
    """Return a `receive` that first returns the body, which was read already; `more`: only its first part."""
    replayed = False

    async def receive_again() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": more}

    return receive_again
