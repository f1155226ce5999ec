"""The HTTP interface under load: full queues, deadlines, clients that disconnect or do not read."""

import random
import socket
import time

import httpx
import openai
import pytest

from gru.serving.api import create_app
from tests.gru.serving.conftest import CONFIG
from tests.gru.serving.server import Server, connection, listening, raw_request, wait_until


def test_a_full_queue_is_429_and_a_leaving_client_frees_its_place(server: Server) -> None:
    server.model.pause = 0.002
    fields = {"model": "poet", "prompt": "x", "max_tokens": 100_000}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        with (
            http.stream("POST", "/v1/completions", json={**fields, "n": 4, "stream": True}) as streaming,
            http.stream("POST", "/v1/completions", json={**fields, "n": 3, "stream": True}),
        ):
            lines = streaming.iter_lines()  # the stream is closed when this is garbage collected
            next(lines)
            wait_until(lambda: (server.engine.active, server.engine.waiting) == (4, 3))
            refused = server.post(**fields, n=2)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            assert server.engine.waiting == 3
        wait_until(lambda: server.engine.active + server.engine.waiting == 0)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=fields, timeout=0.3)
        wait_until(lambda: server.engine.active == 0)


def test_a_request_that_takes_too_long_ends(running: Server) -> None:
    config = CONFIG.model_copy(update={"request_seconds": 0.3})
    running.model.pause = 0.01
    running.models.clear()
    engine = running.new_engine("3")
    with listening(create_app(lambda: running.models, config)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="poet", prompt="x", max_tokens=90_000)
        assert (error.value.status_code, error.value.code) == (503, "timeout")
        assert "Retry-After" not in error.value.response.headers  # it would take as long again
        with pytest.raises(openai.APIError, match="exceeded its time limit"):
            list(client.completions.create(model="poet", prompt="x", max_tokens=90_000, stream=True))
    wait_until(lambda: engine.active == 0)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("clients", [400, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_clients_that_disconnect_at_any_moment_free_their_slots(server: Server, clients: int) -> None:
    server.model.pause = 0.0005
    chance = random.Random(0)
    whole = raw_request(server, max_tokens=100_000)
    for _ in range(clients):
        with connection(server) as client:
            client.sendall(whole if chance.random() < 0.8 else whole[: chance.randrange(len(whole))])
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.02)
    wait_until(lambda: server.engine.active + server.engine.waiting == 0)
    assert server.post(model="poet", prompt="x").status_code == 200


@pytest.mark.slow
def test_a_client_that_does_not_read_delays_nobody(server: Server) -> None:
    with connection(server) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.sendall(raw_request(server, max_tokens=4000, logprobs=20))  # megabytes
        wait_until(lambda: server.engine.active == 1)
        assert server.post(model="poet", prompt="x", max_tokens=50).status_code == 200
        deadline = time.monotonic() + 60
        while server.engine.active:  # the text is generated to its end
            assert time.monotonic() < deadline
            time.sleep(0.01)
