"""The HTTP response of a generation: as one JSON object, or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gru.serving.choices import Generation, api_error
from gru.serving.metrics import Metrics
from gru.serving.middleware import CLIENT_LEFT
from gru.serving.protocol import TextRequest
from gru.serving.response_formats import Format


class Reply:
    """A generation with the format in which one client gets it."""

    def __init__(
        self, generation: Generation, format: Format, body: TextRequest, request: Request, metrics: Metrics
    ) -> None:
        self.generation = generation
        self.format = format
        self._session = body.session_id
        self._log_fields = request.state.log_fields
        self._metrics = metrics
        self._ended = False
        version, bundle = generation.model.version, generation.model.bundle
        self._common = {
            "id": f"{format.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": version.name,
            "system_fingerprint": f"{version.version}-{bundle.digest[:16]}",
        }

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every response object of this kind has, without choices and usage."""
        head = {**self._common, "object": kind}
        if self._session:
            head["session"] = {"id": self._session, "resumed_tokens": self.generation.resumed}
        return head

    @property
    def usage(self) -> dict[str, Any]:
        """The number of tokens of the prompts and of the texts, end-of-text tokens not counted."""
        prompt, generated = self.generation.prompt_tokens, self.generation.generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }

    def end(self) -> None:
        """Free the generation's places, count its tokens and add the result to the log line; only the first time."""
        if self._ended:
            return
        self._ended = True
        self.generation.cancel()
        self._metrics.record_generation(self.generation)
        first = self.generation.first_token_seconds
        self._log_fields.update(
            version=self.generation.model.version.version,
            prompt_tokens=self.generation.prompt_tokens,
            made_tokens=self.generation.generated_tokens,
            first_token_seconds=None if first is None else round(first, 4),
            finish=[str(choice.finish) for choice in self.generation.choices],
        )


async def json_response(reply: Reply, request: Request) -> Response:
    """Return the complete generation in one response. If the client leaves, the generation is cancelled."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    completing = asyncio.ensure_future(reply.generation.complete())
    leaving = asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({completing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not completing.done():
            return Response(status_code=CLIENT_LEFT)  # nobody reads it
        try:
            deltas = completing.result()
        except Exception as error:
            raise api_error(error) from error
        tokenizer = reply.generation.model.bundle.tokenizer
        choices = [reply.format.choice(delta, tokenizer) for delta in deltas]
        return JSONResponse({**reply.head(reply.format.kind), "choices": choices, "usage": reply.usage})
    finally:
        completing.cancel()
        leaving.cancel()
        reply.end()


class EventStream(StreamingResponse):
    """A response of server-sent events. However it ends, even before the first event, it frees its slots."""

    def __init__(self, reply: Reply, include_usage: bool) -> None:
        self._reply = reply
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(reply, include_usage), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.end()


async def events(reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    """Yield the events of a generation, as they become due."""
    usage = {"usage": None} if include_usage else {}
    tokenizer = reply.generation.model.bundle.tokenizer
    try:
        async for deltas in reply.generation.deltas():
            head = reply.head(reply.format.chunk_kind)
            chunks = [{**head, "choices": [reply.format.chunk(delta, tokenizer)], **usage} for delta in deltas]
            yield "".join(event(chunk) for chunk in chunks)
        if include_usage:
            yield event({**reply.head(reply.format.chunk_kind), "choices": [], "usage": reply.usage})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(api_error(error).content)


def event(content: dict[str, Any]) -> str:
    """Return one server-sent event. It is ASCII, for clients that take U+2028 and the like for the end of a line."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
