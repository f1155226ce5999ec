"""Each stage gets its [resources], which are not part of any key."""

from pathlib import Path
from typing import Any, cast

from ray.serve._private.build_app import build_app

from gru.config import PipelineConfig
from gru.serving import deployment
from jobs import stages
from jobs.results import PrepareResult, TrainResult

STAGES = ("prepare", "train", "evaluate")
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


def test_each_replica_gets_the_resources_of_serve(fables: Path, tmp_path: Path) -> None:
    def options(config: PipelineConfig) -> dict[str, Any]:
        built = deployment.application(config.serve, config.resources.serve, "poet", "http://mlflow:5000")
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

    assert keys({}) == keys({**dict.fromkeys(STAGES, RESOURCES), "train": {**RESOURCES, "gpus": 1}})
