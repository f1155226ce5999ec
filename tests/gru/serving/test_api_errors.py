"""The HTTP errors for requests that are wrong."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gru.serving import middleware
from tests.gru.serving.server import Server, connection, raw_request


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_001}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 257]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": [[1.5]] * 100_000}, "prompt"),
        ({"prompt": ["x"] * 2049}, "prompt"),
        ({"prompt": [1] * 900_000 + [257]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 1_000_001}, "prompt"),
        ({"prompt": "x" * 2_000_001}, "prompt"),
        ({"n": 9}, "n"),
        ({"n": 4, "max_tokens": 100_000, "prompt": "x" * 950_000}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": [0.5]}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream_options": 5}, "stream_options"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": "s", "n": 2}, "session_id"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"bad_words": ["the"]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {str(i): "x" for i in range(50_000)}}, "logit_bias"),
        ({"logprobs": 20, "n": 4, "max_tokens": 2000}, "logprobs"),
        ({"logprobs": 0, "echo": True, "max_tokens": 0, "prompt": "x" * 100_001}, "logprobs"),
    ],
)
def test_bad_parameters_are_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "poet", "prompt": "x", **fields}).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and param in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and server.engine.active == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 3000}, "messages"),
        ({"messages": [1] * 100_000}, "messages"),
        ({"messages": [{"role": "user", "content": [1] * 100_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_bad_chats_are_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "poet", "messages": [{"role": "user", "content": "x"}], **fields}).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_other_errors_have_the_same_shape(server: Server, client: openai.OpenAI) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b""):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    for path in ("v1/nothing", "v1", "nothing"):
        for missing in (httpx.get(f"{server.url}/{path}"), httpx.post(f"{server.url}/{path}", json={})):
            error = missing.json()["error"]
            assert (missing.status_code, error["type"]) == (404, "invalid_request_error") and path in error["message"]
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):  # of a generator they would mean little
        client.embeddings.create(model="poet", input="x")
    refused = httpx.get(f"{server.url}/v1/completions")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-5", prompt="x")
    for name in ("poet", "poet:3", "poet@champion"):
        client.completions.create(model=name, prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="poet:2", prompt="x")


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (
            b'{"prompt": "x"}',
            {"Content-Type": "application/x-www-form-urlencoded"},
            400,
            "Content-Type: application/json",
        ),
        (b'{"prompt": "x"}', {}, 400, "Content-Type is absent: send a JSON object with Content-Type: application/json"),
        (b"{}", {"Content-Type": "application/json"}, 400, "prompt: required; expected a string, a list of token ids"),
        (b"", {"Content-Type": "application/json"}, 400, "the body is empty: send a JSON object"),
        (b"[1]", {"Content-Type": "application/json"}, 400, "the body is not a JSON object"),
        (b'{"prompt": ', {"Content-Type": "application/json"}, 400, "the body is not a JSON object: Expecting value"),
        (b'{"prompt": "\xff"}', {"Content-Type": "application/json"}, 400, "send a JSON object in UTF-8"),
        (b'{"prompt":' + b"[" * 100_000, {"Content-Type": "application/json"}, 400, "not too deeply nested"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415, "Content-Encoding: 'gzip' is not supported"),
    ],
)
def test_a_mistake_in_the_request_is_one_line_that_names_what_to_send(
    server: Server, body: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}] * 3000}, "messages: at most 2,048 are"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages: 'content' is missing; expected a list of"),
        ("completions", {"prompt": ["x"] * 3000}, "prompt: at most 2,048 are allowed"),
        ("completions", {"prompt": [1] * 3000 + [-1]}, "prompt: expected a string, a list of token ids"),
    ],
)
def test_a_mistake_in_a_list_is_told_in_words(server: Server, path: str, fields: dict[str, Any], message: str) -> None:
    assert server.post(path, **fields).json()["error"]["message"].startswith(message)


def test_a_slow_body_is_a_request_timeout(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.2)
    with connection(server) as client:
        client.sendall(raw_request(server)[:-10])
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_monitoring_routes_and_the_playground_answer_head(server: Server) -> None:
    for path in ("/", "/health", "/ready"):
        answer = httpx.head(f"{server.url}{path}")
        assert (answer.status_code, answer.content) == (200, b""), path


def test_fields_that_cannot_change_the_text_are_ignored(server: Server) -> None:
    nulls = dict.fromkeys(["max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs", "suffix"])
    answer = server.post(model="poet", prompt="x", user="m" * 300, best_of=1, presence_penalty=0, tools=[], **nulls)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=b"x" * 10_000_000, timeout=60)
    assert answer.status_code == 413 and "at most 3,000,000 bytes" in answer.json()["error"]["message"]

    def trickle() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(100):
            yield b"x" * 100_000

    try:
        status = httpx.post(f"{server.url}/v1/completions", content=trickle(), timeout=60).status_code
    except httpx.WriteError:  # the server answered and closed while we were still sending
        status = 413
    assert status == 413
    assert server.post(model="poet", prompt="x").status_code == 200
