"""Each stage gets its [resources], which are not part of any key."""

from pathlib import Path
from typing import Any, cast

import pytest
from ray.serve._private.build_app import build_app

from gru.config import PipelineConfig
from gru.config_stages import EvaluateResources, Resources
from gru.serving import deployment
from jobs import stages
from jobs.results import PrepareResult, TrainResult
from pipelines.ray_jobs import reservation

RESOURCES = {"cpus": 1, "memory": 100_000_000, "labels": {"pool": "big"}}


def config_of(corpus: Path, storage: Path, resources: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "storage": str(storage),
            "corpus": {"sources": [str(corpus)], "partition_bytes": 100_000},
            "tokenizer": {"kind": "byte"},
            "model": {"embedding": 16, "hidden": 16},
            "train": {"steps": 20, "batch_size": 4, "sequence_length": 16, "threads": 1},
            "registry": {"experiment": "test"},
            "resources": resources,
        }
    )


@pytest.mark.parametrize(
    ("resources", "granted"),
    [
        (Resources(cpus=0), {"num_cpus": 0, "num_gpus": None, "memory": None, "label_selector": {}}),
        (EvaluateResources(), {"num_cpus": 0, "num_gpus": 0, "memory": None, "label_selector": {}}),
        (
            EvaluateResources(cpus=2, gpus=1, memory=1000, labels={"pool": "gpu"}),
            {"num_cpus": 2, "num_gpus": 1, "memory": 1000, "label_selector": {"pool": "gpu"}},
        ),
    ],
)
def test_a_driver_reserves_the_resources_of_its_stage(resources: Resources, granted: dict[str, Any]) -> None:
    reserved = {name.removeprefix("entrypoint_"): value for name, value in reservation(resources).items()}
    assert reserved == granted


def test_each_replica_gets_the_resources_of_serve(fables: Path, tmp_path: Path) -> None:
    def options(config: PipelineConfig) -> dict[str, Any]:
        built = deployment.application(config.serve, config.resources.serve, "poet", "http://mlflow:5000", "s3://gru")
        [replica] = build_app(built, name="gru").deployments
        return replica.ray_actor_options

    granted = options(config_of(fables, tmp_path, {"serve": RESOURCES}))
    assert granted == {"num_cpus": 1, "memory": 100_000_000, "label_selector": {"pool": "big"}}
    assert options(config_of(fables, tmp_path, {})) == {"num_cpus": 0.5}


def test_keys_do_not_depend_on_resources(fables: Path, tmp_path: Path) -> None:
    def keys(resources: dict[str, Any]) -> list[str]:
        config = config_of(fables, tmp_path, resources)
        prepared = cast(PrepareResult, {"digest": "d", "heldout_digest": "h"})
        trained = cast(TrainResult, {"key": "t"})
        later = [stages.train_stage(config, prepared), stages.evaluate_stage(config, prepared, trained)]
        return [stage.key for stage in (stages.prepare_stage(config), *later)]

    with_gpu = {**RESOURCES, "gpus": 1}
    assert keys({}) == keys({"prepare": RESOURCES, "train": with_gpu, "evaluate": with_gpu})
