"""The stages of a workflow: their names, their keys, and where their results lie on storage.

A stage's key is a digest of everything that its result depends on, so the same stage is never executed twice. A stage
is done when its result file exists, which its job writes last; `serve` is done while the endpoint answers.
"""

import json
import urllib.request
from dataclasses import dataclass
from typing import Any, Generic

from gru import storage
from gru.config import PipelineConfig, TrainConfig, content_key
from gru.config_stages import NO_MODEL
from gru.errors import UserError
from gru.network import url_of
from jobs.results import (
    EvaluateResult,
    PrepareResult,
    PromoteResult,
    R,
    ServeResult,
    StageResults,
    TrainResult,
    parse,
)

STAGES = ("prepare", "train", "evaluate", "promote", "serve")  # in the order of a workflow


@dataclass(frozen=True)
class Stage(Generic[R]):
    """A stage of one configuration; R is the type of its result."""

    name: str
    key: str
    path: str
    """Result file."""
    kind: type[R]
    """The type of the result, for reading it back."""

    @property
    def directory(self) -> str:
        return self.path.rsplit("/", 1)[0]

    def result(self) -> R | None:
        """Return the result; None if the stage is not done, or its result lacks what this version needs."""
        return parse(self.kind, storage.read_json(self.path)) if storage.exists(self.path) else None

    def require(self) -> R:
        """Return the result. Raises UserError if the stage is not done."""
        result = self.result()
        if result is None:
            raise UserError(f"stage {self.name} is not done for this config: run python -m jobs.{self.name} first")
        return result

    def commit(self, result: R) -> R:
        """Write the result, which marks the stage as done. Return it."""
        storage.write_json(self.path, result)
        return result


class PromotionStage(Stage[PromoteResult]):
    """A stage whose result is valid while the registry has the version; whether that is the champion is looked up."""

    def result(self) -> PromoteResult | None:
        from gru.registry import versions

        result = super().result()
        if result is None or not versions.exists(result["model"], result["version"], result["bundle"]):
            return None
        # The alias may have moved since: by a rollback, by hand, or to a better version.
        champion = versions.resolve(result["model"], versions.CHAMPION)
        is_champion = champion is not None and champion.version == result["version"]
        if is_champion == result["promoted"]:
            return result
        now = f"version {champion.version}" if champion else "no version"
        reason = f"it was promoted, but {now} is @{versions.CHAMPION} now"
        if is_champion:
            reason = "it was not promoted, but the alias was moved to it later"
        return {**result, "promoted": is_champion, "reason": reason}


@dataclass(frozen=True)
class EndpointStage(Stage[ServeResult]):
    """A stage whose result is a running endpoint; `path` is its URL."""

    model: str
    version: str
    settings: str
    """Content key of the [serve] section, the replicas' resources, and the storage: another pipeline's model may have
    the same name."""

    def result(self) -> ServeResult | None:
        try:
            with urllib.request.urlopen(f"{self.path}/ready", timeout=3) as response:
                served = json.load(response)
        except (OSError, ValueError):
            return None
        if [served.get(key) for key in ("model", "version", "settings")] != [self.model, self.version, self.settings]:
            return None
        return {"stage": self.name, "endpoint": self.path, "model": self.model, "version": self.version}


def of(name: str, config: PipelineConfig, dataset: str, results: StageResults) -> Stage[Any]:
    """Return the stage of that name, given the directory of the dataset and the results of the stages before it."""
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


def prepare_stage(config: PipelineConfig, directory: str | None = None) -> Stage[PrepareResult]:
    """The stage that makes the dataset in `directory`; None: the dataset of the sources' current content."""
    from gru.corpus.prepare import dataset_key

    if directory is None:
        key = dataset_key(config.corpus, config.tokenizer, store=config.storage)
        directory = storage.join(config.storage, "datasets", key)
    return Stage("prepare", directory.rsplit("/", 1)[1], storage.join(directory, "result.json"), PrepareResult)


def train_stage(config: PipelineConfig, prepared: PrepareResult) -> Stage[TrainResult]:
    """The stage that trains on this dataset, of a config whose initial model is looked up (`warm_start.pinned`).

    Its key leaves out the number of workers and how often they save, which do not change the result, and the name of
    the initial model beside its digest.
    """
    settings = config.train.model_dump(exclude={*TrainConfig.PLACEMENT, *TrainConfig.INITIAL})
    initial = [digest] if (digest := config.train.init_digest) not in (None, NO_MODEL) else []
    key = content_key("train", prepared["digest"], config.model, settings, *initial)
    return Stage("train", key, storage.join(config.storage, "runs", key, "result.json"), TrainResult)


def evaluate_stage(config: PipelineConfig, prepared: PrepareResult, trained: TrainResult) -> Stage[EvaluateResult]:
    """The stage that scores this model."""
    # 3: version of the measurements. Raise it when they change, so that older results are not used.
    key = content_key("evaluate", 3, trained["key"], prepared["heldout_digest"], config.evaluate)
    path = storage.join(config.storage, "runs", trained["key"], f"evaluation-{key}.json")
    return Stage("evaluate", key, path, EvaluateResult)


def promote_stage(config: PipelineConfig, trained: TrainResult, evaluated: EvaluateResult) -> PromotionStage:
    """The stage that registers this model."""
    key = content_key("promote", evaluated["key"], config.model_name, config.experiment)
    path = storage.join(config.storage, "runs", trained["key"], f"promotion-{key}.json")
    return PromotionStage("promote", key, path, PromoteResult)


def serve_stage(config: PipelineConfig) -> EndpointStage:
    """The stage that serves the current champion. Raises UserError if the model has none."""
    from gru.registry import versions

    champion = versions.resolve(config.model_name, versions.CHAMPION)
    if champion is None:
        raise UserError(f"model {config.model_name!r} has no @{versions.CHAMPION}: run python -m jobs.promote first")
    settings = content_key(config.serve, config.resources.serve, config.storage)
    key = content_key("serve", config.model_name, champion.version, settings)
    address = url_of(config.serve.host, config.serve.port)
    return EndpointStage("serve", key, address, ServeResult, config.model_name, champion.version, settings)
