"""OpenAI's Responses API for text: its requests, and the layout of its responses.

A response is a turn of a conversation. The hidden state after it is cached under its id, so that a request with
`previous_response_id` continues without the earlier text, and from any turn more than once. A hidden state cannot be
taken apart: other than at OpenAI, the instructions of earlier turns stay in effect. Each replica has its own cache;
where there are several, clients name the conversation in the header x-session-id, by which Serve routes.

Reference: https://platform.openai.com/docs/api-reference/responses.
"""

import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gru.chat import join_parts, message_end, message_start, render_messages
from gru.generation.request import Finish
from gru.generation.state_cache import CachedState
from gru.serving.choices import ChoiceDelta, Generation, api_error
from gru.serving.protocol import MAX_MESSAGES, ApiError, PromptRequest, TextRequest, require_text

PARTS = ("input_text", "output_text", "text")
ROLES = ("system", "developer", "user", "assistant")
UNSUPPORTED = (
    *("stop", "session_id", "background", "conversation", "prompt", "context_management", "moderation"),
    *("top_logprobs", "max_tokens", "max_completion_tokens", "messages"),
)
MAX_METADATA = 16


class InputMessage(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(description='Text, or [{"type": "input_text", "text": ...}, ...].')


def checked_input(value: Any) -> Any:
    """Return the input with the content of each message as text. Refuse it at its first wrong part."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_MESSAGES:
        raise PydanticCustomError("too_long", "too many items", {"max_length": MAX_MESSAGES})
    return [checked_item(item) for item in value]


def checked_item(item: Any) -> dict[str, Any]:
    """Return a message of the input with its content as text. Raises ValueError."""
    if not isinstance(item, dict) or (item.get("role") not in ROLES and item.get("type", "message") == "message"):
        raise ValueError("expected messages")
    if item.get("type", "message") != "message":
        raise PydanticCustomError("unsupported", "only items of type message are supported, no tools and no references")
    content = item.get("content")
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and part.get("type") not in PARTS:
            raise PydanticCustomError("unsupported", "only parts of type input_text and output_text are supported")
    if content is None:
        raise ValueError("expected content")
    return {"role": item["role"], "content": join_parts(content, PARTS)}


def checked_metadata(value: Any) -> Any:
    """Refuse a long table before its entries are checked."""
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise PydanticCustomError("too_long", "too many entries", {"max_length": MAX_METADATA})
    return value


InputMessages = Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponsesRequest(TextRequest):
    input: Annotated[str | InputMessages, BeforeValidator(checked_input)] = Field(
        description="A text, which is a message of the user, or messages."
    )
    instructions: str = Field("", description="A system message before the input.")
    max_output_tokens: int = Field(256, ge=1)
    previous_response_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    store: bool = Field(True, description="Whether to keep the state, for requests that continue this response.")
    metadata: Annotated[dict[str, str], BeforeValidator(checked_metadata)] = Field({})

    def check(self) -> None:
        """Raise ApiError if a field is not supported and would change the text or the response, or is no text."""
        require_text(self.instructions, "instructions")
        require_text("".join([*self.metadata, *self.metadata.values()]), "metadata")
        fields = {"stop": self.stop, "session_id": self.session_id, **(self.model_extra or {})}
        text, reasoning, include = fields.get("text"), fields.get("reasoning"), fields.get("include")
        refused = {name: "not supported" for name in UNSUPPORTED if fields.get(name)}
        if self.n != 1:
            refused["n"] = "must be 1"
        if (text.get("format") if isinstance(text, dict) else text) not in (None, {"type": "text"}):
            refused["text.format"] = "only the type text is supported"
        if any(value is not None for value in reasoning.values()) if isinstance(reasoning, dict) else reasoning:
            refused["reasoning"] = "not supported"
        if isinstance(include, list) and "message.output_text.logprobs" in include:
            refused["include"] = "message.output_text.logprobs is not supported"
        for name, problem in refused.items():
            raise ApiError(400, f"{name}: {problem} by /v1/responses", name, "unsupported_parameter")

    def prompt_request(self, template: str, previous: CachedState | None) -> PromptRequest:
        """Return the messages as one prompt that ends where the answer begins.

        `previous` is the state that the prompt continues; the message before may still lack its end.
        """
        end = message_end(template)
        messages = [("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages.append(("user", self.input))
        else:
            messages += [(message.role, message.content) for message in self.input]
        text = render_messages(template, messages) + message_start(template, "assistant")
        return PromptRequest(
            prompts=[end + text if previous and not previous.stopped else text],
            param="input",
            max_tokens=self.max_output_tokens,
            top_logprobs=None,
            stops=self.template_stops(end),
            echo=False,
            limit_param="max_output_tokens",
        )


def new_response_id() -> str:
    """Return an id that cannot be guessed."""
    return f"resp_{uuid.uuid4().hex}"


class ResponsesLayout:
    """The layout of a response, whole and as events."""

    def __init__(self, generation: Generation, body: ResponsesRequest, response_id: str) -> None:
        self.generation = generation
        self._message_id = response_id.replace("resp_", "msg_")
        self._numbers = itertools.count()
        version, bundle = generation.model.version, generation.model.bundle
        self._common = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": version.name,
            "system_fingerprint": f"{version.version}-{bundle.digest[:16]}",
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": (body.model_extra or {}).get("tool_choice", "auto"),
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def whole(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        [delta] = deltas
        assert delta.finish is not None
        return self._ended(delta.text, delta.finish)

    async def events(self) -> AsyncIterator[str]:
        text = ""
        finish: Finish | None = None
        try:
            yield self._opening()
            async for deltas in self.generation.deltas():
                for delta in deltas:
                    text += delta.text
                    finish = delta.finish
                    if delta.text:
                        yield self._part_event("output_text.delta", delta=delta.text, logprobs=[])
            assert finish is not None
            yield self._closing(text, finish)
        except Exception as error:
            content = api_error(error).content["error"]
            details = {"code": content["code"] or "server_error", "message": content["message"]}
            output = [self._message("incomplete", text)]
            yield self._event("failed", response=self._response("failed", output, error=details))

    def _opening(self) -> str:
        response = self._response("in_progress", [])
        return (
            self._event("created", response=response)
            + self._event("in_progress", response=response)
            + self._event("output_item.added", output_index=0, item=self._message("in_progress", None))
            + self._part_event("content_part.added", part=output_text(""))
        )

    def _closing(self, text: str, finish: Finish) -> str:
        response = self._ended(text, finish)
        return (
            self._part_event("output_text.done", text=text, logprobs=[])
            + self._part_event("content_part.done", part=output_text(text))
            + self._event("output_item.done", output_index=0, item=response["output"][0])
            + self._event(response["status"], response=response)
        )

    def _event(self, kind: str, **fields: Any) -> str:
        """Return one server-sent event, in ASCII."""
        content = {"type": f"response.{kind}", "sequence_number": next(self._numbers), **fields}
        return f"event: response.{kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"

    def _part_event(self, kind: str, **fields: Any) -> str:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **fields)

    def _ended(self, text: str, finish: Finish) -> dict[str, Any]:
        """Return the response with its whole text."""
        status = "incomplete" if finish == "length" else "completed"
        return self._response(
            status,
            [self._message(status, text)],
            incomplete_details={"reason": "max_output_tokens"} if finish == "length" else None,
            completed_at=int(time.time()) if finish == "stop" else None,
            usage=self._usage(),
        )

    def _response(self, status: str, output: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        absent = dict.fromkeys(("error", "incomplete_details", "completed_at", "usage"))
        return {**self._common, "status": status, "output": output, **absent, **fields}

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [output_text(text)]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _usage(self) -> dict[str, Any]:
        """The number of tokens: the input's include those of the turns before, end-of-text tokens are not counted."""
        generation = self.generation
        read, generated = generation.resumed + generation.prompt_tokens, generation.generated_tokens
        cached = generation.resumed + generation.cached_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + generated,
        }


def output_text(text: str) -> dict[str, Any]:
    """Return the part of a message that holds its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
