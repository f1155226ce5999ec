"""The OpenAI-compatible HTTP interface of an engine: a FastAPI app. It knows neither Ray nor the registry.

Reference: https://platform.openai.com/docs/api-reference/completions. What can be ignored without changing the
text is ignored; what cannot is refused.
"""

import asyncio
import json
import math
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gru.serving.engine import Closed, Engine, Finish, Overloaded, Receiver
from gru.serving.engine import Request as EngineRequest
from gru.serving.sampling import SamplingParams, choice_seed
from gru.serving.text import TextStream

if TYPE_CHECKING:
    from gru.registry import Bundle, Version

CHUNK_SECONDS = 0.05  # between two chunks of a stream: each costs the proxies more than the token costs us
STALL_SECONDS = 30  # an engine that has not turned for so long is ill
MAX_PROMPT = 1_000_000  # characters
UNSUPPORTED = ("suffix", "logprobs", "logit_bias", "presence_penalty", "frequency_penalty")
EXPECTED = {
    "prompt": "expected a string or a list of strings, not token ids",
    "stop": "expected a string or a list of at most 16 strings, each of 1 to 256 characters",
}

StopString = Annotated[str, Field(min_length=1, max_length=256)]


@dataclass(frozen=True)
class Served:
    """The model that answers now."""

    engine: Engine
    bundle: "Bundle"
    version: "Version"

    @property
    def healthy(self) -> bool:
        return time.monotonic() - self.engine.heartbeat < STALL_SECONDS


Provider = Callable[[], Served | None]


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt: str | Annotated[list[str], Field(min_length=1)]
    model: str | None = None
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=128)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        """OpenAI's clients send null for the default."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class ApiError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        self.status = status
        self.content = {
            "error": {
                "message": message,
                "type": kind.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.content, self.status, headers)


def create_app(provider: Provider, max_tokens: int, settings: str = "") -> FastAPI:
    """The app; each request goes to the model that `provider` returns when it arrives. `settings` names the
    configuration that it runs with, and is shown with the model."""
    app = FastAPI(title="GRU text generation")
    relays: dict[str, Relay] = {}

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(Closed)
    async def refuse_closed(request: Request, error: Closed) -> Response:
        return failure(error).response()

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
        message = EXPECTED.get(param or "", first["msg"])
        return ApiError(400, f"{param}: {message}" if param else message, param).response()

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error").response()

    def current() -> Served:
        served = provider()
        if served is None:
            raise ApiError(503, "no model is loaded yet", code="no_model")
        return served

    @app.get("/health")
    async def health() -> Response:
        served = current()
        if not served.healthy:
            raise ApiError(503, "the engine does not respond", code="unhealthy")
        return JSONResponse({"status": "ok", "active": served.engine.active, "waiting": served.engine.waiting})

    @app.get("/v1/models")
    async def models() -> Response:
        served = provider()
        return JSONResponse({"object": "list", "data": [describe(served) | {"settings": settings}] if served else []})

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = current()
        check(body, served, max_tokens)
        loop = asyncio.get_running_loop()
        if "relay" not in relays or relays["relay"].loop is not loop:
            relays["relay"] = Relay(loop)
        try:
            completion = Completion(served, body, relays["relay"])
        except Closed:  # a new model has just taken over
            completion = Completion(current(), body, relays["relay"])
        if body.stream:
            return EventStream(completion, include_usage=body.stream_options.include_usage)
        return await whole(completion, request)

    return app


def describe(served: Served) -> dict[str, Any]:
    version = served.version
    return {
        "id": version.name,
        "object": "model",
        "created": version.created,
        "owned_by": "gru",
        "version": version.version,
        "run_id": version.run_id,
        "bits_per_byte": version.bits_per_byte if math.isfinite(version.bits_per_byte) else None,
        "digest": served.bundle.digest,
    }


def check(body: CompletionRequest, served: Served, max_tokens: int) -> None:
    """What the types cannot tell. Raises ApiError."""
    name = served.version.name
    if body.model not in (None, name, f"{name}:{served.version.version}", f"{name}@champion"):
        message = f"the model {body.model!a} does not exist; {name!a} is served here"
        raise ApiError(404, message, "model", "model_not_found")
    if body.max_tokens > max_tokens:
        raise ApiError(400, f"max_tokens: at most {max_tokens} here", "max_tokens")
    extra = body.model_extra or {}
    for field in UNSUPPORTED:
        if extra.get(field):
            raise ApiError(400, f"{field}: not supported", field, "unsupported_parameter")
    if extra.get("best_of") not in (None, body.n):
        raise ApiError(400, "best_of: not supported", "best_of", "unsupported_parameter")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(prompts) * body.n > served.engine.capacity:
        raise ApiError(400, f"prompts x n: at most {served.engine.capacity} texts in one request", "n")
    for prompt in prompts:
        if len(prompt) > MAX_PROMPT:
            raise ApiError(400, f"prompt: at most {MAX_PROMPT} characters", "prompt")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ApiError(400, "prompt: half of a surrogate pair is not text", "prompt") from None


class Relay:
    """Carries calls from the engine's thread to an event loop: those of a step with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def call(self, function: Callable[[], None]) -> None:
        self._calls.append(function)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._woken = False  # first: a call appended from here on either runs below or wakes again
        while self._calls:
            self._calls.popleft()()


class Choice:
    """One text in the making. Lives on the event loop."""

    def __init__(self, index: int, text: TextStream, unsent: str) -> None:
        self.index = index
        self.unsent = unsent
        self.tokens = 0
        self.finish: Finish | Exception | None = None
        self.sent_finish = False
        self._text = text

    def receive(self, token: int | None, end: Finish | Exception | None) -> None:
        if self.finish is not None:
            return  # made before the engine heard of the stop string
        if token is not None:
            self.tokens += 1
            self.unsent += self._text.feed(token)
        if end is not None:
            self.unsent += self._text.finish()
        self.finish = "stop" if self._text.stopped else end

    def take(self) -> dict[str, Any]:
        """The new part of the text, as OpenAI has it."""
        text, self.unsent, self.sent_finish = self.unsent, "", self.finish is not None
        return {"index": self.index, "text": text, "logprobs": None, "finish_reason": self.finish}


class Completion:
    """One HTTP request: its choices, and when to send what they have."""

    def __init__(self, served: Served, body: CompletionRequest, relay: Relay) -> None:
        """Submits everything. Raises ApiError (429), or Closed."""
        self._engine = served.engine
        self._loop = relay.loop
        self._changed = asyncio.Event()
        self._due = 0.0  # when the next chunk may go
        self._timer: asyncio.TimerHandle | None = None
        self._requests: list[EngineRequest] = []
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.version.name,
            "system_fingerprint": served.bundle.digest,
        }
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        tokenizer = served.bundle.tokenizer
        try:
            for prompt in [body.prompt] if isinstance(body.prompt, str) else body.prompt:
                seed = secrets.randbits(63) if body.seed is None else body.seed
                tokens = tokenizer.encode(prompt).tolist()
                self.prompt_tokens += len(tokens)
                for n in range(body.n):
                    text = TextStream(tokenizer.token_bytes, stops)
                    choice = Choice(len(self.choices), text, prompt if body.echo else "")
                    self.choices.append(choice)
                    params = SamplingParams(choice_seed(seed, n), body.temperature, max(body.top_k, 0), body.top_p)
                    receiver = self._receiver(choice, relay)
                    self._requests.append(self._engine.submit(tokens, params, body.max_tokens, receiver))
        except BaseException as error:
            self.cancel()
            if isinstance(error, Overloaded):
                raise ApiError(429, f"overloaded: {error}; try again later", code="overloaded") from None
            raise

    def cancel(self) -> None:
        for request in self._requests:
            self._engine.cancel(request)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of the texts, up to a stop string; marks of a document's ends not counted."""
        made = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    async def parts(self) -> AsyncIterator[list[dict[str, Any]]]:
        """New parts of choices: at once for the first time, then no more often than CHUNK_SECONDS, except that
        an end does not wait. Raises what ended the engine."""
        while not all(choice.sent_finish for choice in self.choices):
            await self._changed.wait()
            self._changed.clear()
            if self._timer:
                self._timer.cancel()
                self._timer = None
            for choice in self.choices:
                if isinstance(choice.finish, Exception):
                    raise choice.finish
            ready = [c for c in self.choices if c.unsent or (c.finish and not c.sent_finish)]
            if ready:
                self._due = self._loop.time() + CHUNK_SECONDS
                yield [choice.take() for choice in ready]

    def _receiver(self, choice: Choice, relay: Relay) -> Receiver:
        """What the engine's thread calls: it only passes the token on to the event loop."""
        index = len(self._requests)

        def receive(token: int | None, end: Finish | Exception | None) -> None:
            choice.receive(token, end)
            if choice.finish is not None and end is None:  # a stop string
                self._engine.cancel(self._requests[index])
            if choice.finish is not None or self._loop.time() >= self._due:
                self._changed.set()
            elif self._timer is None:
                self._timer = self._loop.call_at(self._due, self._changed.set)

        return lambda token, end: relay.call(lambda: receive(token, end))


async def whole(completion: Completion, request: Request) -> Response:
    """Everything in one answer; a client that leaves ends it."""

    async def collect() -> list[dict[str, Any]]:
        choices: dict[int, dict[str, Any]] = {}
        async for parts in completion.parts():
            for part in parts:
                before = choices.get(part["index"], {"text": ""})["text"]
                choices[part["index"]] = {**part, "text": before + part["text"]}
        return [choices[index] for index in sorted(choices)]

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        try:
            choices = collecting.result()
        except Exception as error:
            raise failure(error) from error
        return JSONResponse({**completion.head, "choices": choices, "usage": completion.usage})
    finally:
        collecting.cancel()
        leaving.cancel()
        completion.cancel()


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends it frees its slots, even before the first event."""

    def __init__(self, completion: Completion, include_usage: bool) -> None:
        self._completion = completion
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(completion, include_usage), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()


async def events(completion: Completion, include_usage: bool) -> AsyncIterator[str]:
    usage = {"usage": None} if include_usage else {}
    try:
        async for parts in completion.parts():
            yield "".join(event({**completion.head, "choices": [part], **usage}) for part in parts)
        if include_usage:
            yield event({**completion.head, "choices": [], "usage": completion.usage})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(failure(error).content)


def event(content: dict[str, Any]) -> str:
    # ASCII, for clients that take U+2028 and the like for the end of a line
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def failure(error: Exception) -> ApiError:
    return ApiError(503 if isinstance(error, Closed) else 500, str(error))
