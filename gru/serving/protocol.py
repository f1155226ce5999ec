"""The requests of OpenAI's API as records, and the errors for what is wrong in them. No engine, no transport.

Reference: https://platform.openai.com/docs/api-reference. A field that is not supported is ignored if it cannot change
the text, and refused if it can.
"""

from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from gru.config import ServeConfig

UNSUPPORTED = (
    *("suffix", "tools", "functions", "tool_choice", "function_call", "audio", "prediction"),
    # fields of vLLM's API
    *("min_tokens", "ignore_eos", "stop_token_ids", "include_stop_str_in_output", "prompt_logprobs"),
    *("truncate_prompt_tokens", "use_beam_search", "structured_outputs", "chat_template", "continue_final_message"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
MAX_BIASES = 1024  # tokens in logit_bias
MAX_CHARACTERS = 2_000_000  # in all prompts of a request, before they are tokenized
EXPECTED = {
    "prompt": "expected a string or a list of strings, not token ids",
    "stop": "expected a string or a list of at most 16 strings, each of 1 to 256 characters",
    "messages": "expected a list of {role, content}; role: system, developer, user or assistant; content: text",
}


def bounded(bias: Any) -> Any:
    """Refuse a long table before its entries are checked: each wrong one would become an error of its own."""
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens")
    return bias


StopString = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]


class ApiError(Exception):
    """An error response in OpenAI's layout."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
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
        """Return the HTTP response for this error."""
        headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(self.content, self.status, headers.get(self.status))


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextRequest(BaseModel):
    """The fields that completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(bounded)] = {}
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    session_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        """Drop null values: OpenAI's clients send null for the default."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def bias(self, vocab_size: int) -> dict[int, float]:
        """Return logit_bias by token id. Raises ApiError."""
        for name in self.logit_bias:
            if not (name.isdecimal() and name.isascii() and len(name) < 10 and int(name) < vocab_size):
                raise ApiError(400, f"logit_bias: {name!a}: expected token ids below {vocab_size}", "logit_bias")
        return {int(name): bias for name, bias in self.logit_bias.items()}


class PromptRequest(NamedTuple):
    """What either kind of request asks for: prompts to continue."""

    prompts: list[str]
    param: str
    """Name of the client's field that has the prompts, for error messages."""
    max_tokens: int
    top_logprobs: int | None
    """Number of likeliest tokens to report; None reports no log-probabilities."""
    stops: list[str]
    echo: bool

    def check(self, body: TextRequest, config: ServeConfig) -> None:
        """Raise ApiError for mistakes that can be found before the prompts are tokenized."""
        if sum(map(len, self.prompts)) > MAX_CHARACTERS:
            raise ApiError(400, f"{self.param}: at most {MAX_CHARACTERS:,} characters", self.param)
        for prompt in self.prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ApiError(400, f"{self.param}: a lone surrogate is not valid text", self.param) from None
        if self.max_tokens > config.max_tokens:
            raise ApiError(400, f"max_tokens: at most {config.max_tokens:,}", "max_tokens")
        if not self.max_tokens and not self.echo:
            raise ApiError(400, "max_tokens: 0 requires echo = true", "max_tokens")
        if body.session_id and (len(self.prompts) * body.n > 1 or self.echo):
            raise ApiError(400, "session_id: requires one prompt, n = 1 and echo = false", "session_id")


class CompletionRequest(TextRequest):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    max_tokens: int = Field(16, ge=0)
    logprobs: TopLogprobs | None = None
    echo: bool = False

    def prompt_request(self) -> PromptRequest:
        """Return the prompts to continue."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return PromptRequest(prompts, "prompt", self.max_tokens, self.logprobs, self.stops, self.echo)


def joined(content: Any) -> Any:
    """Join a list of text parts. Raises at the first wrong part: a long list must not become a long list of errors."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError("expected parts of type text")
    return "".join(part["text"] for part in content)


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined)] = Field(
        description='Text, or [{"type": "text", "text": ...}, ...].'
    )


class ChatRequest(TextRequest):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=2048)]
    max_tokens: int = Field(256, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0

    def prompt_request(self, template: str) -> PromptRequest:
        """Return the messages as one prompt that ends where the answer begins. Raises ApiError.

        `template` is described in the configuration: `serve.chat_template`.
        """
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: requires logprobs = true", "top_logprobs")
        before, after = template.split("{content}")
        conversation = "".join(before.replace("{role}", m.role) + m.content + after for m in self.messages)
        return PromptRequest(
            prompts=[conversation + before.replace("{role}", "assistant")],
            param="messages",
            max_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            stops=[*self.stops, *([after] if after else [])],
            echo=False,
        )


def refuse_unsupported(body: TextRequest) -> None:
    """Raise ApiError if the body has a field that is not supported and would change the text."""
    extra = body.model_extra or {}
    for field in UNSUPPORTED:
        if extra.get(field):
            raise ApiError(400, f"{field}: not supported", field, "unsupported_parameter")
    if extra.get("best_of") not in (None, body.n):
        raise ApiError(400, "best_of: not supported", "best_of", "unsupported_parameter")
    if extra.get("response_format") not in (None, {"type": "text"}):
        raise ApiError(400, "response_format: only text is supported", "response_format", "unsupported_parameter")
