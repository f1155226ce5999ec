"""The layout of responses: completions and chat completions."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from gru.corpus.tokenizer import Tokenizer
from gru.serving.choices import ChoiceDelta, Generation, TokenEntry, api_error
from gru.serving.protocol import TextRequest


class Layout(Protocol):
    """What the client gets of a generation: one JSON object, or a stream of server-sent events."""

    generation: Generation

    def whole(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """Return the whole response; `deltas`: each choice as one."""

    def events(self) -> AsyncIterator[str]:
        """Yield the events, as they become due. An error becomes the last one."""


class Format(Protocol):
    """The layout of the choices of one response."""

    id_prefix: str
    """Prefix of the response's id."""
    kind: str
    """Value of `object` in a whole response."""
    chunk_kind: str
    """Value of `object` in a chunk of a stream."""

    def choice(self, delta: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return a complete choice."""

    def chunk(self, delta: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the new part of a choice, for a stream."""


class ChoicesLayout:
    """The layout of completions and chat completions: the choices, each in the format."""

    def __init__(self, generation: Generation, format: Format, body: TextRequest) -> None:
        self.generation = generation
        self._format = format
        self._session = body.session_id
        self._include_usage = body.stream_options.include_usage
        self._tokenizer = generation.model.bundle.tokenizer
        version, bundle = generation.model.version, generation.model.bundle
        self._common = {
            "id": f"{format.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": version.name,
            "system_fingerprint": f"{version.version}-{bundle.digest[:16]}",
        }

    def _head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every response object of this kind has, without choices and usage."""
        head = {**self._common, "object": kind}
        if self._session:
            held = {"held_text": self.generation.held_text} if self.generation.held_text else {}
            head["session"] = {"id": self._session, "resumed_tokens": self.generation.resumed, **held}
        return head

    @property
    def _usage(self) -> dict[str, Any]:
        """The number of tokens of the prompts and of the texts, end-of-text tokens not counted."""
        prompt, generated = self.generation.prompt_tokens, self.generation.generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }

    def whole(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        choices = [self._format.choice(delta, self._tokenizer) for delta in deltas]
        return {**self._head(self._format.kind), "choices": choices, "usage": self._usage}

    async def events(self) -> AsyncIterator[str]:
        usage = {"usage": None} if self._include_usage else {}
        try:
            async for deltas in self.generation.deltas():
                head = self._head(self._format.chunk_kind)
                chunks = [{**head, "choices": [self._format.chunk(each, self._tokenizer)], **usage} for each in deltas]
                yield "".join(event(chunk) for chunk in chunks)
            if self._include_usage:
                yield event({**self._head(self._format.chunk_kind), "choices": [], "usage": self._usage})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(api_error(error).content)


def event(content: dict[str, Any]) -> str:
    """Return one server-sent event. It is ASCII, for clients that take U+2028 and the like for the end of a line."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


class CompletionFormat:
    """The layout of /v1/completions."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def choice(self, delta: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        logprobs = self._entries(delta.entries, tokenizer) if self._logprobs else None
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    chunk = choice

    def _entries(self, entries: list[TokenEntry], tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "tokens": [spell(tokenizer, entry.token) for entry in entries],
            "token_logprobs": [entry.logprobs and entry.logprobs.token for entry in entries],
            "top_logprobs": [_likeliest(tokenizer, entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }


class ChatFormat:
    """The layout of /v1/chat/completions."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._started: set[int] = set()

    def choice(self, delta: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._layout(delta, tokenizer, {"message": message})

    def chunk(self, delta: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        role = {} if delta.choice in self._started else {"role": "assistant"}
        self._started.add(delta.choice)
        return self._layout(delta, tokenizer, {"delta": {**role, "content": delta.text}})

    def _layout(self, delta: ChoiceDelta, tokenizer: Tokenizer, content: dict[str, Any]) -> dict[str, Any]:
        # The entry of the token that ends a text belongs to /v1/completions only.
        entries = [_entry(tokenizer, entry) for entry in delta.entries if entry.token != tokenizer.end_of_text]
        logprobs = {"content": entries, "refusal": None}
        return {
            "index": delta.choice,
            **content,
            "logprobs": logprobs if self._logprobs else None,
            "finish_reason": delta.finish,
        }


def _likeliest(tokenizer: Tokenizer, entry: TokenEntry) -> dict[str, float] | None:
    """Return the likeliest tokens, and the chosen one, which OpenAI adds if it is not among them."""
    if entry.logprobs is None:
        return None
    likeliest = [*entry.logprobs.top, (entry.token, entry.logprobs.token)]
    return {spell(tokenizer, token): value for token, value in reversed(likeliest)}


def _entry(tokenizer: Tokenizer, entry: TokenEntry) -> dict[str, Any]:
    assert entry.logprobs is not None  # only prompts have entries without, and chats echo none
    top = [_token(tokenizer, token, value) for token, value in entry.logprobs.top]
    return {**_token(tokenizer, entry.token, entry.logprobs.token), "top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": spell(tokenizer, token),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes[token]),
    }


def spell(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text: `bytes:\\xe6\\x98` if it is not whole characters, `<|endoftext|>` at a document's end."""
    if token == tokenizer.end_of_text:
        return "<|endoftext|>"
    data = tokenizer.token_bytes[token]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
