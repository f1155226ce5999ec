"""Prompts as text and as token ids, and vLLM's routes for a model's tokenizer."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from gru.config import ServeConfig
from gru.corpus.tokenizer import END_OF_TEXT
from gru.serving.choices import Prompt
from gru.serving.loaded_model import LoadedModel, ModelProvider
from gru.serving.model_choice import choose_model
from gru.serving.protocol import ApiError, DetokenizeRequest, PromptRequest, TokenizeRequest, require_text
from gru.serving.response_formats import spell

T = TypeVar("T")

INLINE_CHARACTERS = 20_000  # or token ids, converted on the event loop; more would delay other requests


async def apart(function: Callable[[], T], size: int) -> T:
    """Return the function's result; called in a thread if `size`, of what it converts, is large."""
    return await asyncio.to_thread(function) if size > INLINE_CHARACTERS else function()


async def tokenize(model: LoadedModel, prompt_request: PromptRequest, max_tokens: int) -> list[Prompt]:
    """Return the prompts with their token ids. Raises ApiError if one has more than `max_tokens`."""
    encode = model.bundle.tokenizer.encode

    def prepared(prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(prompt, encode(prompt).tolist())
        return Prompt(decode(model, prompt, prompt_request.param), prompt)

    def encode_all() -> list[Prompt]:
        return [prepared(prompt) for prompt in prompt_request.prompts]

    prompts = await apart(encode_all, sum(map(len, prompt_request.prompts)))
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest > max_tokens:
        param = prompt_request.param
        raise ApiError(400, f"{param}: a prompt has {longest:,} tokens; at most {max_tokens:,}", param)
    return prompts


def decode(model: LoadedModel, tokens: list[int], param: str) -> str:
    """Return the text of token ids. Raises ApiError if one is outside the vocabulary."""
    tokenizer = model.bundle.tokenizer
    if tokens and max(tokens) >= tokenizer.vocab_size:
        raise ApiError(400, f"{param}: token ids must be below {tokenizer.vocab_size}, not {max(tokens)}", param)
    return tokenizer.decode(tokens)


def tokenizer_routes(provider: ModelProvider, config: ServeConfig) -> APIRouter:
    """Return the routes of vLLM for a model's tokenizer, which clients such as lm-eval use."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize_text(body: TokenizeRequest) -> Response:
        model = choose_model(provider(), body.model, config, "")
        require_text(body.prompt, "prompt")
        if body.prompt == END_OF_TEXT:  # alone, where the name of the token is meant; text never becomes it
            tokens = [model.bundle.tokenizer.end_of_text]
        else:
            request = PromptRequest([body.prompt], "prompt", 0, None, [], echo=True)
            request.check_size()
            [(_, tokens)] = await tokenize(model, request, config.max_prompt_tokens)
        spelled = None
        if body.return_token_strs:
            spelled = await apart(lambda: [spell(model.bundle.tokenizer, token) for token in tokens], len(tokens))
        limit = config.max_prompt_tokens
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": spelled})

    @router.post("/detokenize")
    async def detokenize_tokens(body: DetokenizeRequest) -> Response:
        model = choose_model(provider(), body.model, config, "")
        return JSONResponse({"prompt": await apart(lambda: decode(model, body.tokens, "tokens"), len(body.tokens))})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        model = choose_model(provider(), None, config, "")
        tokenizer = model.bundle.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": config.max_prompt_tokens,
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
            }
        )

    return router
