"""Samples during training: they show the averaged weights, and training has the same bits with and without them."""

import pytest
import torch

from gru.config import ModelConfig, TokenizerConfig, TrainConfig
from gru.corpus.tokenizer import train_tokenizer
from gru.generation.generate import generate_ids
from gru.model.language_model import GRULanguageModel
from gru.model.precision import Precision
from gru.training.learner import Learner
from gru.training.sampler import PARAMS, TOKENS, sample_ids
from tests.gru.training.test_learner import tokens

TOKENIZER = train_tokenizer(TokenizerConfig(kind="char"), ["The crow met the fox."])
CONFIG = TrainConfig(steps=8, batch_size=4, sequence_length=16, warmup_steps=1)
PROMPT = TOKENIZER.encode("The crow").tolist()


def sampled(learner: Learner, lanes: int = 1) -> list[int]:
    assert isinstance(learner.average, GRULanguageModel)
    return sample_ids(learner.average, PROMPT, TOKENIZER.end_of_text, lanes)


def trained(model: ModelConfig, samples: list[list[int]] | None) -> Learner:
    """Train to the last step, with a sample after each step if `samples` is a list, which gets them."""
    learner = Learner(model, CONFIG, TOKENIZER.vocab_size, TOKENIZER.end_of_text)
    text = tokens().astype("int64")
    while learner.step < CONFIG.steps:
        start = 65 * learner.step
        window = text[start : start + 65]
        learner.train_step(window[:-1].reshape(4, 16).T, window[1:].reshape(4, 16).T)
        if samples is not None:
            samples.append(sampled(learner))
    return learner


@pytest.mark.parametrize(
    ("cell", "precision"), [("gru", "fp32"), ("gru", "bf16"), ("mingru", "fp32"), ("lstm", "bf16")]
)
def test_training_has_the_same_bits_with_samples(cell: str, precision: Precision) -> None:
    model = ModelConfig.model_validate(
        {"cell": cell, "embedding": 32, "hidden": 32, "layers": 2, "dropout": 0.2, "precision": precision}
    )
    samples: list[list[int]] = []
    without = trained(model, None)
    randomness = torch.random.get_rng_state()
    with_samples = trained(model, samples)
    assert torch.equal(torch.random.get_rng_state(), randomness)
    for stem, tensors in without.checkpoint({}).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(with_samples.checkpoint({}).tensors[stem][name], tensor), (stem, name)
    assert samples[0] != samples[-1], "the samples follow the weights"


def test_a_sample_is_what_the_endpoint_would_generate() -> None:
    learner = trained(ModelConfig(embedding=32, hidden=32, precision="fp32"), None)
    assert isinstance(learner.average, GRULanguageModel)
    assert [sampled(learner)] == generate_ids(learner.average, TOKENIZER, "The crow", TOKENS, [PARAMS])
    assert sampled(learner) == sampled(learner, lanes=4)
