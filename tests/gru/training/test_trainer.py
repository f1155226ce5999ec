"""Tests of training under Ray Train, with two workers."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from gru.config import CorpusConfig, ModelConfig, TokenizerConfig, TrainConfig, TrainResources
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from gru.registry import tracking
from gru.training import checkpoint as checkpoints
from gru.training.learner import Learner
from gru.training.trainer import train
from gru.training.worker_loop import DIVERGENCE

MODEL = ModelConfig(embedding=32, hidden=32, dropout=0.1, precision="fp32")
CONFIG = TrainConfig(
    steps=60, batch_size=6, sequence_length=16, workers=2, threads=1, heldout_steps=20, checkpoint_seconds=0.5
)
RESOURCES = TrainResources()


@pytest.fixture(scope="module")
def dataset(fables: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    corpus = CorpusConfig(sources=[str(fables)], template="{text}", segment_tokens=8192)
    directory = str(tmp_path_factory.mktemp("dataset"))
    return prepare(corpus, TokenizerConfig(kind="char"), directory, lambda line: None)


def test_two_workers_follow_the_loss_of_one(dataset: Dataset, tmp_path: Path, mlflow_store: str) -> None:
    run = tracking.open_run("test", "key", "train")
    lines: list[str] = []
    last = train(MODEL, CONFIG, RESOURCES, dataset, str(tmp_path / "runs" / "r"), mlflow_store, run.id, lines.append)
    assert last.step == 60
    assert last.state["precision"] == "fp32"
    assert last.tensors["lanes"]["state"].shape == (1, 6, 32)
    assert len(checkpoints.paths(str(tmp_path / "runs" / "r"))) <= CONFIG.keep
    assert lines[-1].startswith("step 60/60, loss ")
    logged = run.history("train/loss")
    assert [step for step, _ in logged] == [10, 20, 30, 40, 50, 60]
    assert [step for step, _ in run.history("heldout/loss")] == [20, 40, 60]

    alone = Learner(MODEL, CONFIG, dataset.manifest.vocab_size, dataset.manifest.end_of_text)
    segments = dataset.segments("train")
    order = LaneOrder([segment.tokens for segment in segments], CONFIG.seed, CONFIG.batch_size, CONFIG.sequence_length)
    losses = []
    with LaneReader(
        order, lambda i: dataset.read_segment(segments[i]), dataset.manifest.end_of_text, alone.lanes
    ) as reader:
        for step in range(60):
            losses.append(float(alone.train_step(*reader.batch(step))))
    means = [sum(losses[i : i + 10]) / 10 for i in range(0, 60, 10)]
    assert [loss for _, loss in logged] == pytest.approx(means, rel=1e-4)

    second = train(MODEL, CONFIG, RESOURCES, dataset, str(tmp_path / "runs" / "r"), mlflow_store, run.id, lines.append)
    assert second.state == last.state, "a finished run is not trained again"
    with pytest.raises(UserError, match=r"its model\.embedding is 32, but this run's is 8"):
        other = ModelConfig(embedding=8)
        train(other, CONFIG, RESOURCES, dataset, str(tmp_path / "runs" / "r"), mlflow_store, run.id, print)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.chaos), 2])
def test_divergence_is_an_error_and_is_not_retried(
    dataset: Dataset, tmp_path: Path, mlflow_store: str, workers: int
) -> None:
    run = tracking.open_run("test", "other key", "train")
    config = CONFIG.model_copy(update={"workers": workers, "learning_rate": 1e30, "clip": 1e30})
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
