"""/v1/responses through a real server and OpenAI's own client."""

import json
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.gru.serving.server import Server

GREEDY: dict[str, Any] = {"model": "poet", "temperature": 0}


def refused(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.post("responses", **{"model": "poet", "input": "x", **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_response_is_the_answer_in_a_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    chat = client.chat.completions.create(messages=messages, max_tokens=50, **GREEDY)
    response = client.responses.create(instructions="Be brief.", input="Who?", max_output_tokens=50, **GREEDY)
    assert response.output_text == chat.choices[0].message.content != ""
    assert (response.status, response.model, response.object) == ("incomplete", "poet", "response")
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete" and response.instructions == "Be brief."  # type: ignore[union-attr]
    usage = response.usage
    assert usage and (usage.input_tokens, usage.output_tokens) == (
        len("system: Be brief.\nuser: Who?\nassistant: "),
        50,
    )
    parts: Any = [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Wh"}, {"type": "input_text", "text": "o?"}]},
    ]
    as_parts = client.responses.create(input=parts, max_output_tokens=50, **GREEDY)
    messages[0]["role"] = "developer"
    chat = client.chat.completions.create(messages=messages, max_tokens=50, **GREEDY)
    assert as_parts.output_text == chat.choices[0].message.content


def test_the_clients_defaults_work(client: openai.OpenAI) -> None:
    response = client.responses.create(model="poet", input="Hello")
    assert response.output_text and response.id.startswith("resp_") and response.store  # type: ignore[attr-defined]
    follow: Any = [{"role": "user", "content": "Hello"}, *response.output, {"role": "user", "content": "More"}]
    assert client.responses.create(model="poet", input=follow, metadata={"a": "b"}).metadata == {"a": "b"}


@pytest.mark.parametrize("end", ["length", "stop"])
def test_the_events_of_a_stream(server: Server, client: openai.OpenAI, end: str) -> None:
    bias = {"10": 100} if end == "stop" else {"10": -100}  # the newline that ends a message
    fields: Any = {"input": "x", "max_output_tokens": 30, "extra_body": {"logit_bias": bias}, **GREEDY}
    whole = client.responses.create(**fields)
    server.model.pause = 0.005
    events = list(client.responses.create(stream=True, **fields))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    status = "incomplete" if end == "length" else "completed"
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", status),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == last.response.output_text == whole.output_text and (deltas > 1) == (end == "length")
    assert (last.response.status, last.response.usage) == (status, whole.usage) and whole.status == status
    assert events[0].response.status == "in_progress" and events[0].response.id == last.response.id  # type: ignore[union-attr]
    for event in events:  # all fields that the client's types require are there
        type(event).model_validate(event.to_dict())
    server.model.pause = 0
    with client.responses.stream(**fields) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert snapshots[-1:] == ([text] if text else [])
        if end == "stop":
            assert stream.get_final_response().status == "completed"


@pytest.mark.parametrize("end", ["length", "stop", "document"])
def test_a_conversation_continues_as_if_it_had_been_sent_whole(server: Server, client: openai.OpenAI, end: str) -> None:
    newline = {"stop": 100, "document": -100, "length": -100}[end]
    limited: Any = {"max_output_tokens": 12, "extra_body": {"logit_bias": {"10": newline}}, **GREEDY}
    bias, end_of_text = server.bundle.model.output_bias, server.bundle.tokenizer.end_of_text
    with torch.no_grad():
        bias[end_of_text] = 100 if end == "document" else -5
    try:
        first = client.responses.create(input="One", **limited)
    finally:
        with torch.no_grad():
            bias[end_of_text] = -5
    assert first.status == ("incomplete" if end == "length" else "completed")
    free: Any = {"max_output_tokens": 40, "extra_body": {"logit_bias": {"10": -100}}, **GREEDY}
    turns: Any = [{"role": "user", "content": "One"}, {"role": "assistant", "content": first.output_text}]
    whole = client.responses.create(input=[*turns, {"role": "user", "content": "Two"}], **free)
    second = client.responses.create(input="Two", previous_response_id=first.id, **free)
    assert second.output_text == whole.output_text != "" and second.previous_response_id == first.id
    again = client.responses.create(input="Two", previous_response_id=first.id, store=False, **free)
    assert again.output_text == second.output_text  # the first turn's state is still the first's
    assert second.usage and whole.usage and second.usage.input_tokens_details.cached_tokens > 0
    assert second.usage.input_tokens - whole.usage.input_tokens == (1 if end == "document" else 0)
    third = client.responses.create(input="", previous_response_id=second.id, **free)
    assert third.usage and third.usage.input_tokens > second.usage.total_tokens
    with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
        client.responses.create(input="Three", previous_response_id=again.id, **free)  # store=False


def test_a_response_whose_state_is_gone_cannot_be_continued(server: Server, client: openai.OpenAI) -> None:
    first = client.responses.create(model="poet", input="One")
    for fields in ({"previous_response_id": "resp_1"}, {"previous_response_id": first.id, "stream": True}):
        server.engine.forget_sessions()
        error = refused(server, **fields)
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
        assert "send the whole conversation" in error["message"] and server.engine.active == 0
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_conversation_stays_with_the_model_that_has_its_state(server: Server, client: openai.OpenAI) -> None:
    server.new_engine("4", alias="challenger")  # a canary with half of the requests
    for name in ("poet", "poet@challenger"):
        first = client.responses.create(model=name, input="One", max_output_tokens=3)
        chain = [client.responses.create(model="poet", input="x", previous_response_id=first.id) for _ in range(6)]
        [version] = {each.to_dict()["system_fingerprint"] for each in [first, *chain]}
    assert str(version).startswith("4-")
    with pytest.raises(openai.BadRequestError, match="not cached"):
        client.responses.create(model="poet:3", input="x", previous_response_id=first.id)
    server.models[1].engine.close()


def test_a_failure_is_an_event(server: Server, client: openai.OpenAI) -> None:
    server.model.pause = 0.002
    stream = client.responses.create(model="poet", input="x", max_output_tokens=100_000, stream=True)
    for event in stream:
        server.model.failing = server.model.failing or event.type == "response.output_text.delta"
    assert event.type == "response.failed" and event.response.error is not None
    assert event.response.error.code == "server_error" and "generation failed" in event.response.error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5] * 100_000}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 3000}, "input"),
        ({"input": [{"role": "pope", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input"),
        ({"input": [{"type": [], "role": []}]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"instructions": "\ud800"}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_001}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 2}, "n"),
        ({"stop": "x"}, "stop"),
        ({"session_id": "x"}, "session_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata"),
        ({"previous_response_id": "\ud800"}, "previous_response_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "poet", "input": "x", **fields}).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/responses", content=body, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and param in error["message"], answer.text
    assert server.engine.active == 0 and len(error["message"]) < 250


def test_fields_without_an_effect_are_accepted(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="poet",
        input="x",
        tools=[],
        tool_choice="none",
        reasoning={"effort": None},
        text={"format": {"type": "text"}},
        truncation="auto",
        include=["reasoning.encrypted_content"],
        parallel_tool_calls=False,
        user="u",
        prompt_cache_key="k",
        service_tier="auto",
    )
    assert response.output_text and response.tool_choice == "none"
