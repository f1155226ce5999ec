"""What a finished pipeline must have, whether or not it was disturbed."""

import hashlib

import mlflow
import torch

from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import open_dataset
from gru.registry.bundle import load_bundle
from gru.training.learner import Learner
from jobs import entry
from tests.pipelines.pipeline import Pipeline


def assert_weights_are_those_of_training_alone(pipeline: Pipeline) -> None:
    """Assert that the registered weights have the bits of a training without Ray and without a pause."""
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
        [segment.tokens for segment in segments],
        config.train.seed,
        config.train.batch_size,
        config.train.sequence_length,
        dataset.segment_weights("train"),
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


def assert_mlflow_has_each_step_once(pipeline: Pipeline) -> None:
    """Assert that MLflow has all runs with the right status, and each logged step once."""
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
    assert sorted(steps) == list(range(10, pipeline.steps + 1, 10))
    heldout = client.get_metric_history(train.info.run_id, "heldout/loss")
    assert [metric.step for metric in heldout] == list(range(100, pipeline.steps + 1, 100))
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
