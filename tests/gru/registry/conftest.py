import pytest

from gru.config import TokenizerConfig
from gru.corpus.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind="char"), ["A crow met a fox."])
