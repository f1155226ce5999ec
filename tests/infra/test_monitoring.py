"""Prometheus' configuration and Grafana's dashboard: they name metrics that something publishes."""

import re
from pathlib import Path

from ray._private import ray_constants

from gru.config import ServeConfig
from gru.serving.metrics import Metrics
from tests.infra.files import (
    COMPOSE,
    DASHBOARD,
    PROMETHEUS,
    ROOT,
    values,
)


def test_prometheus_scrapes_addresses_that_answer() -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert set(PROMETHEUS) == {"global", "scrape_configs"} and set(jobs) == {"ray", "gru"}
    [directory, file] = jobs["ray"]["file_sd_configs"][0]["files"][0].rsplit("/", 1)
    assert file == ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    assert f"ray:{directory}" in COMPOSE["services"]["head"]["volumes"]
    assert f"ray:{directory}:ro" in COMPOSE["services"]["prometheus"]["volumes"]
    assert jobs["gru"]["metrics_path"] == "/metrics"
    assert jobs["gru"]["static_configs"] == [{"targets": [f"head:{ServeConfig().port}"]}]
    key = Path(jobs["gru"]["authorization"]["credentials_file"])
    assert key.parent == Path("/run/secrets") and key.name in COMPOSE["services"]["prometheus"]["secrets"]


def published() -> dict[str, set[str]]:
    """The labels of each metric of the endpoint, by its name in Prometheus."""
    metrics = Metrics(lambda: [], "replica")
    metrics.record_request("/v1/completions", 200, 0.1)
    metrics._first_token_seconds.labels("1").observe(0.1)
    metrics._tokens.labels("1", "generated").inc()
    labels_of: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels_of.setdefault(sample.name, set()).update(sample.labels, {"replica"})
        if not family.samples:  # of an engine, and no engine runs here
            labels = {"gru_model_info": {"model", "alias", "digest"}, "gru_engine_tokens": {"kind"}}
            name = family.name + ("_total" if family.type == "counter" else "")
            labels_of[name] = {"replica", "version"} | labels.get(family.name, set())
    return labels_of


def ray_metrics() -> set[str]:
    """Names of the metrics in Ray's own dashboards."""
    from ray.dashboard.modules.metrics import dashboards

    files = Path(dashboards.__file__).parent.glob("*panels.py")
    return set(re.findall(r"\bray_\w+", "".join(file.read_text() for file in files)))


def queries() -> list[str]:
    """The queries of the dashboard's panels."""
    return values(DASHBOARD["panels"], "expr")


def test_the_dashboard_queries_only_published_metrics() -> None:
    endpoint, ray = published(), ray_metrics()
    for query in queries():
        names = re.findall(r"\b(?:gru|ray)_\w+", query)
        assert names, query
        for metric in names:
            assert metric in endpoint or metric in ray, metric
        labels = set(re.findall(r'(\w+)=~?"', query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            labels |= {label.strip() for label in group.split(",")}
        if names[0] in endpoint:
            assert labels <= endpoint[names[0]], query


def test_the_dashboard_shows_every_metric_of_the_endpoint() -> None:
    shown = set(re.findall(r"\bgru_\w+", " ".join(queries())))
    families = {re.sub("_(bucket|sum|count)$", "", metric) for metric in published()}
    assert {re.sub("_(bucket|sum|count)$", "", metric) for metric in shown} == families


def test_the_dashboards_panels_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for area in (panel["gridPos"] for panel in panels)
        for x in range(area["x"], area["x"] + area["w"])
        for y in range(area["y"], area["y"] + area["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    [source] = DASHBOARD["templating"]["list"]
    assert {uid["uid"] for uid in values(panels, "datasource")} == {f"${{{source['name']}}}"}


def test_training_logs_the_metrics_that_the_dashboard_names() -> None:
    [text] = [panel["options"]["content"] for panel in DASHBOARD["panels"] if panel["type"] == "text"]
    source = "".join(file.read_text() for file in (ROOT / "gru" / "training").glob("*.py"))
    for metric in re.findall(r"`(\S+)`", text):
        assert f'"{metric}"' in source
