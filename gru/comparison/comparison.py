"""A comparison: contenders trained for the same time, over several seeds, and reported in MLflow.

The record of a finished trial is kept in storage, and each recurrent model beside it as a bundle, so a comparison that
was interrupted continues with the next trial.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gru import storage
from gru.comparison import report
from gru.comparison.contenders import TRANSFORMER, Contender
from gru.comparison.trial import Conditions, TrialRecord, train_contender
from gru.config import PipelineConfig, content_key
from gru.digests import DIGESTS
from gru.model.interface import LanguageModel
from gru.registry import tracking
from gru.registry.bundle import write_bundle
from gru.registry.lineage import Lineage


@dataclass(frozen=True)
class Comparison:
    """The trials of all contenders and seeds under the same conditions."""

    config: PipelineConfig
    conditions: Conditions
    contenders: Sequence[Contender]
    seeds: Sequence[int]
    machine: str
    """Name of the hardware: results of different machines are not mixed."""
    progress: Callable[[str], None]

    @property
    def directory(self) -> str:
        """Where the records and bundles of trials under these conditions are stored."""
        measured = [self.conditions.lanes, self.conditions.heldout_bytes, self.config.train.heldout_tokens]
        digest = self.conditions.dataset.manifest.digest
        key = content_key("compare", digest, measured, self.conditions.seconds, self.machine)
        return storage.join(self.config.storage, "comparisons", key)

    @property
    def key(self) -> str:
        contenders = [(contender.name, contender.key) for contender in self.contenders]
        return content_key(self.directory.rsplit("/", 1)[1], contenders, list(self.seeds))

    def run(self, parent: str | None) -> dict[str, Any]:
        """Run all pending trials and log the report. Return the result as plain JSON.

        parent: id of the MLflow run that the comparison's run belongs to.
        """
        dataset, seconds = self.conditions.dataset, self.conditions.seconds
        trials: report.Trials = {contender.name: [] for contender in self.contenders}
        with tracking.stage_run(self.config.experiment, self.key, "compare", parent) as run:
            run.log_params(
                {
                    "seconds": seconds,
                    "seeds": len(self.seeds),
                    "contenders": ", ".join(trials),
                    "machine": self.machine,
                }
            )
            counts = {"train": dataset.manifest.train.model_dump(), "heldout": dataset.manifest.heldout.model_dump()}
            run.log_dataset(self.config.name, dataset.manifest.digest, dataset.directory, counts)
            for seed in self.seeds:
                for contender in self.contenders:
                    trials[contender.name].append(self._run_trial(contender, seed, run))
            result: dict[str, Any] = {
                "stage": "compare",
                "key": self.key,
                "run": run.id,
                "records": self.directory,
                "seconds": seconds,
                "contenders": report.summarise(trials),
            }
            if {"gru", TRANSFORMER} <= trials.keys():
                result["gru_beats_transformer"] = report.compare(trials, "gru", TRANSFORMER)
            run.client.log_text(run.id, report.table(result["contenders"]), "table.md")
            run.client.log_dict(run.id, {**result, "records": trials}, "comparison.json")
            for name in ("comparison.png", "comparison.svg"):
                run.client.log_figure(run.id, report.plot(trials, seconds), name)
        return result

    def bundles(self) -> dict[str, str]:
        """Return the path of each contender's bundle of the first seed that has one, by the contender's name.

        The Transformer has none, nor has a contender whose trials all diverged.
        """
        paths: dict[str, str] = {}
        for seed in self.seeds:
            for contender in self.contenders:
                path = self._path(contender, seed)
                if storage.exists(storage.join(path, DIGESTS)):
                    paths.setdefault(contender.name, path)
        return paths

    def _path(self, contender: Contender, seed: int) -> str:
        """Return the path of a trial's bundle, which is that of its record but for the suffix .json."""
        return storage.join(self.directory, f"{contender.name}-{contender.key}-{seed}")

    def _run_trial(self, contender: Contender, seed: int, parent: tracking.Run) -> TrialRecord:
        """Return the record of a trial, from storage if it is finished."""
        path = f"{self._path(contender, seed)}.json"
        name = f"{contender.name}, seed {seed}"
        key = content_key(self.key, contender.name, seed)
        if storage.exists(path) and tracking.is_finished(self.config.experiment, key):
            self.progress(f"{name}: done already")
            return storage.read_json(path)
        with tracking.stage_run(self.config.experiment, key, name, parent.id) as run:
            started = time.time()
            if storage.exists(path):
                self.progress(f"{name}: done already")
                record: TrialRecord = storage.read_json(path)
            else:
                record = self._train(contender, seed, path, run.id)
            _log_trial(run, record, started)
        return record

    def _train(self, contender: Contender, seed: int, path: str, run_id: str) -> TrialRecord:
        """Train a contender, and store its bundle and, last, its record."""
        name = f"{contender.name}, seed {seed}"

        def show(line: str) -> None:
            self.progress(f"{name}: {line}")

        show(f"training for {self.conditions.seconds:g} s")
        record, model = train_contender(contender, seed, self.conditions, show)
        if not (contender.transformer or record["diverged"]):
            self._write_bundle(path.removesuffix(".json"), contender, model, record["steps"], run_id)
        storage.write_json(path, record)
        show(_outcome(record))
        return record

    def _write_bundle(self, path: str, contender: Contender, model: LanguageModel, steps: int, run_id: str) -> None:
        dataset = self.conditions.dataset
        lineage = Lineage(
            run=run_id,
            checkpoint_step=steps,
            dataset=dataset.directory,
            dataset_digest=dataset.manifest.digest,
            tokenizer_digest=dataset.manifest.tokenizer_digest,
            sources=self.config.corpus.paths,
            versions={"torch": str(torch.__version__)},
        )
        write_bundle(path, contender.model, model.state_dict(), dataset.tokenizer(), lineage)


def _log_trial(run: tracking.Run, record: TrialRecord, started: float) -> None:
    """Log a record to the trial's MLflow run. started: when the trial started, in seconds since the epoch."""
    run.log_params({"contender": record["name"], "seed": record["seed"], **record["settings"]})
    run.log_points([{**point, "time": started + point["time"]} for point in record["points"]])
    scores = {"nats_per_character": record["nats_per_character"], "bits_per_byte": record["bits_per_byte"]}
    run.log_metrics(
        {
            "parameters": record["parameters"],
            "tokens_per_second": record["tokens_per_second"],
            **{name: score for name, score in scores.items() if score is not None},
        }
    )


def _outcome(record: TrialRecord) -> str:
    if record["diverged"]:
        return f"diverged: {record['diverged']}"
    return f"{record['bits_per_byte']:.4f} bits per byte, {record['tokens_per_second']:,.0f} tokens/s"
