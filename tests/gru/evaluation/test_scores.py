import math

import pytest
import torch

from gru.config import TokenizerConfig
from gru.corpus.dataset import Dataset
from gru.corpus.tokenizer import train_tokenizer
from gru.evaluation.scores import read_heldout, score, score_ngrams, token_losses
from tests.gru.evaluation.models import TEXTS, small


@pytest.mark.parametrize("lanes", [1, 3])
def test_scores_equal_those_of_a_plain_loop(lanes: int) -> None:
    """With one lane, each token is predicted from all tokens before it; with more, the state is reset a few times."""
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


def test_the_heldout_text_has_no_more_bytes_than_the_limit() -> None:
    """A file of gigabytes may be one document. A character that the limit cuts is left out."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    size = len(TEXTS[0].encode())
    first = read_heldout(tokenizer, iter(TEXTS), size)
    assert len(first.tokens) == size + 1
    assert first.digest == read_heldout(tokenizer, TEXTS[:1], 10**6).digest != read_heldout(tokenizer, TEXTS, 99).digest
    cut = read_heldout(tokenizer, ["a" + "狐" * 1_000_000], 12)
    assert (cut.bytes, cut.characters) == (10, 4)
    model = small(tokenizer)
    assert score(model, first, 1).text_digest != score(model, first, 2).text_digest  # other tokens follow a reset


def test_the_ngram_model_beats_an_untrained_model(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 20_000)
    ngram = score_ngrams(dataset, heldout)
    untrained = score(small(tokenizer), heldout, 4)
    assert ngram.bits_per_byte < 0.7 < 4 < untrained.bits_per_byte
    assert (ngram.tokens, ngram.bytes) == (untrained.tokens, untrained.bytes)
    monkeypatch.setattr("gru.evaluation.scores.NGRAM_TOKENS", 25_000)
    assert ngram.bits_per_byte < score_ngrams(dataset, heldout).bits_per_byte < 1
