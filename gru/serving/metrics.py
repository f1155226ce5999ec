"""What a replica counts, for Prometheus. https://prometheus.io/docs/practices/naming/"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gru.serving.choices import Generation
from gru.serving.loaded_model import LoadedModel

PATHS = ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Of one replica, whose name each sample bears. provider: the models that answer now."""

    def __init__(self, provider: Callable[[], Sequence[LoadedModel]], replica: str) -> None:
        self._replica = replica
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(provider))
        self._requests = Counter(
            "gru_http_requests", "Answered requests; 499: the client left", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "gru_http_request_seconds", "From the request to the answer's end", ["path"],
            buckets=REQUEST_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "gru_time_to_first_token_seconds", "From a request's arrival to its first token", ["version"],
            buckets=FIRST_TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "gru_tokens", "Tokens of prompts, found in the cache, and generated", ["version", "kind"],
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "gru_models_refused", "Versions that the registry named and that were not taken into service",
            registry=self.registry,
        )  # fmt: skip
        self.unreachable = Counter(
            "gru_registry_unreachable", "Looks at the registry that failed", registry=self.registry
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def generated(self, generation: Generation) -> None:
        """A generation is over."""
        version = generation.served.version.version
        if generation.first is not None:
            self._first.labels(version).observe(generation.first)
        self._tokens.labels(version, "prompt").inc(generation.prompt_tokens)
        self._tokens.labels(version, "cached").inc(generation.cached_tokens)
        self._tokens.labels(version, "generated").inc(generation.made_tokens)

    def page(self) -> bytes:
        return generate_latest(_Named(self.registry, self._replica))


class _Named(CollectorRegistry):
    """What is in a registry, with one more label: a scrape reaches one replica today, and another tomorrow."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        super().__init__()
        self._inner, self._label = registry, {"replica": replica}

    def collect(self) -> Iterator[Metric]:
        for metric in self._inner.collect():
            metric.samples = [each._replace(labels={**each.labels, **self._label}) for each in metric.samples]
            yield metric


class _Engines(Collector):
    """What the engines say of themselves when they are asked."""

    def __init__(self, provider: Callable[[], Sequence[LoadedModel]]) -> None:
        self._provider = provider

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauges = {
            name: GaugeMetricFamily(f"gru_{name}", words, labels=["version"])
            for name, words in {
                "requests_running": "Requests in a slot",
                "requests_waiting": "Requests in the queue",
                "tokens_in_flight": "Tokens that these requests may come to",
                "cached_states": "States of sessions and of beginnings of prompts",
                "cached_bytes": "Memory of these",
            }.items()
        }
        info = GaugeMetricFamily("gru_model_info", "Models that answer", labels=["model", "version", "alias", "digest"])
        for served in self._provider():
            engine, version = served.engine, served.version
            info.add_metric([version.name, version.version, served.alias, served.bundle.digest], 1)
            values = (engine.active, engine.waiting, engine.tokens_in_flight, len(engine.cache), engine.cache.bytes)
            for gauge, value in zip(gauges.values(), values, strict=True):
                gauge.add_metric([version.version], value)
        yield info
        yield from gauges.values()
