"""The OpenAI-compatible HTTP interface, as a FastAPI app. It knows neither Ray nor the registry.

Reference: https://platform.openai.com/docs/api-reference.
"""

import asyncio
import hashlib
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gru.config import ServeConfig
from gru.generation.engine import Closed
from gru.generation.sampling import SamplingParams
from gru.serving import playground
from gru.serving.auth import Keys
from gru.serving.choices import Generation, GenerationSpec, LoopBridge, Prompt, api_error
from gru.serving.loaded_model import LoadedModel, ModelProvider
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
from gru.serving.responses import EventStream, Reply, json_response

MAX_LOGPROBS = 100_000  # in one response; they take seconds to compute and tens of megabytes
INLINE_CHARACTERS = 20_000  # of prompts tokenized on the event loop; more would delay other requests


def create_app(
    provider: ModelProvider, config: ServeConfig, metrics: Metrics | None = None, settings: str = ""
) -> FastAPI:
    """Create the app. `provider` returns the models that serve now: the first is the default, and the one with the
    canary's alias gets the canary's share. `settings` is a key of the deployment's settings, shown by /ready."""
    app = FastAPI(title="GRU text generation", docs_url=None, redoc_url=None)  # their pages load from other sites
    metrics = metrics or Metrics(provider, "")
    keys = Keys(config.keys) if config.keys else None
    app.add_middleware(AccessMiddleware, keys=keys, max_body=config.max_body_bytes, metrics=metrics)
    playground.add_to(app)
    add_error_handlers(app)
    app.include_router(monitoring_routes(provider, metrics, settings))
    app.include_router(model_routes(provider, config))
    app.include_router(generation_routes(TextGenerator(provider, config, metrics), config))
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's layout."""

    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(Closed)
    async def handle_closed(request: Request, error: Closed) -> Response:
        return api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
        message = EXPECTED.get(param or "", first["msg"])
        return ApiError(400, f"{param}: {message}" if param else message, param).response()

    @app.exception_handler(HTTPException)
    async def handle_no_route(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def handle_failure(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error").response()


def monitoring_routes(provider: ModelProvider, metrics: Metrics, settings: str) -> APIRouter:
    """Return the routes /health, /ready and /metrics."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """Liveness: 503 if the engine has stalled and this replica should be restarted."""
        if not all(model.healthy for model in provider()[:1]):
            raise ApiError(503, "the engine does not respond", code="unhealthy")
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Readiness: the model version that this replica serves; 503 if it serves none."""
        models = provider()
        if not models:
            raise ApiError(503, "no model is loaded yet", code="no_model")
        if not models[0].healthy:
            raise ApiError(503, "the engine does not respond", code="unhealthy")
        version = models[0].version
        requests = sum(model.engine.active + model.engine.waiting for model in models)
        return JSONResponse(
            {
                "status": "ready",
                "model": version.name,
                "version": version.version,
                "settings": settings,
                "requests": requests,
            }
        )

    @router.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def model_routes(provider: ModelProvider, config: ServeConfig) -> APIRouter:
    """Return the routes that describe the models."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [describe(model) for model in provider()]})

    @router.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        models = provider()
        is_default = bool(models) and name == models[0].version.name  # never the canary
        return JSONResponse(describe(models[0] if is_default else choose_model(models, name, config, None)))

    return router


def generation_routes(generator: "TextGenerator", config: ServeConfig) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await generator.respond(
            body, body.prompt_request(), CompletionFormat(body.logprobs is not None), request
        )

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await generator.respond(
            body, body.prompt_request(config.chat_template), ChatFormat(body.logprobs), request
        )

    return router


class TextGenerator:
    """Generates the responses to completion and chat requests."""

    def __init__(self, provider: ModelProvider, config: ServeConfig, metrics: Metrics) -> None:
        self._provider, self._config, self._metrics = provider, config, metrics
        self._bridges: dict[asyncio.AbstractEventLoop, LoopBridge] = {}

    async def respond(
        self, body: TextRequest, prompt_request: PromptRequest, format: Format, request: Request
    ) -> Response:
        """Choose a model, start the generation and return its response. Raises ApiError, or Closed."""
        deadline = time.monotonic() + self._config.request_seconds
        refuse_unsupported(body)
        prompt_request.check(body, self._config)
        sticky = body.session_id or request.headers.get("x-session-id") or body.user
        while True:
            model = choose_model(self._provider(), body.model, self._config, sticky)
            spec = GenerationSpec(
                prompts=await tokenize(model, prompt_request, self._config.max_prompt_tokens),
                params=sampling_params(body, model.bundle.tokenizer.vocab_size),
                seeded=body.seed is not None,
                n=body.n,
                max_tokens=prompt_request.max_tokens,
                stops=prompt_request.stops,
                echo=prompt_request.echo,
                top_logprobs=prompt_request.top_logprobs,
                deadline=deadline,
                owner=request.state.owner,
                session=body.session_id,
            )
            refuse_too_large(spec, model)
            try:
                generation = Generation(model, spec, self._bridge())
                break
            except Closed:
                if model in self._provider():
                    raise
                # else a new model has just replaced this one: try again with that
        reply = Reply(generation, format, body, request, self._metrics)
        if body.stream:
            return EventStream(reply, body.stream_options.include_usage)
        return await json_response(reply, request)

    def _bridge(self) -> LoopBridge:
        loop = asyncio.get_running_loop()
        return self._bridges.setdefault(loop, LoopBridge(loop))


def describe(model: LoadedModel) -> dict[str, Any]:
    """Return the model's object of /v1/models."""
    version = model.version
    return {
        "id": version.name if model.alias == "champion" else f"{version.name}@{model.alias}",
        "object": "model",
        "created": version.created,
        "owned_by": "gru",
        "version": version.version,
        "alias": model.alias,
        "run_id": version.run_id,
        "bits_per_byte": version.bits_per_byte if math.isfinite(version.bits_per_byte) else None,
        "digest": model.bundle.digest,
    }


def choose_model(
    models: Sequence[LoadedModel], name: str | None, config: ServeConfig, sticky: str | None
) -> LoadedModel:
    """Return the model for a request that names NAME, NAME@ALIAS, NAME:VERSION or nothing. Raises ApiError.

    Of the requests that give neither alias nor version, the canary gets its share; those with the same `sticky` text
    always go to the same model.
    """
    if not models:
        raise ApiError(503, "no model is loaded yet", code="no_model")
    default = models[0]
    if name in (None, default.version.name):
        canary = next((each for each in models[1:] if each.alias == config.canary.alias and each.healthy), None)
        return canary if canary and fraction_of(sticky) < config.canary.share else default
    for each in models:
        if name in (f"{each.version.name}@{each.alias}", f"{each.version.name}:{each.version.version}"):
            return each
    known = ", ".join(repr(f"{each.version.name}@{each.alias}") for each in models)
    message = f"the model {name!a} does not exist; available models: {default.version.name!r}, {known}"
    raise ApiError(404, message, "model", "model_not_found")


def fraction_of(sticky: str | None) -> float:
    """Return a number from 0 to 1: always the same for the same text, and a random one for None."""
    if sticky is None:
        return random.random()
    return int.from_bytes(hashlib.blake2b(sticky.encode(errors="replace"), digest_size=8).digest()) / 2**64


async def tokenize(model: LoadedModel, prompt_request: PromptRequest, max_tokens: int) -> list[Prompt]:
    """Return the prompts with their token ids. Raises ApiError if one has more than `max_tokens`."""
    encode = model.bundle.tokenizer.encode

    def encode_all() -> list[Prompt]:
        return [Prompt(prompt, encode(prompt).tolist()) for prompt in prompt_request.prompts]

    is_long = sum(map(len, prompt_request.prompts)) > INLINE_CHARACTERS
    prompts = await asyncio.to_thread(encode_all) if is_long else encode_all()
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest > max_tokens:
        param = prompt_request.param
        raise ApiError(400, f"{param}: a prompt has {longest:,} tokens; at most {max_tokens:,}", param)
    return prompts


def sampling_params(body: TextRequest, vocab_size: int) -> SamplingParams:
    """Return the request's sampling parameters. Raises ApiError."""
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


def refuse_too_large(spec: GenerationSpec, model: LoadedModel) -> None:
    """Raise ApiError if the engine could not take the request even when idle."""
    engine, texts = model.engine, len(spec.prompts) * spec.n
    if texts > engine.capacity:
        raise ApiError(400, f"prompts x n: at most {engine.capacity} texts in one request", "n")
    if spec.top_logprobs is not None:
        entries = spec.n * sum(spec.max_tokens + spec.echo * len(prompt.tokens) for prompt in spec.prompts)
        if entries * (1 + spec.top_logprobs) > MAX_LOGPROBS:
            raise ApiError(400, f"logprobs: at most {MAX_LOGPROBS:,} in one response", "logprobs")
    tokens = spec.n * sum(len(prompt.tokens) + spec.max_tokens for prompt in spec.prompts)
    if tokens > engine.max_tokens:
        raise ApiError(400, f"prompts and max_tokens, x n: at most {engine.max_tokens:,} tokens", "max_tokens")
