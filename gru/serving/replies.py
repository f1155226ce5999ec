"""The HTTP response of a generation: as one JSON object, or as a stream of server-sent events."""

import asyncio

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gru.serving.choices import api_error
from gru.serving.metrics import Metrics
from gru.serving.middleware import CLIENT_LEFT
from gru.serving.response_formats import Layout


class Reply:
    """A generation with the layout in which one client gets it."""

    def __init__(self, layout: Layout, request: Request, metrics: Metrics) -> None:
        self.layout = layout
        self.generation = layout.generation
        self._log_fields = request.state.log_fields
        self._metrics = metrics
        self._ended = False

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
        return JSONResponse(reply.layout.whole(deltas))
    finally:
        completing.cancel()
        leaving.cancel()
        reply.end()


class EventStream(StreamingResponse):
    """A response of server-sent events. However it ends, even before the first event, it frees its slots."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(reply.layout.events(), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.end()
