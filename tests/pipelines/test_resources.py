"""What [resources] says is what each stage is given, and no part of what is made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.serve._private.build_app import build_app
from ray.util.state import list_actors, list_nodes, list_tasks

from gru import tracking
from gru.config import PipelineConfig
from gru.network import free_port
from gru.serving import deployment
from jobs import stages
from pipelines import train_generator
from pipelines.ray_jobs import RayJobs

STAGES = ("prepare", "train", "evaluate")
GIVEN = {"cpus": 1, "memory": 100_000_000, "labels": {"pool": "big"}}


def config_of(corpus: Path, storage: Path, resources: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "storage": str(storage),
            "corpus": {"sources": [str(corpus)], "partition_bytes": 100_000},
            "tokenizer": {"kind": "byte"},
            "model": {"embedding": 16, "hidden": 16},
            "train": {"steps": 20, "lanes": 4, "window": 16, "threads": 1},
            "registry": {"experiment": "test"},
            "resources": resources,
        }
    )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, and two nodes beside it, of which the smaller one has a label."""
    head = {"num_cpus": 2, "dashboard_host": "127.0.0.1", "dashboard_port": free_port(), "include_dashboard": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=4)
        cluster.add_node(num_cpus=1, labels={"pool": "big"})
        yield cluster
    finally:
        cluster.shutdown()


def test_each_stage_computes_where_the_label_is(
    cluster: Cluster, fables: Path, tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(fables, tmp_path / "store", dict.fromkeys(STAGES, GIVEN))
    address = f"http://{cluster.webui_url}"
    jobs = RayJobs(address, None, {"MLFLOW_TRACKING_URI": mlflow_store})
    surroundings = train_generator.Surroundings(jobs, tmp_path, lambda *shown: None)
    monkeypatch.setattr(train_generator, "_surroundings", surroundings)
    parent, dataset = tracking.open_run("test", "key", "all").id, stages.prepare(config).directory
    results: dict[str, Any] = {}
    for stage in STAGES:
        results[stage] = train_generator.run_stage(stage, config.model_dump_json(), parent, dataset, results)

    [big] = [node.node_id for node in list_nodes(address) if node.labels.get("pool") == "big"]
    tasks = list_tasks(address, limit=10_000, detail=True)
    for name in ("Map(_task)", "RayTrainWorker.run_train_fn"):
        assert {task.node_id for task in tasks if task.name == name} == {big}
    assert {attempt.stage: attempt.details.driver_node_id == big for attempt in jobs.attempts()} == {
        "prepare": False,
        "train": False,
        "evaluate": True,
    }
    actors = [actor for actor in list_actors(address, detail=True) if actor.node_id == big]
    [job] = [actor.required_resources for actor in actors if actor.class_name == "JobSupervisor"]
    assert job == {"CPU": 1, "memory": 100_000_000}
    [worker] = [actor.required_resources for actor in actors if actor.class_name == "RayTrainWorker"]
    assert any(name.startswith("memory_group") and amount == 100_000_000 for name, amount in worker.items())


def test_each_replica_is_given_what_serve_has(fables: Path, tmp_path: Path) -> None:
    def options(config: PipelineConfig) -> dict[str, Any]:
        built = deployment.application(config.serve, config.resources.serve, "poet", "http://mlflow:5000")
        [generator] = build_app(built, name="gru").deployments
        return generator.ray_actor_options

    given = options(config_of(fables, tmp_path, {"serve": GIVEN}))
    assert given == {"num_cpus": 1, "memory": 100_000_000, "label_selector": {"pool": "big"}}
    assert options(config_of(fables, tmp_path, {})) == {"num_cpus": 0.5}


def test_what_is_made_has_the_same_name_wherever_it_is_made(fables: Path, tmp_path: Path) -> None:
    def keys(resources: dict[str, Any]) -> list[str]:
        config = config_of(fables, tmp_path, resources)
        prepared, trained = {"digest": "d", "heldout_digest": "h"}, {"key": "t"}
        made = [stages.train(config, prepared), stages.evaluate(config, prepared, trained)]
        return [stage.key for stage in (stages.prepare(config), *made)]

    assert keys({}) == keys({**dict.fromkeys(STAGES, GIVEN), "train": {**GIVEN, "gpus": 1}})
