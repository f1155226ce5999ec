"""What [resources] says is what each stage is given, and no part of what is made."""

from pathlib import Path
from typing import Any

from ray.serve._private.build_app import build_app

from gru.config import PipelineConfig
from gru.serving import deployment
from jobs import stages

STAGES = ("prepare", "train", "evaluate")
GIVEN = {"cpus": 1, "memory": 100_000_000, "labels": {"pool": "big"}}


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
        made = [stages.train_stage(config, prepared), stages.evaluate_stage(config, prepared, trained)]
        return [stage.key for stage in (stages.prepare_stage(config), *made)]

    assert keys({}) == keys({**dict.fromkeys(STAGES, GIVEN), "train": {**GIVEN, "gpus": 1}})
