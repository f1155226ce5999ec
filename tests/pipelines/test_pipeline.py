"""The result of a pipeline: its model, and what MLflow has of it."""

import urllib.request

import numpy as np
import pytest

from gru.corpus.dataset import open_dataset
from gru.evaluation import scores
from gru.model.inference import inference_model
from gru.registry.bundle import load_bundle
from tests.pipelines.checks import assert_mlflow_has_each_step_once, assert_weights_are_those_of_training_alone
from tests.pipelines.pipeline import Pipeline


def test_the_result_names_the_version_the_endpoint_and_the_run(pipeline: Pipeline) -> None:
    result = pipeline.result
    assert (result["model"], result["version"], result["endpoint"]) == ("fables", "1", pipeline.endpoint)
    assert result["bits_per_byte"] < 1.5
    assert result["sample"].startswith("The ")
    with urllib.request.urlopen(result["tracking"]) as response:
        assert response.status == 200


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


def test_its_weights_are_those_of_training_alone(pipeline: Pipeline) -> None:
    assert_weights_are_those_of_training_alone(pipeline)


def test_mlflow_has_each_step_once_and_the_right_status_of_every_run(pipeline: Pipeline) -> None:
    assert_mlflow_has_each_step_once(pipeline)
