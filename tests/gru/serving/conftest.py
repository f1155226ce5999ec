"""A server with a tiny model, and OpenAI's client for it."""

from collections.abc import Iterator

import openai
import pytest

from gru.config import ServeConfig
from gru.config_stages import CanaryConfig
from gru.serving.api import create_app
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


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server("", CONFIG, tiny_bundle())
    with listening(create_app(lambda: server.models, CONFIG, settings="0123")) as server.url:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.model.pause, running.model.failing = 0, False
    running.models.clear()
    engine = running.new_engine("3")
    yield running
    engine.close(drain=False)
    assert engine.join(10)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
