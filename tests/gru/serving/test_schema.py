"""Valid and invalid requests generated from the OpenAPI schema: none of them causes a server error."""

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from gru.config import ServeConfig
from gru.serving.api import create_app
from tests.gru.serving.server import Server, listening, tiny_bundle

CONFIG = ServeConfig(slots=4, max_tokens=256, max_body_bytes=100_000, request_seconds=20)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Server("", CONFIG, tiny_bundle())
    engine = server.new_engine("1")
    with listening(create_app(lambda: server.models, CONFIG)) as server.url:
        yield server.url
    engine.close(drain=False)


@pytest.mark.slow
def test_no_request_makes_a_server_error(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    counts: Counter[str] = Counter()
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            response = case.call(timeout=60)
            assert response.status_code < 500, response.text
            counts[f"{case.method} {case.path} {response.status_code}"] += 1
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        check()
    for path in ("completions", "chat/completions", "responses"):
        assert counts[f"POST /v1/{path} 200"], counts  # some of them were valid
