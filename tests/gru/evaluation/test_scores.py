import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gru.config import CorpusConfig, EvaluateConfig, ModelConfig, TokenizerConfig
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.evaluation.context import context_losses
from gru.evaluation.samples import sample_and_search
from gru.evaluation.scores import read_heldout, score, score_ngrams, token_losses
from gru.generation.generate import generate_texts
from gru.model.language_model import GRULanguageModel

TEXTS = ["The crow met the fox.", "狐狸遇見烏鴉。", "x"]


def small(tokenizer: Tokenizer) -> GRULanguageModel:
    torch.manual_seed(0)
    return GRULanguageModel(ModelConfig(embedding=8, hidden=8), tokenizer.vocab_size).eval()


@pytest.mark.parametrize("lanes", [1, 3])
def test_scores_are_those_of_a_plain_loop(lanes: int) -> None:
    """With one lane, each token is predicted from all before it; more lanes only begin anew a few times."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    model = small(tokenizer)
    heldout = read_heldout(tokenizer, TEXTS, 10**6)
    scores = score(model, heldout, lanes)
    stream = [t for text in TEXTS for t in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]]
    tokens = torch.tensor([tokenizer.end_of_text, *stream])
    logits, _ = model(tokens[:-1, None], model.initial_state(1))
    losses = torch.nn.functional.cross_entropy(logits[:, 0], tokens[1:], reduction="none")
    nats = losses.sum().item()
    assert scores.nats == pytest.approx(nats, rel=1e-5 if lanes == 1 else 0.01)
    if lanes == 1:
        assert token_losses(model, heldout, 1) == pytest.approx(losses.detach().numpy(), rel=1e-4)
    assert scores.tokens == len(stream)
    assert (scores.bytes, scores.characters) == (43, 29)
    assert scores.bits_per_byte == pytest.approx(scores.nats / math.log(2) / 43)
    assert scores.bits_per_character == pytest.approx(scores.nats / math.log(2) / 29)
    assert scores.perplexity_per_character == pytest.approx(2**scores.bits_per_character)
    assert scores.perplexity_per_token == pytest.approx(math.exp(scores.nats / len(stream)))
    assert scores.bits_per_token == pytest.approx(math.log2(scores.perplexity_per_token))


def test_scoring_stops_at_a_whole_document() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    first = read_heldout(tokenizer, iter(TEXTS), 5)
    assert len(first.tokens) == len(TEXTS[0]) + 1
    assert first.digest == read_heldout(tokenizer, TEXTS[:1], 10**6).digest != read_heldout(tokenizer, TEXTS, 99).digest
    model = small(tokenizer)
    assert score(model, first, 1).text != score(model, first, 2).text  # other tokens follow a reset


def test_context_losses_are_those_of_models_started_anew() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    model = small(tokenizer)
    heldout = read_heldout(tokenizer, TEXTS * 4, 10**6)
    carried = token_losses(model, heldout, 1)
    reaches = context_losses(model, heldout, carried)
    assert [(r.first, r.last) for r in reaches] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 64),
        (65, 128),
    ]
    tokens = torch.from_numpy(heldout.tokens.astype(np.int64))
    room = len(tokens) - 128
    for reach in reaches[:3]:
        excess = []
        for start in range(0, room, -(-room // reach.starts)):
            window = tokens[start : start + reach.last + 1, None]
            logits, _ = model(window[:-1], model.initial_state(1))
            losses = torch.nn.functional.cross_entropy(logits[:, 0], window[1:, 0], reduction="none").detach().numpy()
            excess += list((losses - carried[start + 1 : start + reach.last + 1])[reach.first - 1 :])
        assert len(excess) == reach.starts * (reach.last - reach.first + 1)
        assert reach.excess == pytest.approx(np.mean(excess), abs=1e-6)
        assert reach.nats == pytest.approx(carried.mean() + np.mean(excess))
    # An untrained state forgets what it held within a few tokens.
    assert abs(reaches[0].excess) > 1e-4
    assert abs(reaches[-2].excess) < 1e-6


@pytest.mark.parametrize("tokens", range(1, 10))
def test_short_texts_have_short_contexts(tokens: int) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    model = small(tokenizer)
    heldout = read_heldout(tokenizer, ["x" * (tokens - 1)], 10**6)
    reaches = context_losses(model, heldout, token_losses(model, heldout, 1))
    assert sum(r.last - r.first + 1 for r in reaches) == (0, 1, 2, 2, 4, 4, 4, 4, 8)[tokens - 1]
    assert all(math.isfinite(r.nats) for r in reaches)


def test_samples_begin_with_the_prompt_and_are_the_same_again() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), TEXTS)
    model = small(tokenizer)
    first = generate_texts(model, tokenizer, "The", 20, [0.0, 1.0])
    assert all(text.startswith("The") for text in first)
    assert first == generate_texts(model, tokenizer, "The", 20, [0.0, 1.0])


@pytest.fixture(scope="module")
def dataset(fables: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    corpus = CorpusConfig(sources=[str(fables)], segment_tokens=20_000, heldout_share=0.05)
    directory = str(tmp_path_factory.mktemp("store") / "d")
    return prepare(corpus, TokenizerConfig(kind="char"), directory, lambda _: None)


def test_counting_beats_a_model_that_learned_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 20_000)
    counted = score_ngrams(dataset, heldout)
    untrained = score(small(tokenizer), heldout, 4)
    assert counted.bits_per_byte < 0.7 < 4 < untrained.bits_per_byte
    assert (counted.tokens, counted.bytes) == (untrained.tokens, untrained.bytes)
    monkeypatch.setattr("gru.evaluation.scores.NGRAM_TOKENS", 25_000)
    assert counted.bits_per_byte < score_ngrams(dataset, heldout).bits_per_byte < 1


def test_writing_is_compared_with_training_text_and_with_itself(dataset: Dataset) -> None:
    """These fables consist of the same sentences over and over; a model that learned nothing has none of them."""
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 20_000)
    settings = EvaluateConfig(prompt="The ", sample_tokens=300, temperatures=[1.0, 0.0, 1.0])
    model = small(tokenizer)
    writing = sample_and_search(model, tokenizer, settings, dataset, heldout)
    assert writing.heldout.copied_share is not None
    assert writing.heldout.copied_share > 0.9
    assert writing.copied[1.0].copied_share == 0.0
    assert writing.searched_bytes == dataset.manifest.train.bytes
    loop, chance = writing.copied[0.0].repetition, writing.copied[1.0].repetition
    assert loop is not None
    assert chance is not None
    assert loop > 0.5 > 0.1 > chance
    shown = generate_texts(model, tokenizer, "The ", 300, [1.0, 0.0])
    assert shown == ["The " + tokenizer.decode(writing.samples[t][0]) for t in (1.0, 0.0)]


def test_texts_too_short_for_any_span_have_no_shares(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 1000)
    settings = EvaluateConfig(prompt="", sample_tokens=3)
    writing = sample_and_search(small(tokenizer), tokenizer, settings, dataset, heldout)
    assert writing.heldout.measures() == writing.copied[1.0].measures() == {}
