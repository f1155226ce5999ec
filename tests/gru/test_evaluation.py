import math

import pytest
import torch

from gru.config import ModelConfig, TokenizerConfig
from gru.corpus.tokenizer import train
from gru.evaluation import sample_texts, score
from gru.model.language_model import GRULanguageModel

TEXTS = ["The crow met the fox.", "狐狸遇見烏鴉。", "x"]


@pytest.mark.parametrize("lanes", [1, 3])
def test_scores_are_those_of_a_plain_loop(lanes: int) -> None:
    """With one lane, each token is predicted from all before it; more lanes only begin anew a few times."""
    torch.manual_seed(0)
    tokenizer = train(TokenizerConfig(kind="byte"), TEXTS)
    model = GRULanguageModel(ModelConfig(embedding=8, hidden=8), tokenizer.vocab_size)
    scores = score(model, tokenizer, TEXTS, lanes, 10**6)
    stream = [t for text in TEXTS for t in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]]
    tokens = torch.tensor([tokenizer.end_of_text, *stream])
    logits, _ = model(tokens[:-1, None], model.initial_state(1))
    nats = torch.nn.functional.cross_entropy(logits[:, 0], tokens[1:], reduction="sum").item()
    assert scores.nats == pytest.approx(nats, rel=1e-5 if lanes == 1 else 0.01)
    assert scores.tokens == len(stream)
    assert (scores.bytes, scores.characters) == (43, 29)
    assert scores.bits_per_byte == pytest.approx(scores.nats / math.log(2) / 43)
    assert scores.perplexity == pytest.approx(math.exp(scores.nats / len(stream)))


def test_scoring_stops_at_a_whole_document() -> None:
    tokenizer = train(TokenizerConfig(kind="byte"), TEXTS)
    model = GRULanguageModel(ModelConfig(embedding=8, hidden=8), tokenizer.vocab_size)
    first = score(model, tokenizer, iter(TEXTS), 1, 5)
    assert first.tokens == len(TEXTS[0]) + 1
    assert first.text == score(model, tokenizer, TEXTS[:1], 1, 10**6).text != score(model, tokenizer, TEXTS, 1, 99).text


def test_samples_begin_with_the_prompt_and_are_the_same_again() -> None:
    torch.manual_seed(0)
    tokenizer = train(TokenizerConfig(kind="char"), TEXTS)
    model = GRULanguageModel(ModelConfig(embedding=8, hidden=8), tokenizer.vocab_size).eval()
    first = sample_texts(model, tokenizer, "The", 20, [0.0, 1.0])
    assert all(text.startswith("The") for text in first)
    assert first == sample_texts(model, tokenizer, "The", 20, [0.0, 1.0])
