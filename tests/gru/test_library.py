"""The front of the library: `from gru import ...`, and training in one process."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gru
from gru import generate, load_bundle, open_dataset, train
from gru.config import CorpusConfig, ModelConfig, TokenizerConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from gru.registry.tracking import Point
from gru.training.learner import Learner

TEXTS = [f"The {a} met the {b} by the river.\n" for a in ("fox", "crow", "lion") for b in ("hare", "mouse", "cat")]
CHAR = {"kind": "char"}
MODEL = {"embedding": 16, "hidden": 16, "dropout": 0.1}
TRAIN = {"steps": 5, "batch_size": 2, "sequence_length": 8, "threads": 1, "log_steps": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("library")
    (directory / "text.txt").write_text("".join(TEXTS))
    corpus = CorpusConfig(sources=[f"{directory}/text.txt"])
    return prepare(corpus, TokenizerConfig(kind="char"), f"{directory}/dataset", lambda line: None)


def test_each_name_is_imported_from_its_module_when_it_is_used() -> None:
    assert sorted(gru.__all__) == gru.__all__ == sorted(gru._MODULES)
    for name in gru.__all__:
        assert getattr(gru, name) is getattr(sys.modules[gru._MODULES[name]], name)
    with pytest.raises(AttributeError, match="module 'gru' has no attribute 'missing'"):
        gru.missing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    assert gru.__file__
    [checked] = [node for node in ast.parse(Path(gru.__file__).read_text()).body if isinstance(node, ast.If)]
    imported = {
        alias.name: each.module for each in checked.body if isinstance(each, ast.ImportFrom) for alias in each.names
    }
    assert imported == gru._MODULES


def test_importing_gru_imports_none_of_its_modules() -> None:
    script = "import sys, gru, jobs, pipelines; print([name for name in sys.modules if name.startswith(TOP)])"
    script = script.replace("TOP", "('gru.', 'jobs.', 'pipelines.')")
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_training_has_the_bits_of_the_learners_steps(dataset: Dataset) -> None:
    points: list[Point] = []
    bundle = train(open_dataset(dataset.directory), model=MODEL, train=TRAIN, progress=points.append)
    manifest, segments = dataset.manifest, dataset.segments("train")
    config = TrainConfig(**TRAIN)  # type: ignore[arg-type]
    learner = Learner(ModelConfig(**MODEL), config, manifest.vocab_size, manifest.end_of_text)
    order = LaneOrder([segment.tokens for segment in segments], 0, 2, 8)
    losses = []
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), manifest.end_of_text, learner.lanes) as reader:
        for step in range(config.steps):
            losses.append(float(learner.train_step(*reader.batch(step))))
    weights = bundle.model.state_dict()
    assert all(weights[name].equal(value) for name, value in learner.average.state_dict().items())
    assert [point["step"] for point in points] == [2, 4, 5]
    means = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    assert [point["metrics"]["train/loss"] for point in points] == pytest.approx(means)
    assert [point["metrics"].get("heldout/loss") for point in points] == [
        None,
        None,
        learner.heldout_loss(dataset.first_tokens("heldout", config.heldout_tokens)),
    ]
    assert (bundle.lineage.dataset, bundle.lineage.checkpoint_step) == (dataset.directory, 5)


@pytest.mark.parametrize("texts", [TEXTS, iter(TEXTS), "".join(TEXTS)])
def test_a_model_of_texts_is_saved_and_loaded(texts: object, tmp_path: Path) -> None:
    bundle = train(texts, tokenizer=CHAR, model=MODEL, train=TRAIN)  # type: ignore[arg-type]
    bundle.save(tmp_path / "model")
    loaded = load_bundle(tmp_path / "model")
    assert loaded.digest == bundle.digest and loaded.lineage == bundle.lineage
    assert generate(loaded, "The ", tokens=20, seed=3) == generate(bundle, "The ", tokens=20, seed=3)


def test_mistakes_are_reported_in_one_line(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="tokenizer: the dataset has its tokenizer already"):
        train(dataset, tokenizer=CHAR)
    with pytest.raises(UserError, match=r"train\.init_from: only `gru run` starts from another model"):
        train("text", train={"init_from": "pet@champion"})
    with pytest.raises(UserError, match=r"train\.step: unknown key; known here: steps, batch_size"):
        train(TEXTS, train={"step": 3})
    with pytest.raises(UserError, match=r"too few for train\.batch_size"):
        train(["short"], tokenizer=CHAR)
    with pytest.raises(UserError, match="no document"):
        train([], tokenizer=CHAR)
    with pytest.raises(UserError, match=r"training diverged: .*: lower train\.learning_rate"):
        train(dataset, model=MODEL, train={**TRAIN, "learning_rate": 1e38})
