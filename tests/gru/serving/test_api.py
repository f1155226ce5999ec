"""The HTTP interface, through a real server and OpenAI's own client."""

import json
import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from gru.config import CanaryConfig, ServeConfig
from gru.errors import UserError
from gru.serving import auth
from gru.serving.api import create_app
from gru.serving.auth import new_key
from tests.gru.serving.server import Server, listening, tiny_bundle

CONFIG = ServeConfig(
    slots=4,
    max_queue=4,
    max_tokens=100_000,
    max_prompt_tokens=1_000_000,
    max_body_bytes=3_000_000,
    chat_template="{role}: {content}\n",
    canary=CanaryConfig(share=0.5),
)


JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server("", CONFIG, tiny_bundle())
    with listening(create_app(lambda: server.served, CONFIG, settings="0123")) as server.url:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.model.pause, running.model.failing = 0, False
    running.served.clear()
    engine = running.new_engine("3")
    yield running
    engine.close(drain=False)
    assert engine.join(10)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_whole_and_streamed_texts_are_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "poet", "prompt": "Once", "max_tokens": 120, "seed": 5}
    whole = client.completions.create(**asked)
    assert whole.usage is not None and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (4, 120, 124)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert client.completions.create(**asked).choices[0].text == whole.choices[0].text
    asked["seed"] = 6
    assert client.completions.create(**asked).choices[0].text != whole.choices[0].text


def test_no_seed_is_a_new_seed_each_time(client: openai.OpenAI) -> None:
    twice = client.completions.create(model="poet", prompt=["a", "a"])
    assert twice.choices[0].text != twice.choices[1].text
    texts = {client.completions.create(model="poet", prompt="a").choices[0].text for _ in range(5)}
    assert len(texts) > 1


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    many = client.completions.create(model="poet", prompt=["ab", "cde"], n=3, seed=9, max_tokens=20)
    assert [c.index for c in many.choices] == list(range(6))
    assert len({c.text for c in many.choices[:3]}) == 3
    assert many.usage is not None and (many.usage.prompt_tokens, many.usage.completion_tokens) == (5, 120)
    alone = client.completions.create(model="poet", prompt="cde", seed=9, max_tokens=20)
    assert alone.choices[0].text == many.choices[3].text
    texts = [""] * 6
    for chunk in client.completions.create(model="poet", prompt=["ab", "cde"], n=3, seed=9, max_tokens=20, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in many.choices]


def test_stop_strings_end_the_text_and_free_the_slot(server: Server, client: openai.OpenAI) -> None:
    free = client.completions.create(model="poet", prompt="x", seed=1, max_tokens=60).choices[0].text
    stop = free[20:23]
    expected = free[: free.index(stop)]
    asked: dict[str, Any] = {"model": "poet", "prompt": "x", "seed": 1, "max_tokens": 100_000, "stop": [stop]}
    whole = client.completions.create(**asked)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    assert whole.usage is not None and whole.usage.completion_tokens == len(expected) + 3
    assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == expected
    until(lambda: server.engine.active == 0)
    echoed = client.completions.create(**asked, echo=True).choices[0].text
    assert echoed == "x" + expected


def test_the_end_of_a_document_is_a_stop(server: Server, client: openai.OpenAI) -> None:
    bias, end = server.bundle.model.output_bias, server.bundle.tokenizer.end_of_text
    with torch.no_grad():
        bias[end] = 100
    try:
        answer = client.completions.create(model="poet", prompt="", temperature=0)
    finally:
        with torch.no_grad():
            bias[end] = -5
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_001}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2, 3]}, "prompt"),
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
        ({"ignore_eos": True}, "ignore_eos"),
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


def test_other_errors_have_the_same_shape(server: Server, client: openai.OpenAI) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b""):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-5", prompt="x")
    for name in ("poet", "poet:3", "poet@champion"):
        client.completions.create(model=name, prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="poet:2", prompt="x")


def test_fields_that_do_not_matter_are_ignored(server: Server) -> None:
    nulls = dict.fromkeys(["max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs", "suffix"])
    answer = server.post(model="poet", prompt="x", user="me", best_of=1, presence_penalty=0, **nulls)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16


def test_a_full_queue_is_429_and_a_leaving_client_frees_its_place(server: Server) -> None:
    server.model.pause = 0.002
    asked = {"model": "poet", "prompt": "x", "max_tokens": 100_000}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        with (
            http.stream("POST", "/v1/completions", json={**asked, "n": 4, "stream": True}) as streaming,
            http.stream("POST", "/v1/completions", json={**asked, "n": 3, "stream": True}),
        ):
            lines = streaming.iter_lines()  # closes the stream when it is forgotten
            next(lines)
            until(lambda: (server.engine.active, server.engine.waiting) == (4, 3))
            refused = server.post(**asked, n=2)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            assert server.engine.waiting == 3
        until(lambda: server.engine.active + server.engine.waiting == 0)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=asked, timeout=0.3)
        until(lambda: server.engine.active == 0)


def test_tokens_come_as_they_are_made(server: Server, client: openai.OpenAI) -> None:
    server.model.pause = 0.01
    start = time.monotonic()
    times = [
        time.monotonic() - start
        for _ in client.completions.create(model="poet", prompt="x", max_tokens=100, stream=True)
    ]
    assert times[0] < 0.3 * times[-1] and len(times) > 10


def test_models_and_health(server: Server, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.created) == ("poet", "gru", 17)
    told = {
        "id": "poet",
        "object": "model",
        "created": 17,
        "owned_by": "gru",
        "version": "3",
        "alias": "champion",
        "run_id": "r1",
        "bits_per_byte": 2.5,
        "digest": "f00d",
    }
    assert httpx.get(f"{server.url}/v1/models").json()["data"] == [told]
    assert client.models.retrieve("poet@champion").to_dict() == told
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    ready = httpx.get(f"{server.url}/ready").json()
    assert ready == {"status": "ready", "model": "poet", "version": "3", "settings": "0123", "requests": 0}
    engine = server.engine
    server.served.clear()
    assert httpx.get(f"{server.url}/health").status_code == 200  # it is well, and has nothing to say yet
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/v1/models").json()["data"] == []
    assert server.post(prompt="x").json()["error"]["code"] == "no_model"
    engine.close()


def test_a_new_version_takes_over_while_old_streams_finish(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "poet", "prompt": "x", "seed": 1, "max_tokens": 200}
    expected = client.completions.create(**asked).choices[0].text
    server.model.pause = 0.002
    stream = client.completions.create(**asked, stream=True)
    text = next(stream).choices[0].text
    old = server.engine
    new = server.new_engine("4")
    old.close(drain=True)
    assert client.completions.create(**{**asked, "model": "poet:4", "max_tokens": 5}).choices[0].text == expected[:5]
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
    assert old.join(10)
    new.close()


def test_a_failed_engine_is_an_error_and_not_healthy(server: Server, client: openai.OpenAI) -> None:
    server.model.pause = 0.002
    stream = client.completions.create(model="poet", prompt="x", max_tokens=100_000, stream=True)
    next(stream)
    server.model.failing = True
    with pytest.raises(openai.APIError, match="generation failed"):
        list(stream)
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert server.post(prompt="x").status_code == 503


def test_a_chat_is_the_completion_of_its_template(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "{role}?"}]},
    ]
    asked: dict[str, Any] = {"model": "poet", "seed": 2, "temperature": 0.7}
    prompt = "system: Be brief.\nuser: Who {role}?\nassistant: "
    expected = client.completions.create(prompt=prompt, max_tokens=300, stop=["\n"], **asked)
    whole = client.chat.completions.create(messages=messages, max_completion_tokens=300, **asked)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.choices[0].text)
    assert whole.choices[0].finish_reason == expected.choices[0].finish_reason
    assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(messages=messages, max_tokens=300, stream=True, n=2, **asked))
    deltas = [chunk.choices[0] for chunk in chunks]
    assert [delta.delta.role for delta in deltas].count("assistant") == 2
    assert "".join(d.delta.content or "" for d in deltas if d.index == 0) == message.content
    assert sum(d.finish_reason is not None for d in deltas) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [1] * 100_000}, "messages"),
        ({"messages": [{"role": "user", "content": [1] * 100_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_bad_chats_are_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "poet", "messages": [{"role": "user", "content": "x"}], **fields}).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_logprobs_go_with_the_text(server: Server, client: openai.OpenAI) -> None:
    # At this temperature it writes printable characters alone.
    asked: dict[str, Any] = {"model": "poet", "prompt": "Once", "seed": 5, "max_tokens": 40, "temperature": 0.5}
    asked["logprobs"] = 3
    [choice] = client.completions.create(**asked).choices
    told = choice.logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert "".join(told.tokens) == choice.text and len(told.tokens) == 40
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert told.token_logprobs is not None and all(value <= 0 for value in told.token_logprobs)
    assert told.top_logprobs is not None and all(len(top) == 3 for top in told.top_logprobs)
    parts = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    assert [token for part in parts if part for token in part.tokens or []] == told.tokens
    [echoed] = client.completions.create(**asked, echo=True).choices
    assert echoed.logprobs is not None and echoed.logprobs.tokens == [*"Once", *told.tokens]
    assert echoed.logprobs.text_offset == [0, 1, 2, 3, *(4 + offset for offset in told.text_offset)]
    [scored] = client.completions.create(**{**asked, "max_tokens": 0}, echo=True).choices
    assert scored.logprobs is not None and (scored.text, scored.finish_reason) == ("Once", "length")
    assert scored.logprobs.token_logprobs == echoed.logprobs.token_logprobs[:4]  # type: ignore[index]
    chat = client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": "x"}],
        temperature=0.5,
        logprobs=True,
        top_logprobs=2,
        max_tokens=9,
    )
    tokens = chat.choices[0].logprobs
    assert tokens is not None and tokens.content is not None
    assert "".join(each.token for each in tokens.content) == chat.choices[0].message.content
    assert all(len(each.top_logprobs) == 2 and each.bytes for each in tokens.content)


def test_logprobs_end_with_the_text_at_a_stop_string(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "poet", "prompt": "x", "seed": 1, "max_tokens": 60, "temperature": 0.5}
    asked["logprobs"] = 0
    free = client.completions.create(**asked).choices[0].text
    [choice] = client.completions.create(**asked, stop=free[20:23]).choices
    assert choice.logprobs is not None and "".join(choice.logprobs.tokens or []) == choice.text


def test_an_incomplete_character_is_spelled_in_bytes(server: Server, client: openai.OpenAI) -> None:
    bias = {str(byte): 100 for byte in "\u6625".encode()[:1]}
    [choice] = client.completions.create(model="poet", prompt="", max_tokens=2, logit_bias=bias, logprobs=0).choices
    assert choice.logprobs is not None and choice.logprobs.tokens == ["bytes:\\xe6"] * 2
    assert choice.text == "\ufffd" * 2


def test_sampling_fields_reach_the_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "poet", "prompt": "x", "max_tokens": 60, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    fresh = client.completions.create(**asked, extra_body={"repetition_penalty": 10}).choices[0].text
    assert len(set(fresh)) > len(set(plain))
    assert client.completions.create(**asked, logit_bias={"65": 100}).choices[0].text == "A" * 60
    least = client.completions.create(**{**asked, "temperature": 2}, extra_body={"min_p": 1}).choices[0].text
    assert least == plain


def test_a_session_goes_on_without_the_text_sent_again(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "poet", "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**{**asked, "max_tokens": 40}, prompt="Once").choices[0].text
    session = {"session_id": "mine"}
    first = client.completions.create(**asked, prompt="Once", extra_body=session)
    second = client.completions.create(**asked, prompt="", extra_body=session)
    assert first.choices[0].text + second.choices[0].text == whole
    assert first.to_dict()["session"] == {"id": "mine", "resumed_tokens": 0}
    assert second.to_dict()["session"] == {"id": "mine", "resumed_tokens": 24}
    third = list(client.completions.create(**asked, prompt="ab", extra_body=session, stream=True))
    assert third[0].to_dict()["session"] == {"id": "mine", "resumed_tokens": 44}
    server.new_engine("4")
    other = client.completions.create(**asked, prompt="", extra_body=session)
    assert other.to_dict()["session"] == {"id": "mine", "resumed_tokens": 0}  # a state is of one model
    server.engine.close()


def test_a_prompt_that_begins_as_another_is_read_from_there(client: openai.OpenAI) -> None:
    usages = [client.completions.create(model="poet", prompt="x" * 300 + end).usage for end in "ab"]
    usages += [client.completions.create(model="poet", prompt="x" * 300, n=3).usage]
    details = [usage.to_dict()["prompt_tokens_details"] for usage in usages if usage]
    assert details == [{"cached_tokens": 0}, {"cached_tokens": 255}, {"cached_tokens": 255}]


def test_the_canary_has_its_share_and_keeps_its_users(server: Server, client: openai.OpenAI) -> None:
    server.new_engine("4", alias="challenger")

    def version(**fields: Any) -> str:
        fingerprint = client.completions.create(prompt="x", max_tokens=1, **fields).system_fingerprint
        assert fingerprint is not None
        return fingerprint.partition("-")[0]

    assert {version(model="poet") for _ in range(40)} == {"3", "4"}
    by_user = {f"u{i}": {version(model="poet", user=f"u{i}") for _ in range(4)} for i in range(20)}
    assert all(len(versions) == 1 for versions in by_user.values())
    assert set.union(*by_user.values()) == {"3", "4"}
    assert {version(model="poet@champion") for _ in range(10)} == {version(model="poet:3")} == {"3"}
    assert {version(model="poet@challenger") for _ in range(10)} == {version(model="poet:4")} == {"4"}
    assert [model.id for model in client.models.list().data] == ["poet", "poet@challenger"]
    assert {client.models.retrieve("poet").to_dict()["version"] for _ in range(20)} == {"3"}
    dead = server.served[1].engine
    dead.close(drain=False)
    assert dead.join(10)
    assert {version(model="poet") for _ in range(20)} == {"3"}, "a canary that is dead harms nobody"
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.served[1].engine.close()


def test_a_request_that_takes_too_long_ends(running: Server) -> None:
    config = CONFIG.model_copy(update={"request_seconds": 0.3})
    running.model.pause = 0.01
    running.served.clear()
    engine = running.new_engine("3")
    with listening(create_app(lambda: running.served, config)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="poet", prompt="x", max_tokens=90_000)
        assert (error.value.status_code, error.value.code) == (503, "timeout")
        with pytest.raises(openai.APIError, match="longer than it may"):
            list(client.completions.create(model="poet", prompt="x", max_tokens=90_000, stream=True))
    until(lambda: engine.active == 0)
    engine.close()


def test_keys_are_asked_for_and_never_logged(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REFRESH_SECONDS", 0.0)
    (alice, alice_line), (bob, bob_line) = new_key("alice"), new_key("bob")
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n{alice_line}\n")
    caplog.set_level(logging.INFO, logger="gru.access")
    config = CONFIG.model_copy(update={"keys": str(file)})
    with listening(create_app(lambda: server.served, config)) as url:

        def ask(key: str, **fields: Any) -> Any:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            return client.completions.create(model="poet", prompt="a secret prompt", seed=1, **fields)

        assert ask(alice).choices
        for wrong in (bob, alice[:-1], alice + "x", "none"):
            with pytest.raises(openai.AuthenticationError):
                ask(wrong)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
        ask(alice, extra_body={"session_id": "s"})
        file.write_text(f"{alice_line}\n{bob_line}\n")
        os.utime(file, (1, 1))  # another time, whatever the clock's resolution
        assert not ask(bob, extra_body={"session_id": "s"}).to_dict()["session"][
            "resumed_tokens"
        ]  # alice's is not bob's
        assert ask(alice, extra_body={"session_id": "s"}).to_dict()["session"]["resumed_tokens"]
        file.write_text(f"{bob_line}\n")
        os.utime(file, (2, 2))
        with pytest.raises(openai.AuthenticationError):
            ask(alice)
        file.write_text("nonsense\n")
        os.utime(file, (3, 3))
        assert ask(bob).choices  # a broken file withdraws nobody
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert '"owner": "alice"' in logged and '"status": 401' in logged and '"prompt_tokens": 15' in logged
    for secret in (alice, bob, "secret prompt"):
        assert secret not in logged and secret not in file.read_text()
    with pytest.raises(UserError, match="line 1"):
        create_app(lambda: server.served, config)


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=b"x" * 10_000_000, timeout=60)
    assert answer.status_code == 413 and "at most 3,000,000 bytes" in answer.json()["error"]["message"]

    def trickle() -> Iterator[bytes]:  # with no word of its length
        for _ in range(100):
            yield b"x" * 100_000

    try:
        status = httpx.post(f"{server.url}/v1/completions", content=trickle(), timeout=60).status_code
    except httpx.WriteError:  # answered and closed while we were still sending
        status = 413
    assert status == 413
    assert server.post(model="poet", prompt="x").status_code == 200


def test_a_request_is_named(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    named = httpx.post(url, json={"prompt": "x"}, headers={"x-request-id": "mine-7"})
    assert named.headers["x-request-id"] == "mine-7"
    ids = {httpx.post(url, json={"prompt": "x"}, headers={"x-request-id": "no spaces"}).headers["x-request-id"]}
    ids |= {httpx.get(f"{server.url}/nowhere").headers["x-request-id"]}
    assert len(ids) == 2 and "no spaces" not in ids


def test_metrics_count_what_was_done(server: Server, client: openai.OpenAI) -> None:
    def value(line: str) -> float:
        page = httpx.get(f"{server.url}/metrics").text
        return next((float(each.rsplit(" ", 1)[1]) for each in page.splitlines() if each.startswith(line)), 0.0)

    made, answered = (
        'gru_tokens_total{kind="generated",replica="",version="3"}',
        'gru_http_requests_total{path="/v1/completions",replica="",status="200"}',
    )
    before = value(made), value(answered)
    client.completions.create(model="poet", prompt="x", max_tokens=30)
    list(client.completions.create(model="poet", prompt="x", max_tokens=12, stream=True))
    until(lambda: value(made) == before[0] + 42)
    assert value(answered) == before[1] + 2
    assert value('gru_model_info{alias="champion"') == 1
    assert value('gru_requests_running{replica="",version="3"}') == 0
    httpx.get(f"{server.url}/{'x' * 50}")
    assert value('gru_http_requests_total{path="other",replica="",status="404"}') >= 1
    assert value('gru_time_to_first_token_seconds_count{replica="",version="3"}') >= 2


def test_no_other_site_may_ask(server: Server) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        httpx.options(f"{server.url}/v1/completions", headers=origin),
        httpx.post(f"{server.url}/v1/completions", headers=origin, json={"prompt": "x"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("clients", [400, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_clients_that_hang_up_at_any_moment_leave_no_slot_taken(server: Server, clients: int) -> None:
    server.model.pause = 0.0005
    chance = random.Random(0)
    whole = raw_request(server, max_tokens=100_000)
    for _ in range(clients):
        with connection(server) as client:
            client.sendall(whole if chance.random() < 0.8 else whole[: chance.randrange(len(whole))])
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.02)
    until(lambda: server.engine.active + server.engine.waiting == 0)
    assert server.post(model="poet", prompt="x").status_code == 200


def test_a_client_that_does_not_read_holds_up_nobody(server: Server) -> None:
    with connection(server) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.sendall(raw_request(server, max_tokens=4000, logprobs=20))  # megabytes
        until(lambda: server.engine.active == 1)
        assert server.post(model="poet", prompt="x", max_tokens=50).status_code == 200
        deadline = time.monotonic() + 60
        while server.engine.active:  # it is written to its end
            assert time.monotonic() < deadline
            time.sleep(0.01)


def raw_request(server: Server, **fields: Any) -> bytes:
    body = json.dumps({"model": "poet", "prompt": "x" * 50, "stream": True, **fields}).encode()
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def connection(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
