"""Prometheus metrics of the replicas. https://prometheus.io/docs/practices/naming/"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gru.serving.choices import Generation
from gru.serving.loaded_model import ModelProvider

PATHS = (
    *("/", "/health", "/ready", "/metrics", "/tokenize", "/detokenize", "/tokenizer_info"),
    *("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses"),
)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600)

log = logging.getLogger(__name__)

AllReplicas = Callable[[], Awaitable[Sequence[list[Metric]]]]
"""Returns what `Metrics.collect` returns in each replica. Raises any exception if one does not answer."""


class Metrics:
    """The metrics of one replica, whose name is a label of each sample."""

    def __init__(self, provider: ModelProvider, replica: str) -> None:
        self._replica = replica
        self.all_replicas: AllReplicas | None = None
        """None: there are no other replicas."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(provider))
        self._requests = Counter(
            "gru_http_requests", "Answered requests; status 499: the client left", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "gru_http_request_seconds", "Seconds from the request to the end of the response", ["path"],
            buckets=REQUEST_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._first_token_seconds = Histogram(
            "gru_time_to_first_token_seconds", "Seconds from the request to its first token", ["version"],
            buckets=FIRST_TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "gru_tokens", "Tokens by kind: prompt, cached (prompt tokens found in the cache), generated",
            ["version", "kind"], registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "gru_models_refused", "Failed attempts to load a version that the registry names", registry=self.registry
        )
        self.unreachable = Counter(
            "gru_registry_unreachable", "Failed requests to the registry", registry=self.registry
        )  # fmt: skip

    def record_request(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request that has been answered."""
        path = path if path in PATHS else "other"
        self._requests.labels(path, status).inc()
        self._request_seconds.labels(path).observe(seconds)

    def record_generation(self, generation: Generation) -> None:
        """Count the tokens of a generation that has ended."""
        version = generation.model.version.version
        if generation.first_token_seconds is not None:
            self._first_token_seconds.labels(version).observe(generation.first_token_seconds)
        self._tokens.labels(version, "prompt").inc(generation.prompt_tokens)
        self._tokens.labels(version, "cached").inc(generation.cached_tokens)
        self._tokens.labels(version, "generated").inc(generation.generated_tokens)

    def collect(self) -> list[Metric]:
        """Return the metrics of this replica."""
        metrics = list(self.registry.collect())
        for metric in metrics:
            metric.samples = [
                each._replace(labels={**each.labels, "replica": self._replica}) for each in metric.samples
            ]
        return metrics

    async def page(self) -> bytes:
        """Return the metrics of all replicas in Prometheus' text format; of this one alone if another is silent."""
        replicas: Sequence[list[Metric]] = [self.collect()]
        if self.all_replicas is not None:
            try:
                replicas = await self.all_replicas()
            except Exception as error:  # of Serve, of Ray, or of a replica that ends
                log.warning("the metrics are those of one replica, because another did not answer: %r", error)
        return generate_latest(_Merged(replicas))


class _Merged(CollectorRegistry):
    """The metrics of several replicas, each metric once with the samples of all."""

    def __init__(self, replicas: Iterable[list[Metric]]) -> None:
        super().__init__()
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for metrics in self._replicas:
            for metric in metrics:
                first = merged.setdefault(metric.name, metric)
                if first is not metric:
                    first.samples += metric.samples
        return merged.values()


class _EngineCollector(Collector):
    """Metrics that are read from the engines at each scrape."""

    def __init__(self, provider: ModelProvider) -> None:
        self._provider = provider

    def collect(self) -> Iterable[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"gru_{name}", text, labels=["version"])
            for name, text in {
                "requests_running": "Requests in a slot",
                "requests_waiting": "Requests in the queue",
                "tokens_in_flight": "Prompt tokens and max_tokens of these requests",
                "cached_states": "Cached states of sessions and of prompt prefixes",
                "cached_bytes": "Memory of the cached states",
                "model_since_seconds": "Time since which the model serves, in seconds since the epoch",
            }.items()
        }
        info = GaugeMetricFamily("gru_model_info", "Models that serve", labels=["model", "version", "alias", "digest"])
        tokens = CounterMetricFamily(
            "gru_engine_tokens", "Tokens of all requests, open ones too, by kind: read, generated",
            labels=["version", "kind"],
        )  # fmt: skip
        for model in self._provider():
            engine, version = model.engine, model.version
            info.add_metric([version.name, version.version, model.alias, model.bundle.digest], 1)
            tokens.add_metric([version.version, "read"], engine.tokens_read)
            tokens.add_metric([version.version, "generated"], engine.tokens_generated)
            values = (
                *(engine.active, engine.waiting, engine.tokens_in_flight),
                *(len(engine.cache), engine.cache.bytes, model.since),
            )
            for gauge, value in zip(gauges.values(), values, strict=True):
                gauge.add_metric([version.version], value)
        yield info
        yield tokens
        yield from gauges.values()
