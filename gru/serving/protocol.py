"""The requests of OpenAI's API as records, and the errors for what is wrong in them. No engine, no transport.

Reference: https://platform.openai.com/docs/api-reference. A field that is not supported is ignored if it cannot change
the text, and refused if it can.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from gru.chat import join_parts, message_end, message_start, render_messages
from gru.config import ServeConfig

UNSUPPORTED = (
    *("suffix", "tools", "functions", "function_call", "audio", "prediction"),
    # fields of vLLM's API
    *("stop_token_ids", "include_stop_str_in_output", "prompt_logprobs"),
    *("truncate_prompt_tokens", "use_beam_search", "structured_outputs", "chat_template", "continue_final_message"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "bad_words", "allowed_token_ids"),
    *("logits_processors", "prompt_embeds"),
)
MAX_BIASES = 1024  # tokens in logit_bias
MAX_CHARACTERS = 2_000_000  # or token ids, in all prompts of a request, before they are tokenized
MAX_PROMPTS = 2048
MAX_MESSAGES = 2048
EXPECTED = {
    "prompt": 'expected a string, a list of token ids, or a list of either, as in {"prompt": "Once upon a time"}',
    "stop": "expected a string or a list of at most 16 strings, each of 1 to 256 characters",
    "messages": "expected a list of {role, content}; role: system, developer, user, assistant or tool; content: text",
    "tokens": "expected a list of token ids",
    "input": "expected a text, or a list of messages {role, content}; role: system, developer, user or assistant; "
    "content: text, or parts of type input_text or output_text",
    "metadata": "expected an object of strings",
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

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = headers or {}
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
        by_status = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
        # A request that took too long would take as long again.
        headers = {} if self.content["error"]["code"] == "timeout" else by_status.get(self.status, {})
        return JSONResponse(self.content, self.status, {**headers, **self.headers})


def previous_not_found() -> ApiError:
    """Return OpenAI's error for a response that cannot be continued."""
    message = (
        "previous_response_id: the state after this response is not cached here, as the model has changed or newer "
        "states have replaced it: send the whole conversation as `input`, without previous_response_id"
    )
    return ApiError(400, message, "previous_response_id", "previous_response_not_found")


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextRequest(BaseModel):
    """The fields that completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=-1)
    top_p: float = Field(1.0, ge=0, le=1, description="0 takes the likeliest token.")
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
    user: Annotated[str, Field(max_length=4096)] | None = None
    ignore_eos: bool = Field(False, description="Never end a text before `max_tokens`, as in vLLM.")
    min_tokens: int = Field(0, ge=0, description="Tokens before which a text does not end, as in vLLM.")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        """Drop null values: OpenAI's clients send null for the default."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def template_stops(self, end: str) -> list[str]:
        """Return the stop strings of a template whose messages end with `end`: with ignore_eos no message ends."""
        return [end] if end and not self.ignore_eos else []

    def bias(self, vocab_size: int) -> dict[int, float]:
        """Return logit_bias by token id. Raises ApiError."""
        for name in self.logit_bias:
            if not (name.isdecimal() and name.isascii() and len(name) < 10 and int(name) < vocab_size):
                raise ApiError(400, f"logit_bias: {name!a}: expected token ids below {vocab_size}", "logit_bias")
        return {int(name): bias for name, bias in self.logit_bias.items()}


class PromptRequest(NamedTuple):
    """What either kind of request asks for: prompts to continue."""

    prompts: Sequence[str | list[int]]
    """Texts, or lists of token ids."""
    param: str
    """Name of the client's field that has the prompts, for error messages."""
    max_tokens: int
    top_logprobs: int | None
    """Number of likeliest tokens to report; None reports no log-probabilities."""
    stops: list[str]
    echo: bool
    limit_param: str = "max_tokens"
    """Name of the client's field that has `max_tokens`."""

    def check_size(self) -> None:
        """Raise ApiError if the prompts are too long to be tokenized."""
        if sum(map(len, self.prompts)) > MAX_CHARACTERS:
            raise ApiError(400, f"{self.param}: at most {MAX_CHARACTERS:,} characters or token ids", self.param)

    def check(self, body: TextRequest, config: ServeConfig) -> None:
        """Raise ApiError for mistakes that can be found before the prompts are tokenized."""
        self.check_size()
        for prompt in self.prompts:
            if isinstance(prompt, str):
                require_text(prompt, self.param)
        if self.max_tokens > config.max_tokens:
            raise ApiError(400, f"{self.limit_param}: at most {config.max_tokens:,}", self.limit_param)
        if not self.max_tokens and not self.echo:
            raise ApiError(400, "max_tokens: 0 requires echo = true", "max_tokens")
        if body.session_id and (len(self.prompts) * body.n > 1 or self.echo):
            raise ApiError(400, "session_id: requires one prompt, n = 1 and echo = false", "session_id")


def require_text(text: str, param: str) -> None:
    """Raise ApiError if the text has a lone surrogate, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param}: a lone surrogate is not valid text", param) from None


def checked_prompt(prompt: Any) -> Any:
    """Refuse what is no prompt at its first wrong part: a long list must not become a long list of errors."""
    if isinstance(prompt, str) or is_token_ids(prompt):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("expected a text or token ids")
    if not isinstance(prompt[0], str | list):  # then it is no list of prompts
        raise ValueError("expected token ids")
    if len(prompt) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", "too many prompts", {"max_length": MAX_PROMPTS})
    if not all(isinstance(each, str) or is_token_ids(each) for each in prompt):
        raise ValueError("expected texts or token ids")
    return prompt


def is_token_ids(prompt: Any) -> bool:
    """Whether it is a list of one or more integers from 0 on."""
    return isinstance(prompt, list) and bool(prompt) and all(type(each) is int and each >= 0 for each in prompt)


def checked_tokens(tokens: Any) -> Any:
    """Refuse what is no list of token ids at its first wrong part."""
    if tokens == [] or is_token_ids(tokens):
        return tokens
    raise ValueError("expected a list of token ids")


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TextsOfIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(TextRequest):
    prompt: Annotated[str | Texts | TokenIds | TextsOfIds, BeforeValidator(checked_prompt)] = Field(
        description="A text, the token ids of one, or a list of either."
    )
    max_tokens: int = Field(16, ge=0)
    logprobs: TopLogprobs | None = None
    echo: bool = False

    def prompt_request(self) -> PromptRequest:
        """Return the prompts to continue."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: Any = [self.prompt] if single else self.prompt
        return PromptRequest(prompts, "prompt", self.max_tokens, self.logprobs, self.stops, self.echo)


class TokenizeRequest(BaseModel):
    """A request to vLLM's /tokenize."""

    model: str | None = None
    prompt: str
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """A request to vLLM's /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], BeforeValidator(checked_tokens)]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(join_parts)] = Field(
        description='Text, or [{"type": "text", "text": ...}, ...].'
    )


class ChatRequest(TextRequest):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
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
        conversation = render_messages(template, ((message.role, message.content) for message in self.messages))
        end = message_end(template)
        return PromptRequest(
            prompts=[conversation + message_start(template, "assistant")],
            param="messages",
            max_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            stops=self.stops + self.template_stops(end),
            echo=False,
        )


def refuse_unsupported(body: TextRequest) -> None:
    """Raise ApiError if the body has a field that is not supported and would change the text."""
    extra = body.model_extra or {}
    for field in UNSUPPORTED:
        if extra.get(field):
            raise ApiError(400, f"{field}: not supported", field, "unsupported_parameter")
    if extra.get("tool_choice") not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice: not supported", "tool_choice", "unsupported_parameter")
    if extra.get("best_of") not in (None, body.n):
        raise ApiError(400, "best_of: not supported", "best_of", "unsupported_parameter")
    if extra.get("response_format") not in (None, {"type": "text"}):
        raise ApiError(400, "response_format: only text is supported", "response_format", "unsupported_parameter")
