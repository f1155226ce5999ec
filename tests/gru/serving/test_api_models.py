"""The models behind the HTTP interface: descriptions, health, a new version, the canary, a failed engine."""

from typing import Any

import httpx
import openai
import pytest

from tests.gru.serving.server import Server


def test_models_and_health(server: Server, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.created) == ("poet", "gru", 17)
    description = {
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
    assert httpx.get(f"{server.url}/v1/models").json()["data"] == [description]
    assert client.models.retrieve("poet@champion").to_dict() == description
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    ready = httpx.get(f"{server.url}/ready").json()
    assert ready == {
        "status": "ready",
        "model": "poet",
        "version": "3",
        "settings": "0123",
        "requests": 0,
    }
    engine = server.engine
    server.models.clear()
    assert httpx.get(f"{server.url}/health").status_code == 200  # healthy, although no model is loaded yet
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/v1/models").json()["data"] == []
    assert server.post(prompt="x").json()["error"]["code"] == "no_model"
    engine.close()


def test_a_new_version_takes_over_while_old_streams_finish(server: Server, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "prompt": "x", "seed": 1, "max_tokens": 200}
    expected = client.completions.create(**fields).choices[0].text
    server.model.pause = 0.002
    stream = client.completions.create(**fields, stream=True)
    text = next(stream).choices[0].text
    old = server.engine
    new = server.new_engine("4")
    old.close(drain=True)
    assert client.completions.create(**{**fields, "model": "poet:4", "max_tokens": 5}).choices[0].text == expected[:5]
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
    dead = server.models[1].engine
    dead.close(drain=False)
    assert dead.join(10)
    assert {version(model="poet") for _ in range(20)} == {"3"}, "a canary that is dead harms nobody"
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.models[1].engine.close()
