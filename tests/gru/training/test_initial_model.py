"""The model that training starts from: it is copied once, refused if it does not fit, and what it learned stays."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gru.config import CorpusConfig, ModelConfig, TokenizerConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.errors import UserError
from gru.registry.bundle import load_bundle, write_bundle
from gru.training import checkpoint as checkpoints
from gru.training.initial_model import InitialModel, fetch, load_weights
from gru.training.learner import Learner
from tests.conftest import fable_texts
from tests.gru.registry import bundles
from tests.gru.registry.bundles import LINEAGE

MODEL = ModelConfig(embedding=32, hidden=64, precision="fp32")
NIGHT = TrainConfig(steps=200, batch_size=16, sequence_length=24, warmup_steps=20)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind="char"), ["A crow met a fox."])


@pytest.fixture
def bundle(tmp_path: Path, tokenizer: Tokenizer) -> str:
    return bundles.write(tmp_path / "bundle", tokenizer, seed=1)


def fetched(path: str | Path, tmp_path: Path) -> InitialModel:
    model = fetch(str(path), str(tmp_path / "store"), "own")
    assert model is not None
    return model


def test_a_bundle_is_copied_under_its_digest(tmp_path: Path, bundle: str, tokenizer: Tokenizer) -> None:
    model = fetched(bundle, tmp_path)
    original = load_bundle(bundle)
    assert (model.name, model.digest, model.lineage()) == (bundle, original.digest, LINEAGE)
    assert Path(model.tokenizer_path).read_bytes() == tokenizer.json
    bundles.write(Path(bundle), tokenizer, seed=2)  # the path has another model now
    assert fetched(bundle, tmp_path).digest != model.digest
    weights = load_weights(model.directory)
    assert weights.keys() == original.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in original.model.state_dict().items())


def test_of_a_checkpoint_the_average_is_used_with_the_tokenizer_beside_it(
    tmp_path: Path, bundle: str, tokenizer: Tokenizer
) -> None:
    weights = load_bundle(bundle).model.state_dict()
    path = tmp_path / "run" / checkpoints.new_name(7)
    identity = {"tokenizer": tokenizer.digest, "model": bundles.CONFIG.model_dump()}
    state = {"step": 7, "identity": identity}
    checkpoints.save(checkpoints.Checkpoint({"model": {"x": torch.ones(1)}, "ema": weights}, state), str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read the tokenizer"):
        fetched(path, tmp_path)
    (tmp_path / "run" / "tokenizer.json").write_bytes(train_tokenizer(TokenizerConfig(kind="byte"), []).json)
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer of this checkpoint"):
        fetched(path, tmp_path)
    (tmp_path / "run" / "tokenizer.json").write_bytes(tokenizer.json)
    model = fetched(path, tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_weights(model.directory).items())
    model.require_fit(bundles.CONFIG, TokenizerConfig(), "none")
    assert model.lineage() is None


def test_what_is_no_model_or_is_damaged_is_refused_with_its_key(tmp_path: Path, bundle: str) -> None:
    with pytest.raises(
        UserError, match=r'^train\.init_from = ".*/none": no bundle and no checkpoint: .* NAME:VERSION$'
    ):
        fetched(tmp_path / "none", tmp_path)
    weights = Path(bundle) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r'^train\.init_from = ".*": .*/weights\.safetensors: its SHA-256 differs'):
        fetched(bundle, tmp_path)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("model", "tokenizer_keys", "message"),
    [
        ({"hidden": 16}, {}, r"model\.hidden = 16: .* has 8: set it to that, or leave out train\.init_from"),
        ({"cell": "lstm"}, {}, r'model\.cell = "lstm": .* has "gru"'),
        ({}, {"kind": "word"}, r'tokenizer\.kind = "word" is not "char", the kind of .* \(train\.init_from\)'),
        ({}, {"vocab_size": 257}, r"tokenizer\.vocab_size = 257 is less than 270, the vocabulary of "),
        ({}, {"path": "OTHER"}, r'tokenizer\.path = ".*" is another tokenizer than that of '),
        ({"dropout": 0.5, "precision": "bf16"}, {"kind": "char", "vocab_size": 300, "sample_bytes": 9}, None),
        ({}, {}, None),
        ({}, {"path": "SAME"}, None),
    ],
)
def test_another_shape_or_tokenizer_is_refused_with_its_key(
    tmp_path: Path, bundle: str, model: dict[str, Any], tokenizer_keys: dict[str, Any], message: str | None
) -> None:
    other = tmp_path / "other.json"
    other.write_bytes(train_tokenizer(TokenizerConfig(kind="byte"), []).json)
    paths = {"OTHER": str(other), "SAME": f"{bundle}/tokenizer.json"}
    tokenizer = TokenizerConfig(**{key: paths.get(value, value) for key, value in tokenizer_keys.items()})
    initial, config = fetched(bundle, tmp_path), bundles.CONFIG.model_copy(update=model)
    if message is None:
        initial.require_fit(config, tokenizer, "none")
        return
    with pytest.raises(UserError, match=message):
        initial.require_fit(config, tokenizer, "none")


def train(dataset: Dataset, config: TrainConfig, initial: InitialModel | None) -> tuple[Learner, float, float]:
    """Return the learner at the last step, and the held-out loss before the first step and after the last one."""
    manifest, segments = dataset.manifest, dataset.segments("train")
    order = LaneOrder([s.tokens for s in segments], config.seed, config.batch_size, config.sequence_length)
    learner = Learner(MODEL, config, manifest.vocab_size, manifest.end_of_text)
    if initial:
        learner.start_from(load_weights(initial.directory))
    heldout, threads = dataset.first_tokens("heldout", 20_000), torch.get_num_threads()
    torch.set_num_threads(1)  # such small matrices gain nothing from more
    before = learner.heldout_loss(heldout)
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), manifest.end_of_text, learner.lanes) as reader:
        while learner.step < config.steps:
            learner.train_step(*reader.batch(learner.step))
    after = learner.heldout_loss(heldout)
    torch.set_num_threads(threads)
    return learner, before, after


def test_the_second_night_reaches_the_first_nights_loss_in_a_tenth_of_the_steps(tmp_path: Path) -> None:
    """The corpus has grown. What was held out in the first night is not trained on in the second one."""
    texts = [text for _, text in fable_texts(random.Random(0), 3000)]
    source = tmp_path / "corpus.jsonl"

    def night(number: int, documents: list[str], tokenizer: TokenizerConfig) -> Dataset:
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        corpus = CorpusConfig(sources=[str(source)], heldout_share=0.05, segment_tokens=4096)
        return prepare(corpus, tokenizer, str(tmp_path / f"dataset-{number}"), lambda line: None)

    one = night(1, texts[:1500], TokenizerConfig(kind="char"))
    learner, _, first = train(one, NIGHT, None)
    path = str(tmp_path / "bundle")
    write_bundle(path, MODEL, learner.average.state_dict(), one.tokenizer(), LINEAGE)

    initial = fetched(path, tmp_path)
    two = night(2, texts, TokenizerConfig(path=initial.tokenizer_path))
    assert two.manifest.tokenizer_digest == one.manifest.tokenizer_digest
    assert set(one.texts("heldout")) < set(two.texts("heldout"))
    assert not set(one.texts("heldout")) & set(two.texts("train"))
    tenth = NIGHT.model_copy(update={"steps": NIGHT.steps // 10, "warmup_steps": 2})
    _, before, second = train(two, tenth, initial)
    assert second <= first
    assert second < before, "it learns from what is new"
    _, _, cold = train(two, tenth, None)
    assert cold > 2 * first, "the same steps from random weights"
