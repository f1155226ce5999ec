"""Tests of training under Ray Train, with two workers."""

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from gru.config import CorpusConfig, ModelConfig, TokenizerConfig, TrainConfig
from gru.config_stages import TrainResources
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from gru.registry import tracking
from gru.registry.bundle import write_bundle
from gru.training import checkpoint as checkpoints
from gru.training.initial_model import InitialModel, fetch, load_weights
from gru.training.learner import Learner
from gru.training.progress import sample_line
from gru.training.trainer import train
from gru.training.worker_loop import DIVERGENCE
from tests.gru.registry.bundles import LINEAGE
from tests.gru.training.runs import assert_same

MODEL = ModelConfig(embedding=32, hidden=32, dropout=0.1, precision="fp32")
CONFIG = TrainConfig(
    steps=60,
    batch_size=6,
    sequence_length=16,
    workers=2,
    bitwise_elastic=2,
    threads=1,
    heldout_steps=20,
    checkpoint_seconds=0.5,
)
RESOURCES = TrainResources()


@pytest.fixture(scope="module")
def dataset(fables: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    corpus = CorpusConfig(sources=[str(fables)], template="{text}", segment_tokens=8192)
    directory = str(tmp_path_factory.mktemp("dataset"))
    return prepare(corpus, TokenizerConfig(kind="char"), directory, lambda line: None)


def train_alone(learner: Learner, dataset: Dataset, steps: int) -> list[float]:
    """Train up to step `steps` in this process; return the losses."""
    segments, end_of_text, config = dataset.segments("train"), dataset.manifest.end_of_text, learner.config
    order = LaneOrder([segment.tokens for segment in segments], config.seed, config.batch_size, config.sequence_length)
    losses, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), end_of_text, learner.lanes) as reader:
        while learner.step < steps:
            losses.append(float(learner.train_step(*reader.batch(learner.step))))
    torch.set_num_threads(threads)
    return losses


def initial_model(dataset: Dataset, directory: Path) -> InitialModel:
    """Return a model to start from, whose weights are not those of the seed."""
    learner = Learner(MODEL, CONFIG, dataset.manifest.vocab_size, dataset.manifest.end_of_text)
    train_alone(learner, dataset, 5)
    path = str(directory / "bundle")
    write_bundle(path, MODEL, learner.average.state_dict(), dataset.tokenizer(), LINEAGE)
    initial = fetch(path, str(directory / "store"), "own")
    assert initial is not None
    return initial


def test_two_workers_equal_one_process_from_an_initial_model_to_the_last_step(
    dataset: Dataset, tmp_path: Path, mlflow_store: str
) -> None:
    """To the bit. Each step is logged once, and shown. Another run may start from the last checkpoint."""
    parent, run = tracking.open_run("test", "parent key", "pipeline"), tracking.open_run("test", "key", "train")
    lines: list[str] = []
    directory = str(tmp_path / "runs" / "r")
    initial = initial_model(dataset, tmp_path)
    options: dict[str, Any] = {"tracking_parent": parent.id, "prompt": "The fox", "initial": initial}
    last = train(MODEL, CONFIG, RESOURCES, dataset, directory, mlflow_store, run.id, lines.append, **options)
    assert last.step == 60
    assert last.state["precision"] == "fp32"
    assert last.tensors["lanes"]["state"].shape == (1, 6, 32)
    assert len(checkpoints.paths(directory)) <= CONFIG.keep
    assert lines[-1].startswith("step 60/60, 0:00 left, ")
    logged = run.history("train/loss")
    assert [step for step, _ in logged] == [10, 20, 30, 40, 50, 60]
    heldout = run.history("heldout/loss")
    assert [step for step, _ in heldout] == [20, 40, 60]
    assert last.state["heldout_losses"] == [loss for _, loss in heldout]
    assert (parent.history("train/loss"), parent.history("heldout/loss")) == (logged, heldout)
    assert parent.history("train/tokens")[-1] == (60, 60 * CONFIG.batch_size * CONFIG.sequence_length)
    shown = [line for line in lines if line.startswith("sample at step ")]
    assert [line.split(":")[0] for line in shown] == [f"sample at step {step}" for step in (20, 40, 60)]
    assert all(": The fox" in line for line in shown)
    samples = [file.path for file in run.client.list_artifacts(run.id, "samples")]
    assert samples == [f"samples/step-{step:06}.txt" for step in (20, 40, 60)]
    text = mlflow.artifacts.load_text(f"runs:/{run.id}/{samples[-1]}")
    assert shown[-1] == sample_line(60, text)
    decoded = dataset.tokenizer().decode_bytes(dataset.first_tokens("heldout", CONFIG.heldout_tokens))
    tokens = len(dataset.first_tokens("heldout", CONFIG.heldout_tokens))
    in_bits = [loss * tokens / len(decoded) / math.log(2) for _, loss in heldout]
    assert [value for _, value in parent.history("heldout/bits_per_byte")] == pytest.approx(in_bits)

    alone = Learner(MODEL, CONFIG, dataset.manifest.vocab_size, dataset.manifest.end_of_text)
    alone.start_from(load_weights(initial.directory))
    losses = train_alone(alone, dataset, 60)
    assert_same(last, alone)
    means = [sum(losses[i : i + 10]) / 10 for i in range(0, 60, 10)]
    assert [loss for _, loss in logged] == pytest.approx(means, rel=1e-4)

    second = train(MODEL, CONFIG, RESOURCES, dataset, directory, mlflow_store, run.id, print, initial=initial)
    assert second.state == last.state, "a finished run is not trained again"
    with pytest.raises(UserError, match=rf"its initial is {initial.digest}, but this run's is None"):
        train(MODEL, CONFIG, RESOURCES, dataset, directory, mlflow_store, run.id, print)
    with pytest.raises(UserError, match=r"its model\.embedding is 32, but this run's is 8"):
        other = ModelConfig(embedding=8)
        train(other, CONFIG, RESOURCES, dataset, directory, mlflow_store, run.id, print, initial=initial)
    from_checkpoint = fetch(str(last.path), str(tmp_path / "store"), "own")
    assert from_checkpoint is not None
    weights = load_weights(from_checkpoint.directory)
    assert all(torch.equal(weights[name], tensor) for name, tensor in last.average.items())


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.chaos), 2])
def test_divergence_is_an_error_and_is_not_retried(
    dataset: Dataset, tmp_path: Path, mlflow_store: str, workers: int
) -> None:
    run = tracking.open_run("test", "other key", "train")
    changes = {"workers": workers, "bitwise_elastic": 0, "learning_rate": 1e30, "clip": 1e30}
    config = CONFIG.model_copy(update=changes)
    directory = tmp_path / "runs" / "r"
    lines: list[str] = []
    with pytest.raises(UserError, match=r"training diverged: the gradient's norm is \w+ at step \d+ in \d of 6 lanes"):
        train(MODEL, config, RESOURCES, dataset, str(directory), mlflow_store, run.id, lines.append)
    assert not any("failure" in line for line in lines)
    report = json.loads((directory / DIVERGENCE).read_text())
    [newest, *_] = checkpoints.paths(str(directory))
    saved = checkpoints.load(newest)
    assert saved.step == report["step"] - 1
    assert all(bool(tensor.isfinite().all()) for tensor in saved.tensors["model"].values())
    order = LaneOrder(
        [s.tokens for s in dataset.segments("train")], config.seed, config.batch_size, config.sequence_length
    )
    epoch, start, stop = order.window_of(saved.step)
    segments, end_of_text, tokenizer = dataset.segments("train"), dataset.manifest.end_of_text, dataset.tokenizer()
    for suspect in report["lanes"]:
        documents = [dataset.document(int(name, 16)) for name in suspect["documents"]]
        texts = [text for _, text in filter(None, documents)]
        assert len(texts) == len(suspect["documents"]) > 0
        for segment, first, after in order.slices(epoch, suspect["lane"], start, stop):
            tokens = dataset.read_segment(segments[segment])[first:after]
            for part in np.split(tokens, np.flatnonzero(tokens == end_of_text)):
                assert any(tokenizer.decode(part[part != end_of_text]) in text for text in texts)


def test_a_corpus_smaller_than_one_window_for_each_lane_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"batch_size": 1000, "sequence_length": 1000})
    with pytest.raises(UserError, match=r"too few for train.batch_size = 1000"):
        train(MODEL, config, RESOURCES, dataset, str(tmp_path / "runs" / "r"), mlflow.get_tracking_uri(), "none", print)
