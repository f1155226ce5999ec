"""A small model that learned nothing, and texts to score it on."""

import torch

from gru.config import ModelConfig
from gru.corpus.tokenizer import Tokenizer
from gru.model.language_model import GRULanguageModel

TEXTS = ["The crow met the fox.", "狐狸遇見烏鴉。", "x"]


def small(tokenizer: Tokenizer) -> GRULanguageModel:
    torch.manual_seed(0)
    return GRULanguageModel(ModelConfig(embedding=8, hidden=8), tokenizer.vocab_size).eval()
