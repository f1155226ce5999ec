"""A real HTTP server with a tiny model, in the test's own process."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
import uvicorn

from gru.config import ModelConfig, ServeConfig, TokenizerConfig
from gru.corpus import tokenizer as tokenizers
from gru.generation.engine import Engine
from gru.model.language_model import GRULanguageModel
from gru.registry.bundle import Bundle
from gru.registry.versions import Version
from gru.serving.loaded_model import LoadedModel
from tests.gru.registry.bundles import LINEAGE


def tiny_bundle() -> Bundle:
    """Return an untrained byte model that prefers printable bytes and seldom ends a document."""
    tokenizer = tokenizers.train_tokenizer(TokenizerConfig(kind="byte"), ["any text"])
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=16, hidden=16), tokenizer.vocab_size).eval()
    with torch.no_grad():
        model.output_bias += 3 * torch.tensor([float(32 <= i < 127) for i in range(tokenizer.vocab_size)])
        model.output_bias[tokenizer.end_of_text] = -5
    return Bundle(model, tokenizer, LINEAGE, "f00d")


class SlowModel(torch.nn.Module):
    """The model with a pause in each call, and failures, that a test may set."""

    def __init__(self, model: GRULanguageModel) -> None:
        super().__init__()
        self.model, self.pause = model, 0.0
        self.vocab_size, self.initial_state = model.vocab_size, model.initial_state
        self.failing = False

    def features(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.pause)
        if self.failing:
            raise RuntimeError("out of luck")
        return self.model.features(tokens, state)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.logits(x)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(tokens, state)


@dataclass
class Server:
    """A server at `url` with one model, and an engine for each version of it."""

    url: str
    config: ServeConfig
    bundle: Bundle
    models: list[LoadedModel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = SlowModel(self.bundle.model)

    def new_engine(self, version: str, alias: str = "champion") -> Engine:
        """Start an engine for a version, which then has the alias."""
        config, end_of_text = self.config, self.bundle.tokenizer.end_of_text
        engine = Engine(
            self.model, end_of_text, config.slots, config.max_queue, config.max_tokens_in_flight, config.cache_bytes
        )
        values = {"name": "poet", "version": version, "run_id": "r1", "bits_per_byte": 2.5, "created": 17}
        others = {name: "" for name in Version.__dataclass_fields__ if name not in values}
        rest = [each for each in self.models if each.alias != alias]
        new = LoadedModel(engine, self.bundle, Version(**values, **others), alias)
        self.models[:] = [new, *rest] if alias == "champion" else [*rest, new]
        return engine

    @property
    def engine(self) -> Engine:
        return self.models[0].engine

    def post(self, path: str = "completions", **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=fields, timeout=60)


@contextmanager
def listening(app: Any, protocol: Any = "auto") -> Iterator[str]:
    """Run an HTTP server for the app, with a protocol class of uvicorn's; the context's value is its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=protocol))
    thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    http.should_exit = True
    thread.join(10)


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until the condition is true, at most 20 seconds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.005)


def raw_request(server: Server, **fields: Any) -> bytes:
    """Return the bytes of a streaming completion request."""
    body = json.dumps({"model": "poet", "prompt": "x" * 50, "stream": True, **fields}).encode()
    content_type = "Content-Type: application/json"
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def connection(server: Server) -> socket.socket:
    """Connect to the server."""
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
