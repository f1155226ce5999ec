"""The result of a pipeline that was killed with SIGKILL in every stage and finished by the same command."""

import hashlib
import urllib.request

import mlflow
import numpy as np
import pytest
import torch

from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import open_dataset
from gru.evaluation import scores
from gru.model.inference import inference_model
from gru.registry.bundle import load_bundle
from gru.training.learner import Learner
from jobs import entry
from tests.pipelines.pipeline import STEPS, Pipeline


def test_the_result_names_the_version_the_endpoint_and_the_run(pipeline: Pipeline) -> None:
    result = pipeline.result
    assert (result["model"], result["version"], result["endpoint"]) == ("fables", "1", pipeline.endpoint)
    assert result["bits_per_byte"] < 1.5
    assert result["sample"].startswith("The ")
    with urllib.request.urlopen(result["tracking"]) as response:
        assert response.status == 200


def test_killed_and_resumed_training_ends_with_the_weights_of_an_undisturbed_one(pipeline: Pipeline) -> None:
    config = entry.load_config(pipeline.config, [])
    [manifest] = pipeline.storage.glob("datasets/*/manifest.json")
    dataset = open_dataset(str(manifest.parent))
    dataset.verify()
    segments = dataset.segments("train")
    end_of_text, vocab_size = dataset.manifest.end_of_text, dataset.manifest.vocab_size
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads)
    undisturbed = Learner(config.model, config.train, vocab_size, end_of_text)
    order = LaneOrder(
        [s.tokens for s in segments], config.train.seed, config.train.batch_size, config.train.sequence_length
    )
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), end_of_text, undisturbed.lanes) as reader:
        for step in range(config.train.steps):
            undisturbed.train_step(*reader.batch(step))
    torch.set_num_threads(threads)
    [bundle] = pipeline.storage.glob("runs/*/bundle")
    served = load_bundle(bundle).model.state_dict()

    def digest(state: dict[str, torch.Tensor]) -> str:
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()

    assert digest(served) == digest(undisturbed.average.state_dict())


def test_rounded_weights_for_inference_score_as_well_as_the_original(pipeline: Pipeline) -> None:
    [bundle] = (load_bundle(path) for path in pipeline.storage.glob("runs/*/bundle"))
    rounded = inference_model(bundle.model)
    assert rounded is not bundle.model
    [manifest] = pipeline.storage.glob("datasets/*/manifest.json")
    dataset = open_dataset(str(manifest.parent))
    tokens = np.concatenate([dataset.read_segment(segment) for segment in dataset.segments("heldout")])
    heldout = scores.HeldoutText(tokens, dataset.manifest.end_of_text, len(tokens), len(tokens), "")
    exact, served = (scores.token_losses(model, heldout, 8).mean() for model in (bundle.model, rounded))
    assert served == pytest.approx(exact, rel=0.002)


def test_mlflow_has_each_step_once_and_the_right_status_of_every_run(pipeline: Pipeline) -> None:
    client = mlflow.MlflowClient(pipeline.tracking)
    experiment = client.get_experiment_by_name("fables")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"fables", "prepare", "train", "evaluate", "promote"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["fables"].info.run_id
    assert all(
        run.data.tags["mlflow.parentRunId"] == parent for name, run in runs.items() if name != "fables"
    )  # fmt: skip
    train = runs["train"]
    steps = [metric.step for metric in client.get_metric_history(train.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(10, STEPS + 1, 10))
    heldout = client.get_metric_history(train.info.run_id, "heldout/loss")
    assert [metric.step for metric in heldout] == list(range(100, STEPS + 1, 100))
    assert heldout[-1].value < heldout[0].value
    assert train.inputs.dataset_inputs[0].dataset.name == "fables"
    assert "system/cpu_utilization_percentage" in train.data.metrics
    assert "loss.png" in [file.path for file in client.list_artifacts(train.info.run_id)]
    evaluated = runs["evaluate"]
    assert len(client.list_artifacts(evaluated.info.run_id, "samples")) == 3
    assert {"context.png", "context.json"} <= {file.path for file in client.list_artifacts(evaluated.info.run_id)}
    assert {"ngram_bits_per_byte", "heldout/copied_share", "temperature-1/repetition"} <= set(evaluated.data.metrics)
    version = client.get_model_version_by_alias("fables", "champion")
    assert float(version.tags["bits_per_byte"]) == pipeline.result["bits_per_byte"]
