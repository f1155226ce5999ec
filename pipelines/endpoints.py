"""What the endpoints of a storage's runs serve now, from their metrics."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from gru.network import url_of
from gru.terminal import counted
from pipelines import records
from pipelines.database import open_client

READ = 200  # workflows: a database may hold those of several storages
TIMEOUT = 10.0  # seconds
RATE_SECONDS = 1.0  # over which tokens per second are counted


@dataclass(frozen=True)
class ServedModel:
    name: str
    version: str
    alias: str
    since: float
    """Time since which each replica serves it, in seconds since the epoch."""


@dataclass(frozen=True)
class EndpointStatus:
    url: str
    problem: str | None
    """Why its state is unknown; None if it is known."""
    models: Sequence[ServedModel] = ()
    replicas: int = 0
    running: int = 0
    """Requests in a slot."""
    waiting: int = 0
    """Requests in the queue."""
    tokens_per_second: float = 0.0
    """Tokens generated in the last second."""


def of_storage(store: str, database: str, headers: dict[str, str]) -> list[EndpointStatus]:
    """Return the state of each endpoint that a run of this storage started and that answers.

    headers: of the requests, with the API key if there is one.
    """
    configs = [json.loads(run.config_json) for run in records.workflows(open_client(database), READ) if not run.label]
    served = [config["serve"] for config in configs if config["storage"] == store]
    urls = dict.fromkeys(url_of(serve["host"], serve["port"]) for serve in served)
    return [status for url in urls if (status := look(url, headers))]


def look(url: str, headers: dict[str, str]) -> EndpointStatus | None:
    """Ask the endpoint at `url` (http://HOST:PORT) for its state, which takes a second; None if none is there."""
    try:
        before, start = _Samples(url, headers), time.monotonic()
        time.sleep(RATE_SECONDS)
        now, seconds = _Samples(url, headers), time.monotonic() - start
    except urllib.error.HTTPError as error:
        problem = "it requires an API key: set GRU_API_KEY" if error.code == 401 else f"status {error.code}"
        return EndpointStatus(url, problem) if error.code == 401 or error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException):  # it is something else that has this port
        return None
    models = [
        ServedModel(each["model"], each["version"], each["alias"], now.latest_start(each["version"]))
        for each in now.labels("gru_model_info", "model", "version", "alias")
    ]
    if not models:
        return None
    generated = now.total("gru_engine_tokens_total", kind="generated")
    generated -= before.total("gru_engine_tokens_total", kind="generated")
    return EndpointStatus(
        url,
        None,
        models,
        len(now.labels("gru_model_info", "replica")),
        int(now.total("gru_requests_running")),
        int(now.total("gru_requests_waiting")),
        max(0.0, generated / seconds),  # less than 0 if a replica has ended
    )


class _Samples:
    """The samples of an endpoint's page of metrics."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        """Raises OSError if nothing answers, ValueError if it is no page of metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        request = urllib.request.Request(f"{url}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            page = answer.read().decode()
        self._samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def labels(self, name: str, *keys: str) -> list[dict[str, str]]:
        """Return the different values of these labels of a metric."""
        found = [{key: sample.labels[key] for key in keys} for sample in self._samples if sample.name == name]
        return [each for number, each in enumerate(found) if each not in found[:number]]

    def values(self, name: str, **labels: str) -> list[float]:
        """Return a metric's values of all replicas."""
        return [each.value for each in self._samples if each.name == name and labels.items() <= each.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all replicas."""
        return sum(self.values(name, **labels))

    def latest_start(self, version: str) -> float:
        """Return when the last replica began to serve a version, in seconds since the epoch."""
        return max(self.values("gru_model_since_seconds", version=version))


def lines(endpoints: Sequence[EndpointStatus]) -> list[str]:
    """Return the state of the endpoints for people."""
    return [line for endpoint in endpoints for line in _lines(endpoint)]


def _lines(endpoint: EndpointStatus) -> list[str]:
    if endpoint.problem:
        return [f"endpoint: {endpoint.url}: {endpoint.problem}"]
    served = [
        f"  {model.name}@{model.alias} is version {model.version} since "
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(model.since))}"
        for model in endpoint.models
    ]
    replicas = counted(endpoint.replicas, "replica")
    requests = f"{counted(endpoint.running, 'request')} running, {endpoint.waiting} waiting"
    return [f"endpoint: {endpoint.url}: {replicas}, {requests}, {endpoint.tokens_per_second:,.0f} tokens/s", *served]
