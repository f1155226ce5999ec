"""What each stage is called and where its result lives: named by what goes into it, so it is never made twice.

A stage is done when its result file exists, which its job writes last. Serving is done as long as the endpoint
answers.
"""

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from gru import storage
from gru.config import PipelineConfig, TrainConfig, content_key
from gru.errors import UserError

Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    name: str
    key: str
    path: str

    @property
    def directory(self) -> str:
        return self.path.rsplit("/", 1)[0]

    def result(self) -> Result | None:
        return storage.read_json(self.path) if storage.exists(self.path) else None

    def require(self) -> Result:
        """The result. Raises UserError if the stage is not done."""
        result = self.result()
        if result is None:
            raise UserError(f"{self.name} is not done for this config: run python -m jobs.{self.name} first")
        return result

    def commit(self, result: Result) -> Result:
        storage.write_json(self.path, result)
        return result


class PromotionStage(Stage):
    """A stage whose result stands as long as the registry has the version."""

    def result(self) -> Result | None:
        from gru.registry import versions

        result = super().result()
        there = result and versions.exists(result["model"], result["version"], result["bundle"])
        return result if there else None


@dataclass(frozen=True)
class EndpointStage(Stage):
    """A stage whose result is a running endpoint; `path` is its address."""

    model: str
    version: str
    settings: str
    """A key of the [serve] section and of what each replica is given."""

    def result(self) -> Result | None:
        try:
            with urllib.request.urlopen(f"{self.path}/ready", timeout=3) as response:
                served = json.load(response)
        except (OSError, ValueError):
            return None
        if [served.get(key) for key in ("model", "version", "settings")] != [self.model, self.version, self.settings]:
            return None
        return {"stage": self.name, "endpoint": self.path, "model": self.model, "version": self.version}


def of(name: str, config: PipelineConfig, dataset: str, results: dict[str, Result]) -> Stage:
    """The stage of that name, given the directory of the dataset and the results of the stages before it."""
    match name:
        case "prepare":
            return prepare_stage(config, dataset)
        case "train":
            return train_stage(config, results["prepare"])
        case "evaluate":
            return evaluate_stage(config, results["prepare"], results["train"])
        case "promote":
            return promote_stage(config, results["train"], results["evaluate"])
        case "serve":
            return serve_stage(config)
    raise AssertionError(name)


def prepare_stage(config: PipelineConfig, directory: str | None = None) -> Stage:
    """The stage of the dataset in `directory`, or else of the sources as they are now."""
    from gru.corpus.prepare import dataset_key

    if directory is None:
        directory = storage.join(config.storage, "datasets", dataset_key(config.corpus, config.tokenizer))
    return Stage("prepare", directory.rsplit("/", 1)[1], storage.join(directory, "result.json"))


def train_stage(config: PipelineConfig, prepared: Result) -> Stage:
    """How many workers train, and how often they save, is not part of what is made."""
    settings = config.train.model_dump(exclude=set(TrainConfig.PLACEMENT))
    key = content_key("train", prepared["digest"], config.model, settings)
    return Stage("train", key, storage.join(config.storage, "runs", key, "result.json"))


def evaluate_stage(config: PipelineConfig, prepared: Result, trained: Result) -> Stage:
    # 2: what is measured; results from before the last change to it lack something.
    key = content_key("evaluate", 2, trained["key"], prepared["heldout_digest"], config.evaluate)
    return Stage("evaluate", key, storage.join(config.storage, "runs", trained["key"], f"evaluation-{key}.json"))


def promote_stage(config: PipelineConfig, trained: Result, evaluated: Result) -> Stage:
    key = content_key("promote", evaluated["key"], config.model_name, config.experiment)
    return PromotionStage("promote", key, storage.join(config.storage, "runs", trained["key"], f"promotion-{key}.json"))


def serve_stage(config: PipelineConfig) -> EndpointStage:
    """Raises UserError if the model has no champion."""
    from gru.registry import versions

    champion = versions.resolve(config.model_name, versions.CHAMPION)
    if champion is None:
        raise UserError(f"model {config.model_name!r} has no @{versions.CHAMPION}: run python -m jobs.promote first")
    settings = content_key(config.serve, config.resources.serve)
    key = content_key("serve", config.model_name, champion.version, settings)
    address = f"http://{config.serve.host}:{config.serve.port}"
    return EndpointStage("serve", key, address, config.model_name, champion.version, settings)
