"""The OpenAI-compatible HTTP interface, as a FastAPI app. It knows neither Ray nor the registry.

Reference: https://platform.openai.com/docs/api-reference.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gru.config import ServeConfig
from gru.config_fields import CHAT_TEMPLATE
from gru.corpus.tokenizer import Tokenizer
from gru.generation.engine import Closed
from gru.generation.request import Turn
from gru.generation.sampling import SamplingParams
from gru.generation.state_cache import CachedState
from gru.serving import playground
from gru.serving.auth import Keys
from gru.serving.choices import Generation, GenerationSpec, LoopBridge, api_error
from gru.serving.loaded_model import LoadedModel, ModelProvider
from gru.serving.metrics import Metrics
from gru.serving.middleware import AccessMiddleware
from gru.serving.model_choice import choose_model, choose_previous, describe
from gru.serving.protocol import (
    EXPECTED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    PromptRequest,
    TextRequest,
    refuse_unsupported,
)
from gru.serving.replies import EventStream, Reply, json_response
from gru.serving.response_formats import ChatFormat, ChoicesLayout, CompletionFormat, Layout
from gru.serving.responses_api import ResponsesLayout, ResponsesRequest, new_response_id
from gru.serving.tokenization import tokenize, tokenizer_routes

MAX_LOGPROBS = 100_000  # in one response; they take seconds to compute and tens of megabytes


def create_app(
    provider: ModelProvider,
    config: ServeConfig,
    metrics: Metrics | None = None,
    settings: str = "",
    adds_request_id: bool = True,
) -> FastAPI:
    """Create the app. `provider` returns the models that serve now: the first is the default, and the one with the
    canary's alias gets the canary's share. `settings` is a key of the deployment's settings, shown by /ready.
    `adds_request_id`: whether answers get the header x-request-id here; Serve's proxy adds it by itself."""
    app = FastAPI(title="GRU text generation", docs_url=None, redoc_url=None)  # their pages load from other sites
    metrics = metrics or Metrics(provider, "")
    keys = Keys(config.keys) if config.keys else None
    app.add_middleware(
        AccessMiddleware,
        keys=keys,
        max_body=config.max_body_bytes,
        metrics=metrics,
        adds_request_id=adds_request_id,
    )
    if config.cors_origins:  # outside access control: a browser's preflight has no key, and reads refusals, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    playground.add_to(app)
    add_error_handlers(app)
    app.include_router(monitoring_routes(provider, metrics, settings))
    app.include_router(model_routes(provider, config))
    app.include_router(tokenizer_routes(provider, config))
    app.include_router(generation_routes(TextGenerator(provider, config, metrics), config))
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's layout."""

    def refused(request: Request, error: ApiError) -> Response:
        request.state.log_fields["error"] = str(error)
        return error.response()

    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, error: ApiError) -> Response:
        return refused(request, error)

    @app.exception_handler(Closed)
    async def handle_closed(request: Request, error: Closed) -> Response:
        return refused(request, api_error(error))

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
        return refused(request, ApiError(400, explain(first, param, request), param))

    @app.exception_handler(HTTPException)
    async def handle_no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 400:  # FastAPI could not parse the body
            message = "the body cannot be read as JSON: send a JSON object in UTF-8, not too deeply nested"
        return refused(request, ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def handle_failure(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error").response()


def explain(error: dict[str, Any], param: str | None, request: Request) -> str:
    """Return one of the validator's errors in words: the field and what to send."""
    if param is None:
        content_type = request.headers.get("content-type", "")
        if error["type"] == "missing":
            return "the body is empty: send a JSON object"
        if not content_type.startswith("application/json"):
            return f"Content-Type is {content_type or 'absent'}: send a JSON object with Content-Type: application/json"
        return f"the body is not a JSON object: {error['ctx']['error'] if 'ctx' in error else error['msg']}"
    if error["type"] == "missing":
        field = error["loc"][-1]
        problem = "required" if field == param else f"{field!a} is missing"
        return f"{param}: {problem}; {EXPECTED.get(param, 'see /openapi.json')}"
    if error["type"] == "unsupported":
        return f"{param}: {error['msg']}"
    if error["type"] == "too_long":
        return f"{param}: at most {error['ctx']['max_length']:,} are allowed"
    return f"{param}: {EXPECTED.get(param, error['msg'])}"


def monitoring_routes(provider: ModelProvider, metrics: Metrics, settings: str) -> APIRouter:
    """Return the routes /health, /ready and /metrics."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """Liveness: 503 if the engine has stalled and this replica should be restarted."""
        if not all(model.healthy for model in provider()[:1]):
            raise ApiError(503, "the engine does not respond", code="unhealthy")
        return JSONResponse({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
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
        """The metrics of all replicas, for Prometheus; the label `replica` tells them apart."""
        return Response(await metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

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
    template = config.chat_template or CHAT_TEMPLATE

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        format = CompletionFormat(body.logprobs is not None)
        return await generator.respond(
            body, body.prompt_request(), lambda generation: ChoicesLayout(generation, format, body), request
        )

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        format = ChatFormat(body.logprobs)
        prompt_request = body.prompt_request(template)
        return await generator.respond(
            body, prompt_request, lambda generation: ChoicesLayout(generation, format, body), request
        )

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        body.check()
        response_id = new_response_id()
        turn = Turn(body.previous_response_id, response_id if body.store else None)
        prompt_request = body.prompt_request(template, generator.previous_state(body, turn, request))
        return await generator.respond(
            body, prompt_request, lambda generation: ResponsesLayout(generation, body, response_id), request, turn
        )

    return router


class TextGenerator:
    """Generates the responses to requests for text."""

    def __init__(self, provider: ModelProvider, config: ServeConfig, metrics: Metrics) -> None:
        self._provider, self._config, self._metrics = provider, config, metrics
        self._bridges: dict[asyncio.AbstractEventLoop, LoopBridge] = {}

    async def respond(
        self,
        body: TextRequest,
        prompt_request: PromptRequest,
        layout: Callable[[Generation], Layout],
        request: Request,
        turn: Turn | None = None,
    ) -> Response:
        """Choose a model, start the generation and return its response. Raises ApiError, or Closed."""
        deadline = time.monotonic() + self._config.request_seconds
        refuse_unsupported(body)
        prompt_request.check(body, self._config)
        while True:
            model = self._choose(body, turn, request)
            spec = GenerationSpec(
                prompts=await tokenize(model, prompt_request, self._config.max_prompt_tokens),
                params=sampling_params(body, prompt_request.max_tokens, model.bundle.tokenizer),
                seeded=body.seed is not None,
                n=body.n,
                max_tokens=prompt_request.max_tokens,
                stops=prompt_request.stops,
                min_tokens=body.min_tokens,
                echo=prompt_request.echo,
                top_logprobs=prompt_request.top_logprobs,
                deadline=deadline,
                owner=request.state.owner,
                session=body.session_id,
                turn=turn,
            )
            refuse_too_large(spec, model)
            try:
                generation = Generation(model, spec, self._bridge())
                break
            except Closed:
                if model in self._provider():
                    raise
                # else a new model has just replaced this one: try again with that
        reply = Reply(layout(generation), request, self._metrics)
        return EventStream(reply) if body.stream else await json_response(reply, request)

    def _choose(self, body: TextRequest, turn: Turn | None, request: Request) -> LoadedModel:
        models, owner = self._provider(), request.state.owner
        if turn and turn.previous:
            return choose_previous(models, body.model, self._config, owner, turn.previous)[0]
        sticky = body.session_id or request.headers.get("x-session-id") or body.user
        if sticky is None and body.seed is not None:
            sticky = f"seed {body.seed}"  # one text for one seed, so always the same model
        return choose_model(models, body.model, self._config, sticky)

    def previous_state(self, body: TextRequest, turn: Turn, request: Request) -> CachedState | None:
        """Return the state that the turn continues, or None if it begins a conversation. Raises ApiError."""
        if turn.previous is None:
            return None
        return choose_previous(self._provider(), body.model, self._config, request.state.owner, turn.previous)[1]

    def _bridge(self) -> LoopBridge:
        loop = asyncio.get_running_loop()
        return self._bridges.setdefault(loop, LoopBridge(loop))


def sampling_params(body: TextRequest, max_tokens: int, tokenizer: Tokenizer) -> SamplingParams:
    """Return the request's sampling parameters. Raises ApiError."""
    return SamplingParams(
        seed=body.seed or 0,
        temperature=body.temperature if body.top_p else 0.0,
        top_k=max(body.top_k, 0),
        top_p=body.top_p or 1.0,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.bias(tokenizer.vocab_size),
        min_tokens=max_tokens if body.ignore_eos else min(body.min_tokens, max_tokens),
        end_of_text=tokenizer.end_of_text,
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
