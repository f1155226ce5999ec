"""The layout of OpenAI's two kinds of responses: completions and chat completions."""

from typing import Any, Protocol

from gru.corpus.tokenizer import Tokenizer
from gru.serving.choices import ChoiceDelta, TokenEntry


class Format(Protocol):
    """The layout of one response."""

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
            "token_logprobs": [entry.logprobs.token for entry in entries],
            "top_logprobs": [
                {spell(tokenizer, token): value for token, value in reversed(entry.logprobs.top)} for entry in entries
            ],
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
        logprobs = {"content": [_entry(tokenizer, entry) for entry in delta.entries], "refusal": None}
        return {
            "index": delta.choice,
            **content,
            "logprobs": logprobs if self._logprobs else None,
            "finish_reason": delta.finish,
        }


def _entry(tokenizer: Tokenizer, entry: TokenEntry) -> dict[str, Any]:
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
