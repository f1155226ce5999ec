"""A generation as one client is told of it: whole, or in server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gru.serving.choices import Generation, failure
from gru.serving.metrics import Metrics
from gru.serving.protocol import TextRequest
from gru.serving.response_formats import Format


class Reply:
    """A generation as one client is to be told of it."""

    def __init__(
        self, generation: Generation, made: Format, body: TextRequest, request: Request, metrics: Metrics
    ) -> None:
        self.generation = generation
        self.made = made
        self._session = body.session_id
        self._noted = request.state.noted
        self._metrics = metrics
        self._over = False
        version, bundle = generation.served.version, generation.served.bundle
        self._fixed = {
            "id": f"{made.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": version.name,
            "system_fingerprint": f"{version.version}-{bundle.digest[:16]}",
        }

    def head(self, kind: str) -> dict[str, Any]:
        head = {**self._fixed, "object": kind}
        if self._session:
            head["session"] = {"id": self._session, "resumed_tokens": self.generation.resumed}
        return head

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts and of the texts; marks of a document's ends not counted."""
        prompt, made = self.generation.prompt_tokens, self.generation.made_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }

    def end(self) -> None:
        """Free its places, and note what came of it; once."""
        if self._over:
            return
        self._over = True
        self.generation.cancel()
        self._metrics.generated(self.generation)
        first = self.generation.first
        self._noted.update(
            version=self.generation.served.version.version,
            prompt_tokens=self.generation.prompt_tokens,
            made_tokens=self.generation.made_tokens,
            first_token_seconds=None if first is None else round(first, 4),
            finish=[str(choice.finish) for choice in self.generation.choices],
        )


async def whole(reply: Reply, request: Request) -> Response:
    """Everything in one answer; a client that leaves ends it."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(reply.generation.whole()), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        try:
            parts = collecting.result()
        except Exception as error:
            raise failure(error) from error
        tokenizer = reply.generation.served.bundle.tokenizer
        choices = [reply.made.whole(part, tokenizer) for part in parts]
        return JSONResponse({**reply.head(reply.made.kind), "choices": choices, "usage": reply.usage})
    finally:
        collecting.cancel()
        leaving.cancel()
        reply.end()


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends it frees its slots, even before the first event."""

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
    usage = {"usage": None} if include_usage else {}
    tokenizer = reply.generation.served.bundle.tokenizer
    try:
        async for parts in reply.generation.parts():
            head = reply.head(reply.made.chunk_kind)
            yield "".join(event({**head, "choices": [reply.made.chunk(p, tokenizer)], **usage}) for p in parts)
        if include_usage:
            yield event({**reply.head(reply.made.chunk_kind), "choices": [], "usage": reply.usage})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(failure(error).content)


def event(content: dict[str, Any]) -> str:
    # ASCII, for clients that take U+2028 and the like for the end of a line
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
