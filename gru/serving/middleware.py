"""Who may ask, how much at once, and what is noted of it: the layer around the HTTP interface.

It knows paths and headers, and nothing of models. Neither a key nor a text is ever logged.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gru.serving.auth import Keys
from gru.serving.protocol import ApiError

if TYPE_CHECKING:
    from gru.serving.metrics import Metrics

KEYED = ("/v1/", "/metrics")  # paths that need a key, where there are keys
BODY_SECONDS = 30.0  # in which a body must have arrived
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("gru.access")


class AccessMiddleware:
    """ASGI middleware: checks the key, takes the whole body if it is small enough, names the request, notes what came
    of it. What it finds is in the scope's state: `owner`, and `noted`, which takes what else is to be logged."""

    def __init__(self, app: ASGIApp, keys: Keys | None, max_body: int, metrics: "Metrics") -> None:
        self._app, self._keys, self._max_body, self._metrics = app, keys, max_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        noted: dict[str, Any] = {}
        scope.setdefault("state", {}).update(noted=noted, owner="")
        status = 499  # unless an answer begins

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*message.get("headers", []), *named]}
            await send(message)

        try:
            scope["state"]["owner"] = self._owner(scope["path"], headers)
            body = await self._body(headers, receive)
            await self._app(scope, _replay(body, receive), send_named)
        except ApiError as error:
            await error.response()(scope, receive, send_named)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.monotonic() - began
            self._metrics.answered(scope["path"], status, seconds)
            record = {
                "request": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
                "owner": scope["state"]["owner"] or None,
                **noted,
            }
            log.info(json.dumps(record))

    def _owner(self, path: str, headers: dict[str, str]) -> str:
        if self._keys is None or not path.startswith(KEYED):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="missing_api_key")
        owner = self._keys.owner(key.strip())
        if owner is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        return owner

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """All of it. Raises ApiError if it is too large or does not come; the size is known before it is read, where
        the client says it."""
        too_large = ApiError(413, f"the body of a request has at most {self._max_body:,} bytes here")
        told = headers.get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > self._max_body:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body ended early")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(400, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for an app whose body was taken already."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
