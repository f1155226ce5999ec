"""Small bundles for tests, of a model that learned nothing."""

from pathlib import Path

import torch

from gru.config import ModelConfig
from gru.corpus.tokenizer import Tokenizer
from gru.model.language_model import GRULanguageModel
from gru.registry.bundle import write_bundle
from gru.registry.lineage import Lineage

CONFIG = ModelConfig(embedding=8, hidden=8)
LINEAGE = Lineage(
    run="run",
    checkpoint_step=1,
    dataset="store/datasets/d",
    dataset_digest="d",
    tokenizer_digest="t",
    sources=["corpus.txt"],
    versions={"torch": "2"},
)


def write(path: Path, tokenizer: Tokenizer, seed: int, lineage: Lineage = LINEAGE) -> str:
    torch.manual_seed(seed)
    model = GRULanguageModel(CONFIG, tokenizer.vocab_size)
    write_bundle(str(path), CONFIG, model.state_dict(), tokenizer, lineage)
    return str(path)
