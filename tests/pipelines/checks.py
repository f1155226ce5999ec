"""What a finished pipeline must have, whether or not it was disturbed."""

import hashlib

import mlflow
import torch

from gru import load_bundle, open_dataset, train
from jobs import entry
from tests.pipelines.pipeline import Pipeline


def assert_weights_are_those_of_training_alone(pipeline: Pipeline) -> None:
    """Assert that the registered weights have the bits of a training without Ray and without a pause."""
    config = entry.load_config(pipeline.config, [])
    [manifest] = pipeline.storage.glob("datasets/*/manifest.json")
    dataset = open_dataset(str(manifest.parent))
    dataset.verify()
    alone = train(dataset, model=config.model.model_dump(), train=config.train.model_dump())
    [bundle] = pipeline.storage.glob("runs/*/bundle")
    served = load_bundle(bundle).model.state_dict()

    def digest(state: dict[str, torch.Tensor]) -> str:
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()

    assert digest(served) == digest(alone.model.state_dict())


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
    assert_the_run_over_all_stages_describes_the_model(client, runs["fables"], pipeline)
    train = runs["train"]
    samples = [file.path for file in client.list_artifacts(train.info.run_id, "samples")]
    assert samples == [f"samples/step-{step:06}.txt" for step in range(100, pipeline.steps + 1, 100)]
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
    assert version.description == runs["fables"].data.tags["mlflow.note.content"]


def assert_the_run_over_all_stages_describes_the_model(
    client: mlflow.MlflowClient, run: mlflow.entities.Run, pipeline: Pipeline
) -> None:
    """Assert that the workflow's run has training's key metrics, each step once, the scores, and the model card."""
    for name in ("train/loss", "train/tokens", "train/tokens_per_second"):
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in history) == list(range(10, pipeline.steps + 1, 10)), name
    for name in ("heldout/loss", "heldout/bits_per_byte"):
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in history) == list(range(100, pipeline.steps + 1, 100)), name
    bits = pipeline.result["bits_per_byte"]
    assert run.data.metrics["bits_per_byte"] == bits
    card = run.data.tags["mlflow.note.content"]
    assert card.startswith(f"**{bits:.3f} bits per byte**")
    assert f"**Training** {pipeline.steps:,} steps" in card and str(pipeline.corpus) in card
    assert pipeline.result["sample"] in card
    assert '"model": "fables:1"' in card
