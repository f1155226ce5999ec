"""Keys, request ids, the access log, metrics and origins."""

import asyncio
import json
import logging
import os
import pickle
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.core import Metric
from pydantic import ValidationError

from gru.config import ServeConfig
from gru.errors import UserError
from gru.serving import auth
from gru.serving.api import create_app
from gru.serving.auth import new_key
from gru.serving.metrics import Metrics
from gru.serving.middleware import JsonLines
from tests.gru.serving.conftest import CONFIG
from tests.gru.serving.server import Server, listening, wait_until


def test_keys_are_required_and_never_logged(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REFRESH_SECONDS", 0.0)
    (alice, alice_line), (bob, bob_line) = new_key("alice"), new_key("bob")
    file = tmp_path / "keys"
    file.write_text(f"# clients\n{alice_line}\n")
    caplog.set_level(logging.INFO, logger="gru.access")
    config = CONFIG.model_copy(update={"keys": str(file)})
    with listening(create_app(lambda: server.models, config)) as url:

        def complete(key: str, **fields: Any) -> Any:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            return client.completions.create(model="poet", prompt="a secret prompt", seed=1, **fields)

        assert complete(alice).choices
        for wrong in (bob, alice[:-1], alice + "x", "none"):
            with pytest.raises(openai.AuthenticationError):
                complete(wrong)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
        complete(alice, extra_body={"session_id": "s"})
        file.write_text(f"{alice_line}\n{bob_line}\n")
        os.utime(file, (1, 1))  # a different time, whatever the clock's resolution
        session = {"session_id": "s"}  # alice's is not bob's
        assert not complete(bob, extra_body=session).to_dict()["session"]["resumed_tokens"]
        assert complete(alice, extra_body=session).to_dict()["session"]["resumed_tokens"]
        file.write_text(f"{bob_line}\n")
        os.utime(file, (2, 2))
        with pytest.raises(openai.AuthenticationError):
            complete(alice)
        file.write_text(f"nonsense\n{bob_line}\n")
        os.utime(file, (3, 3))
        assert complete(bob).choices  # a malformed line concerns no other
        file.write_text(f"{alice_line}\nnonsense\n")
        os.utime(file, (4, 4))
        assert complete(alice).choices
        with pytest.raises(openai.AuthenticationError):
            complete(bob)
        file.unlink()
        assert complete(alice).choices  # a file that cannot be read withdraws no key
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert '"owner": "alice"' in logged and '"status": 401' in logged and '"prompt_tokens": 15' in logged
    assert "an API key is ignored" in logged and "line 2" in logged
    [first, *_] = [json.loads(record.getMessage()) for record in caplog.records if record.levelno == logging.INFO]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds() < 600
    assert '"error": "this API key is unknown"' in logged
    for secret in (alice, bob, "secret prompt"):
        assert secret not in logged and secret not in alice_line + bob_line
    with pytest.raises(UserError, match="cannot read"):
        create_app(lambda: server.models, config)


def test_a_key_expires_and_may_be_renamed(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gru.access")
    yesterday, tomorrow = (datetime.now(UTC).date() + timedelta(days=days) for days in (-1, 1))
    (alice, alice_line), (bob, bob_line) = new_key("alice", tomorrow), new_key("bob")
    (tmp_path / "keys").write_text(f"{alice_line.replace('alice', 'renamed')}\n{bob_line} {yesterday}\n")
    config = CONFIG.model_copy(update={"keys": str(tmp_path / "keys")})
    with listening(create_app(lambda: server.models, config)) as url:
        headers = [{"Authorization": f"Bearer {key}"} for key in (alice, bob)]
        valid, expired = (httpx.get(f"{url}/v1/models", headers=each) for each in headers)
        wait_until(lambda: len(caplog.records) == 2)
    assert (valid.status_code, expired.status_code) == (200, 401)
    error = expired.json()["error"]
    assert (error["code"], error["message"]) == ("expired_api_key", f"this API key was valid until {yesterday}")
    assert [json.loads(record.getMessage())["owner"] for record in caplog.records] == ["renamed", "bob"]
    with pytest.raises(UserError, match="choose a day that is not over"):
        new_key("alice", yesterday)


def test_each_line_of_the_access_log_is_json() -> None:
    record = logging.LogRecord("gru.access", logging.INFO, "", 0, '{"path": "/"}', (), None)
    assert JsonLines().format(record) == '{"path": "/"}'
    problem = logging.LogRecord("gru.access", logging.ERROR, "", 0, "no %s", ("keys",), None)
    line = json.loads(JsonLines().format(problem))
    assert line["problem"] == "no keys" and datetime.fromisoformat(line["time"]).tzinfo


def test_a_request_has_an_id(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    named = httpx.post(url, json={"prompt": "x"}, headers={"x-request-id": "mine-7"})
    assert named.headers["x-request-id"] == "mine-7"
    latin = httpx.post(url, json={"prompt": "x"}, headers={"x-request-id": b"caf\xe9", "x-session-id": b"caf\xe9"})
    assert latin.status_code == 200 and latin.headers["x-request-id"].isascii()
    ids = {httpx.post(url, json={"prompt": "x"}, headers={"x-request-id": "no spaces"}).headers["x-request-id"]}
    ids |= {httpx.get(f"{server.url}/nowhere").headers["x-request-id"]}
    assert len(ids) == 2 and "no spaces" not in ids


def test_metrics_count_requests_and_tokens(server: Server, client: openai.OpenAI) -> None:
    def value(line: str) -> float:
        page = httpx.get(f"{server.url}/metrics").text
        return next((float(each.rsplit(" ", 1)[1]) for each in page.splitlines() if each.startswith(line)), 0.0)

    generated, answered = (
        'gru_tokens_total{kind="generated",replica="",version="3"}',
        'gru_http_requests_total{path="/v1/completions",replica="",status="200"}',
    )
    before = value(generated), value(answered)
    client.completions.create(model="poet", prompt="x", max_tokens=30)
    list(client.completions.create(model="poet", prompt="x", max_tokens=12, stream=True))
    wait_until(lambda: value(generated) == before[0] + 42)
    assert value(answered) == before[1] + 2
    assert value('gru_model_info{alias="champion"') == 1
    assert value('gru_requests_running{replica="",version="3"}') == 0
    httpx.get(f"{server.url}/{'x' * 50}")
    assert value('gru_http_requests_total{path="other",replica="",status="404"}') >= 1
    assert value('gru_time_to_first_token_seconds_count{replica="",version="3"}') >= 2
    assert value('gru_engine_tokens_total{kind="generated",replica="",version="3"}') >= 42
    assert 0 < value('gru_model_since_seconds{replica="",version="3"}') <= time.time()


def test_metrics_are_those_of_all_replicas(server: Server) -> None:
    replicas = [Metrics(lambda: server.models, name) for name in ("a", "b")]
    for requests, metrics in enumerate(replicas, 1):
        for _ in range(requests):
            metrics.record_request("/v1/completions", 200, 0.1)

    async def all_replicas() -> list[list[Metric]]:
        return pickle.loads(pickle.dumps([metrics.collect() for metrics in replicas]))  # as Ray does

    async def silent() -> list[list[Metric]]:
        raise TimeoutError("another replica does not answer")

    def page() -> list[str]:
        return asyncio.run(replicas[0].page()).decode().splitlines()

    a, b = (f'gru_http_requests_total{{path="/v1/completions",replica="{name}",status="200"}}' for name in "ab")
    replicas[0].all_replicas = all_replicas
    lines = page()
    assert {f"{a} 1.0", f"{b} 2.0"} <= set(lines)
    heads = [line for line in lines if line.startswith("# TYPE ")]
    assert len(heads) == len(set(heads)) > 10
    replicas[0].all_replicas = silent
    assert f"{a} 1.0" in page() and f"{b} 2.0" not in page()


def test_no_other_site_may_send_requests(server: Server) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        httpx.options(f"{server.url}/v1/completions", headers=origin),
        httpx.post(f"{server.url}/v1/completions", headers=origin, json={"prompt": "x"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_the_configured_origins_may_send_requests(server: Server, tmp_path: Path) -> None:
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(line)
    config = CONFIG.model_copy(update={"keys": str(tmp_path / "keys"), "cors_origins": ["https://app.example"]})
    with listening(create_app(lambda: server.models, config)) as url:

        def send(origin: str, method: str = "POST", **headers: str) -> httpx.Response:
            body = None if method == "OPTIONS" else {"prompt": "x"}
            headers = {"Origin": origin, **headers}
            return httpx.request(method, f"{url}/v1/completions", json=body, headers=headers)

        asked = {"Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
        preflight = send("https://app.example", "OPTIONS", **asked)  # which has no key
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
        refused = send("https://app.example")
        answer = send("https://app.example", Authorization=f"Bearer {key}")
        assert (refused.status_code, answer.status_code) == (401, 200)
        for each in (refused, answer):
            assert each.headers["Access-Control-Allow-Origin"] == "https://app.example"
        for each in (send("https://other.example", "OPTIONS", **asked), send("https://other.example")):
            assert "Access-Control-Allow-Origin" not in each.headers
    for wrong in ("app.example", "https://app.example/", "https://App.example", "*.example"):
        with pytest.raises(ValidationError):
            ServeConfig(cors_origins=[wrong])
