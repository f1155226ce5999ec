"""Training in this process, on a dataset or on texts in memory: no Ray, no MLflow, no checkpoints."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gru import config as configuration
from gru.config import CorpusConfig, ModelConfig, TokenizerConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader, Tokens
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from gru.registry.bundle import Bundle, load_bundle, write_bundle
from gru.registry.lineage import Lineage
from gru.registry.tracking import LOSS, Point
from gru.training.learner import Diverged, Learner, diverged, threads
from gru.training.meter import Meter


def train(
    data: Dataset | str | Iterable[str],
    *,
    tokenizer: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    progress: Callable[[Point], object] = lambda point: None,
) -> Bundle:
    """Train a model on the CPU in this process, and return its bundle, which `generate` takes and `save` writes.

    data: a dataset; or texts, each a document; or one long text. tokenizer, model, train: keys of these sections of the
    TOML file, as in `{"steps": 500}`; the keys about workers and checkpoints are not used. A dataset has its tokenizer
    already. The same dataset, `model` and `train` give the weights that `gru run` gives. The weights start at random.

    progress: called every `log_steps` steps and with each held-out loss, with a record of `step`, `time` (seconds since
    the epoch) and `metrics`, by the names that they have in MLflow. Losses are in nats per token.

    Raises UserError for a wrong key or value, if there is too little text, or if training diverges.
    """
    sections = {"tokenizer": tokenizer, "model": model, "train": train}
    table = {"corpus": {"sources": ["texts"]}, **{name: dict(values or {}) for name, values in sections.items()}}
    config = configuration.load(json.dumps(table))
    if config.train.init_from:
        raise UserError("train.init_from: only `gru run` starts from another model: leave it out")
    with tempfile.TemporaryDirectory(prefix="gru-train-") as temporary, _threads_of(config.train):
        if isinstance(data, Dataset):
            if tokenizer:
                raise UserError("tokenizer: the dataset has its tokenizer already: leave this argument out")
            dataset, place, sources = data, data.directory, data.manifest.corpus.paths
        else:
            dataset, place, sources = _prepare(data, config.tokenizer, Path(temporary)), "", []
        learner = _learn(dataset, config.model, config.train, progress)
        lineage = Lineage(
            run="",
            checkpoint_step=learner.step,
            dataset=place,
            dataset_digest=dataset.manifest.digest,
            tokenizer_digest=dataset.manifest.tokenizer_digest,
            sources=sources,
            versions={"torch": str(torch.__version__)},
        )
        bundle = f"{temporary}/bundle"
        write_bundle(bundle, config.model, learner.average.state_dict(), dataset.tokenizer(), lineage)
        return load_bundle(bundle)


@contextmanager
def _threads_of(config: TrainConfig) -> Iterator[None]:
    """Compute with as many threads as a training worker has that is alone on this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads(config, local_workers=1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(texts: str | Iterable[str], tokenizer: TokenizerConfig, directory: Path) -> Dataset:
    """Return a dataset of the texts in the directory. Their order decides nothing, and equal ones count once."""
    if isinstance(texts, str):
        source = directory / "text.txt"
        source.write_text(texts, encoding="utf-8")
    else:
        source = directory / "texts.jsonl"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(text)}\n" for text in texts)
    # One partition is prepared in this process.
    corpus = CorpusConfig(sources=[str(source)], partition_bytes=max(1, source.stat().st_size))
    return prepare(corpus, tokenizer, f"{directory}/dataset", lambda line: None)


def _learn(dataset: Dataset, model: ModelConfig, config: TrainConfig, progress: Callable[[Point], object]) -> Learner:
    """Return the learner after its last step."""
    end_of_text, segments = dataset.manifest.end_of_text, dataset.segments("train")
    order = LaneOrder(
        [segment.tokens for segment in segments],
        config.seed,
        config.batch_size,
        config.sequence_length,
        dataset.segment_weights("train"),
    )
    heldout = dataset.first_tokens("heldout", config.heldout_tokens)
    learner = Learner(model, config, dataset.manifest.vocab_size, end_of_text)

    def read(index: int) -> Tokens:
        return dataset.read_segment(segments[index])

    with LaneReader(order, read, end_of_text, learner.lanes) as reader:
        meter = Meter()
        while learner.step < config.steps:
            inputs_TB, targets_TB = reader.batch(learner.step)
            meter.add(learner.train_step(inputs_TB, targets_TB), inputs_TB.size)
            last = learner.step == config.steps
            measures = learner.step % config.heldout_steps == 0 or last
            if measures or learner.step % config.log_steps == 0:
                progress(_point(learner, meter, heldout if measures else None))
                meter = Meter()
    return learner


def _point(learner: Learner, meter: Meter, heldout: Tokens | None) -> Point:
    """Return the metrics of the steps since the last point, and the loss on `heldout` if it is not None.

    Raises UserError if the training has diverged.
    """
    try:
        norm = learner.confirm()
    except Diverged as divergence:
        raise diverged(str(divergence)) from None
    metrics = {
        LOSS: meter.mean_loss(),
        "train/gradient_norm": norm,
        "train/learning_rate": learner.learning_rate,
        "train/tokens_per_second": meter.rates()["train/tokens_per_second"],
    }
    if heldout is not None:
        metrics["heldout/loss"] = loss = learner.heldout_loss(heldout)
        if not math.isfinite(loss):
            raise diverged(f"the held-out loss is {loss} at step {learner.step}")
    return {"step": learner.step, "time": time.time(), "metrics": metrics}
