"""The endpoint on a real Ray Serve: what clients see while replicas, proxies and models are replaced."""

import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import mlflow
import openai
import psutil
import pytest
import torch
from ray import serve

from gru.config import ModelConfig, ServeConfig, TokenizerConfig
from gru.config_stages import ServeResources
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.errors import UserError
from gru.generation.generate import generate_ids
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from gru.network import free_port
from gru.registry import tracking, versions
from gru.registry.bundle import Bundle, load_bundle, write_bundle
from gru.registry.versions import CHAMPION
from gru.serving import deployment
from gru.serving.auth import new_key
from tests.gru.registry.bundles import LINEAGE
from tests.waiting import wait_until

pytestmark = pytest.mark.faults
MODEL = ModelConfig(embedding=16, hidden=16)


@dataclass
class Endpoint:
    config: ServeConfig
    tracking: str
    storage: Path
    bundles: list[Bundle]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.port}"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def set_champion(self, version: int) -> None:
        mlflow.set_tracking_uri(self.tracking)
        mlflow.MlflowClient().set_registered_model_alias("poet", CHAMPION, str(version))

    def complete(self, **fields: Any) -> Any:
        defaults: dict[str, Any] = {"model": "poet", "prompt": "A fox", "seed": 1, "max_tokens": 30}
        return self.client.completions.create(**{**defaults, **fields})

    def expected(self, version: int, seed: int = 1, tokens: int = 30) -> str:
        """Return the text that this version generates, from an engine in this process."""
        bundle = self.bundles[version - 1]
        [ids] = generate_ids(bundle.model, bundle.tokenizer, "A fox", tokens, [SamplingParams(seed)])
        return bundle.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def endpoint(ray_local: None, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    directory = tmp_path_factory.mktemp("endpoint")
    before = mlflow.get_tracking_uri()
    shutil.copy(empty_database, directory / "mlflow.db")
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient().create_experiment("test", artifact_location=str(directory / "artifacts"))
        tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["A crow met a fox."])
        run = tracking.open_run("test", "key", "promote")
        bundles = []
        for seed in range(3):
            path = str(make_bundle(directory / str(seed), tokenizer, seed))
            versions.register(run, "poet", path, 2.0, "text")
            bundles.append(load_bundle(path))
        endpoint = Endpoint(ServeConfig(port=free_port(), slots=8, poll_seconds=0.2), uri, directory, bundles)
        endpoint.set_champion(1)
        deployment.deploy(endpoint.config, ServeResources(), "poet", uri, str(directory))
        deployment.wait_ready(endpoint.url, "1", 120)
        yield endpoint
        serve.shutdown()
        mlflow.set_tracking_uri(before)


def make_bundle(path: Path, tokenizer: Tokenizer, seed: int) -> Path:
    torch.manual_seed(seed)
    model = GRULanguageModel(MODEL, tokenizer.vocab_size)
    with torch.no_grad():
        model.output_bias[tokenizer.end_of_text] = -100
    write_bundle(str(path), MODEL, model.state_dict(), tokenizer, LINEAGE)
    return path


@dataclass
class Load:
    """Clients that send requests all the time: the texts they get from each version, and the errors."""

    endpoint: Endpoint
    clients: int = 4
    texts: dict[str, set[str]] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    answers: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._send_requests, daemon=True) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client does not end"

    def _send_requests(self) -> None:
        while not self._stop.is_set():
            try:
                chunks = list(self.endpoint.complete(stream=True))
                if not chunks or chunks[-1].choices[0].finish_reason is None:
                    raise ConnectionError("the stream broke off")
            except (openai.APIError, httpx.HTTPError, ConnectionError) as error:
                self.failures.append(error)
                time.sleep(0.1)
                continue
            versions = {chunk.system_fingerprint.partition("-")[0] for chunk in chunks}
            text = "".join(chunk.choices[0].text for chunk in chunks)
            self.texts.setdefault("+".join(sorted(versions)), set()).add(text)
            self.answers += 1


def processes(name: str) -> list[psutil.Process]:
    """Return this session's Ray processes that run an actor of this name."""
    matches = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the process has just ended
            if name in " ".join(process.cmdline()):
                matches.append(process)
    return matches


def answers(endpoint: Endpoint) -> bool:
    try:
        return endpoint.complete().choices[0].text == endpoint.expected(1)
    except openai.APIError:
        return False


def test_a_seed_gives_the_same_text_in_every_process(endpoint: Endpoint) -> None:
    for seed in range(4):
        assert endpoint.complete(seed=seed).choices[0].text == endpoint.expected(1, seed)


def test_an_alias_that_moves_20_times_under_load_fails_nobody(endpoint: Endpoint) -> None:
    with Load(endpoint) as load:
        for move in range(1, 21):
            endpoint.set_champion(1 + move % 3)
            time.sleep(0.4)
        endpoint.set_champion(1)
        wait_until("version 1", lambda: answers(endpoint))
    assert not load.failures
    assert load.texts == {str(version): {endpoint.expected(version)} for version in (1, 2, 3)}


@pytest.mark.parametrize("victim", ["ServeReplica:gru:Generator", "ProxyActor"])
def test_a_killed_process_is_replaced_under_load(endpoint: Endpoint, victim: str) -> None:
    with Load(endpoint) as load:
        wait_until("load", lambda: load.answers > 20)
        [killed] = processes(victim)
        os.kill(killed.pid, signal.SIGKILL)
        wait_until("a new process", lambda: any(process.pid != killed.pid for process in processes(victim)))
        wait_until("answers", lambda: answers(endpoint))
        before = load.answers
        wait_until("load", lambda: load.answers > before + 20)
    assert load.texts == {"1": {endpoint.expected(1)}}


def test_large_headers_and_slow_clients_take_neither_memory_nor_places(endpoint: Endpoint) -> None:
    [proxy] = processes("ProxyActor")
    address = ("127.0.0.1", endpoint.config.port)
    assert answers(endpoint)
    before = proxy.memory_info().rss
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address)) for _ in range(1000)]  # Serve has 592 places
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for number, client in enumerate(slow):
            client.sendall(head + (b"Content-Length: 99\r\n\r\n{" if number % 4 else b""))
        for _ in range(3):
            # If sending takes longer than the refused connection is kept open, it ends with an error.
            with socket.create_connection(address) as client, suppress(ConnectionError):
                client.sendall(b"GET / HTTP/1.1\r\nx: ")
                for _ in range(100):
                    client.sendall(b"a" * (1 << 20))
                assert client.recv(100).startswith(b"HTTP/1.1 431 ")
        assert answers(endpoint)
        assert proxy.memory_info().rss - before < 50 << 20
    latin = {"x-session-id": b"caf\xe9", "x-request-id": b"caf\xe9"}
    answer = httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "A", "max_tokens": 1}, headers=latin)
    assert answer.status_code == 200 and answer.headers["x-request-id"].isascii()


def test_open_streams_finish_when_the_endpoint_is_replaced(endpoint: Endpoint) -> None:
    tokens = 4000
    stream = endpoint.complete(stream=True, max_tokens=tokens)
    text = next(stream).choices[0].text
    changed = endpoint.config.model_copy(update={"slots": 16})
    arguments = (changed, ServeResources(), "poet", endpoint.tracking, str(endpoint.storage))
    replacing = threading.Thread(target=deployment.deploy, args=arguments)
    replacing.start()
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == endpoint.expected(1, tokens=tokens)
    replacing.join(120)
    assert not replacing.is_alive()
    wait_until("answers", lambda: answers(endpoint))


def test_replicas_scale_with_tokens_in_flight_and_sessions_stick_to_their_replica(endpoint: Endpoint) -> None:
    """This test is among the last ones, since it leaves another deployment behind."""
    changed = endpoint.config.model_copy(update={"max_replicas": 2, "tokens_per_replica": 2000})
    deployment.deploy(changed, ServeResources(), "poet", endpoint.tracking, str(endpoint.storage))
    wait_until("answers", lambda: answers(endpoint))

    def replicas() -> int:
        states = serve.status().applications[deployment.APP].deployments["Generator"].replica_states
        return states.get("RUNNING", 0)

    assert replicas() == 1
    streams = [endpoint.complete(stream=True, max_tokens=4000, user=str(i)) for i in range(4)]
    readers = [threading.Thread(target=list, args=(stream,), daemon=True) for stream in streams]
    for reader in readers:
        reader.start()

    def busy() -> bool:
        if not any(reader.is_alive() for reader in readers):
            endpoint.complete(max_tokens=4000, n=4)
        return replicas() == 2

    wait_until("a second replica", busy, 120)

    def is_sticky(name: str) -> bool:
        """Return whether three requests of a session each resume from the one before."""
        headers, fields = {"x-session-id": name}, {"session_id": name}
        turns = [endpoint.complete(extra_headers=headers, extra_body=fields).to_dict()["session"] for _ in range(3)]
        return [turn["resumed_tokens"] for turn in turns] == [0, 35, 70]

    def reported() -> bool:
        """Whether a page of metrics has both replicas, whichever of them answered."""
        page = httpx.get(f"{endpoint.url}/metrics", timeout=30).text
        return len(set(re.findall(r'gru_model_info{.*replica="(\w+)"', page))) == 2

    wait_until("the metrics of both replicas", reported, 30)

    # With random routing all eight sessions would pass once in 65,000 times.
    wait_until("the proxy to know both", lambda: all(is_sticky(str(uuid.uuid4())) for _ in range(8)), 30)


def test_an_endpoint_that_requires_keys_is_not_opened_by_a_config_without(endpoint: Endpoint, tmp_path: Path) -> None:
    """This test is the last one, since it leaves a deployment with keys behind."""
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(line)
    closed = endpoint.config.model_copy(update={"keys": str(tmp_path / "keys")})
    arguments = ("poet", endpoint.tracking, str(endpoint.storage))
    deployment.deploy(closed, ServeResources(), *arguments)
    url = f"{endpoint.url}/v1/models"
    wait_until("the keys", lambda: httpx.get(url).status_code == 401)
    moved = endpoint.config.model_copy(update={"port": free_port()})
    for opened in (endpoint.config, moved):
        with pytest.raises(UserError, match="requires API keys"):
            deployment.deploy(opened, ServeResources(), *arguments)
    (tmp_path / "keys").write_text(f"{line}\nnonsense\n")
    with pytest.raises(UserError, match="keys, line 2: must be an owner"):
        deployment.deploy(closed, ServeResources(), *arguments)
    answer = httpx.get(url, headers={"Authorization": f"Bearer {key}", "x-request-id": "mine"})
    assert answer.status_code == 200 and answer.headers.get_list("x-request-id") == ["mine"]
