"""The OpenAI-compatible HTTP interface of the models that answer: a FastAPI app. It knows neither Ray nor the registry.

Reference: https://platform.openai.com/docs/api-reference.
"""

import asyncio
import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gru.config import ServeConfig
from gru.generation.engine import Closed
from gru.generation.sampling import SamplingParams
from gru.serving import playground
from gru.serving.auth import Keys
from gru.serving.choices import Generation, GenerationSpec, LoopBridge, Prompt, failure
from gru.serving.loaded_model import LoadedModel
from gru.serving.metrics import Metrics
from gru.serving.middleware import AccessMiddleware
from gru.serving.protocol import (
    EXPECTED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    PromptRequest,
    TextRequest,
    refuse_unsupported,
)
from gru.serving.response_formats import ChatFormat, CompletionFormat, Format
from gru.serving.responses import EventStream, Reply, whole

MAX_LOGPROBS = 100_000  # seconds of work, and tens of megabytes
AT_ONCE = 20_000  # characters that are tokenized at once; more would hold up the other requests

ModelProvider = Callable[[], Sequence[LoadedModel]]


def create_app(
    provider: ModelProvider, config: ServeConfig, metrics: Metrics | None = None, settings: str = ""
) -> FastAPI:
    """The app. `provider` returns the models that answer now: the first is the one that requests go to which name no
    other; the canary's share goes to the one with its alias. `settings` names what it was deployed with."""
    app = FastAPI(title="GRU text generation", docs_url=None, redoc_url=None)  # their pages come from elsewhere
    metrics = metrics or Metrics(provider, "")
    keys = Keys(config.keys) if config.keys else None
    app.add_middleware(AccessMiddleware, keys=keys, max_body=config.max_body_bytes, metrics=metrics)
    answers = Answers(provider, config, metrics)
    playground.add_to(app)

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

    @app.get("/health")
    async def health() -> Response:
        """Whether this replica should go on living."""
        if not all(served.healthy for served in provider()[:1]):
            raise ApiError(503, "the engine does not respond", code="unhealthy")
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether it can answer, with what."""
        models = provider()
        if not models:
            raise ApiError(503, "no model is loaded yet", code="no_model")
        if not models[0].healthy:
            raise ApiError(503, "the engine does not respond", code="unhealthy")
        version = models[0].version
        told = {"status": "ready", "model": version.name, "version": version.version, "settings": settings}
        return JSONResponse({**told, "requests": sum(each.engine.active + each.engine.waiting for each in models)})

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [describe(served) for served in provider()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        served = provider()
        first = bool(served) and name == served[0].version.name  # not the canary now and then
        return JSONResponse(describe(served[0] if first else choose(served, name, config, None)))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answers.to(body, body.asked(), CompletionFormat(body.logprobs is not None), request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await answers.to(body, body.asked(config.chat_template), ChatFormat(body.logprobs), request)

    return app


class Answers:
    """What the models say to requests for text."""

    def __init__(self, provider: ModelProvider, config: ServeConfig, metrics: Metrics) -> None:
        self._provider, self._config, self._metrics = provider, config, metrics
        self._relays: dict[asyncio.AbstractEventLoop, LoopBridge] = {}

    async def to(self, body: TextRequest, asked: PromptRequest, made: Format, request: Request) -> Response:
        """Raises ApiError, or Closed."""
        until = time.monotonic() + self._config.request_seconds
        refuse_unsupported(body)
        asked.refuse(body, self._config)
        sticky = body.session_id or request.headers.get("x-session-id") or body.user
        while True:
            served = choose(self._provider(), body.model, self._config, sticky)
            order = GenerationSpec(
                prompts=await tokenize(served, asked, self._config.max_prompt_tokens),
                params=sampling_params(body, served.bundle.tokenizer.vocab_size),
                seeded=body.seed is not None,
                n=body.n,
                max_tokens=asked.max_tokens,
                stops=asked.stops,
                echo=asked.echo,
                top_logprobs=asked.top_logprobs,
                deadline=until,
                owner=request.state.owner,
                session=body.session_id,
            )
            refuse_what_never_fits(order, served)
            try:
                generation = Generation(served, order, self._relay())
                break
            except Closed:
                if served in self._provider():
                    raise
                # else a new model has just taken over
        reply = Reply(generation, made, body, request, self._metrics)
        if body.stream:
            return EventStream(reply, body.stream_options.include_usage)
        return await whole(reply, request)

    def _relay(self) -> LoopBridge:
        loop = asyncio.get_running_loop()
        return self._relays.setdefault(loop, LoopBridge(loop))


def describe(served: LoadedModel) -> dict[str, Any]:
    version = served.version
    return {
        "id": version.name if served.alias == "champion" else f"{version.name}@{served.alias}",
        "object": "model",
        "created": version.created,
        "owned_by": "gru",
        "version": version.version,
        "alias": served.alias,
        "run_id": version.run_id,
        "bits_per_byte": version.bits_per_byte if math.isfinite(version.bits_per_byte) else None,
        "digest": served.bundle.digest,
    }


def choose(models: Sequence[LoadedModel], name: str | None, config: ServeConfig, sticky: str | None) -> LoadedModel:
    """The model that a request goes to: NAME, NAME@ALIAS or NAME:VERSION. Where it names neither, the canary has its
    share, in which `sticky` requests are always or never. Raises ApiError."""
    if not models:
        raise ApiError(503, "no model is loaded yet", code="no_model")
    first = models[0]
    if name in (None, first.version.name):
        canary = next((each for each in models[1:] if each.alias == config.canary.alias and each.healthy), None)
        return canary if canary and fraction_of(sticky) < config.canary.share else first
    for each in models:
        if name in (f"{each.version.name}@{each.alias}", f"{each.version.name}:{each.version.version}"):
            return each
    known = ", ".join(repr(f"{each.version.name}@{each.alias}") for each in models)
    message = f"the model {name!a} does not exist; served here: {first.version.name!r}, {known}"
    raise ApiError(404, message, "model", "model_not_found")


def fraction_of(sticky: str | None) -> float:
    """Between 0 and 1: always the same for the same text, and random without one."""
    if sticky is None:
        return random.random()
    return int.from_bytes(hashlib.blake2b(sticky.encode(errors="replace"), digest_size=8).digest()) / 2**64


async def tokenize(served: LoadedModel, asked: PromptRequest, most: int) -> list[Prompt]:
    """Raises ApiError if one is too long."""
    encode = served.bundle.tokenizer.encode

    def all_of_them() -> list[Prompt]:
        return [Prompt(prompt, encode(prompt).tolist()) for prompt in asked.prompts]

    long = sum(map(len, asked.prompts)) > AT_ONCE
    found = await asyncio.to_thread(all_of_them) if long else all_of_them()
    longest = max(len(prompt.tokens) for prompt in found)
    if longest > most:
        raise ApiError(400, f"{asked.param}: {longest:,} tokens; at most {most:,} here", asked.param)
    return found


def sampling_params(body: TextRequest, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        seed=body.seed or 0,
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.bias(vocab_size),
    )


def refuse_what_never_fits(order: GenerationSpec, served: LoadedModel) -> None:
    engine, texts = served.engine, len(order.prompts) * order.n
    if texts > engine.capacity:
        raise ApiError(400, f"prompts x n: at most {engine.capacity} texts in one request", "n")
    if order.top_logprobs is not None:
        told = order.n * sum(order.max_tokens + order.echo * len(prompt.tokens) for prompt in order.prompts)
        if told * (1 + order.top_logprobs) > MAX_LOGPROBS:
            raise ApiError(400, f"logprobs: {MAX_LOGPROBS:,} at most in one answer", "logprobs")
    tokens = order.n * sum(len(prompt.tokens) + order.max_tokens for prompt in order.prompts)
    if tokens > engine.max_tokens:
        raise ApiError(400, f"prompts and max_tokens, x n: at most {engine.max_tokens:,} tokens here", "max_tokens")
