"""The HTTP interface, through a real server and OpenAI's own client."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from gru.config import ModelConfig, TokenizerConfig
from gru.corpus import tokenizer as tokenizers
from gru.model.language_model import GRULanguageModel
from gru.registry import Bundle, Version
from gru.serving.api import Served, create_app
from gru.serving.engine import Engine

SLOTS, QUEUE = 4, 4


class Slowed(torch.nn.Module):
    """The model, with a pause in each call that a test may set."""

    def __init__(self, model: GRULanguageModel) -> None:
        super().__init__()
        self.model, self.pause = model, 0.0
        self.vocab_size, self.initial_state = model.vocab_size, model.initial_state

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.pause)
        return self.model(tokens, state)


@dataclass
class Server:
    url: str
    bundle: Bundle
    model: Slowed
    served: list[Served | None] = field(default_factory=list)

    def new_engine(self, version: str) -> Engine:
        engine = Engine(self.model, self.bundle.tokenizer.end_of_text, SLOTS, QUEUE)
        values = {"name": "poet", "version": version, "run_id": "r1", "bits_per_byte": 2.5, "created": 17}
        others = {name: "" for name in Version.__dataclass_fields__ if name not in values}
        self.served[:] = [Served(engine, self.bundle, Version(**values, **others))]
        return engine

    @property
    def engine(self) -> Engine:
        assert self.served[0] is not None
        return self.served[0].engine

    def post(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=fields, timeout=60)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    tokenizer = tokenizers.train(TokenizerConfig(kind="byte"), ["any text"])
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=16, hidden=16), tokenizer.vocab_size).eval()
    with torch.no_grad():
        model.output_bias += 3 * torch.tensor([float(32 <= i < 127) for i in range(tokenizer.vocab_size)])
        model.output_bias[tokenizer.end_of_text] = -5
    bundle = Bundle(model, tokenizer, {}, "f00d")
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", bundle, Slowed(model), [None])
    app = create_app(lambda: server.served[0], max_tokens=100_000, settings="s1")
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield server
    http.should_exit = True
    thread.join(10)


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.model.pause = 0
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
        ({"n": 9}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"best_of": 2}, "best_of"),
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
    nulls = dict.fromkeys(["max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs"])
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
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0] == {
        "id": "poet",
        "object": "model",
        "created": 17,
        "owned_by": "gru",
        "version": "3",
        "run_id": "r1",
        "bits_per_byte": 2.5,
        "digest": "f00d",
        "settings": "s1",
    }
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "active": 0, "waiting": 0}
    engine = server.engine
    server.served[:] = [None]
    assert httpx.get(f"{server.url}/health").status_code == 503
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
    server.model.forward, forward = None, server.model.forward  # type: ignore[assignment,method-assign]
    try:
        with pytest.raises(openai.APIError, match="generation failed"):
            list(stream)
    finally:
        server.model.forward = forward  # type: ignore[method-assign]
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.post(prompt="x").status_code == 503
