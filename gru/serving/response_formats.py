"""How OpenAI's two kinds of answers are laid out: completions, and chats."""

from typing import Any, Protocol

from gru.corpus.tokenizer import Tokenizer
from gru.serving.choices import ChoiceDelta, TokenEntry


class Format(Protocol):
    prefix: str
    """Of ids."""
    kind: str
    """Of a whole answer."""
    chunk_kind: str
    """Of a part of one."""

    def whole(self, part: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]: ...

    def chunk(self, part: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]: ...


class CompletionFormat:
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def whole(self, part: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        logprobs = self._entries(part.entries, tokenizer) if self._logprobs else None
        return {"index": part.choice, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    chunk = whole

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
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def whole(self, part: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        return self._choice(part, tokenizer, {"message": {"role": "assistant", "content": part.text, "refusal": None}})

    def chunk(self, part: ChoiceDelta, tokenizer: Tokenizer) -> dict[str, Any]:
        role = {} if part.choice in self._begun else {"role": "assistant"}
        self._begun.add(part.choice)
        return self._choice(part, tokenizer, {"delta": {**role, "content": part.text}})

    def _choice(self, part: ChoiceDelta, tokenizer: Tokenizer, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"content": [_token(tokenizer, entry) for entry in part.entries], "refusal": None}
        return {
            "index": part.choice,
            **content,
            "logprobs": logprobs if self._logprobs else None,
            "finish_reason": part.finish,
        }


def _token(tokenizer: Tokenizer, entry: TokenEntry) -> dict[str, Any]:
    top = [_one(tokenizer, token, value) for token, value in entry.logprobs.top]
    return {**_one(tokenizer, entry.token, entry.logprobs.token), "top_logprobs": top}


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": spell(tokenizer, token),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes[token]),
    }


def spell(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; `bytes:\\xe6\\x98` where it is no whole character, and the end of a document by its name."""
    if token == tokenizer.end_of_text:
        return "<|endoftext|>"
    data = tokenizer.token_bytes[token]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
