from pathlib import Path

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare


@pytest.fixture(scope="package")
def dataset(fables: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    corpus = CorpusConfig(sources=[str(fables)], segment_tokens=20_000, heldout_share=0.05)
    directory = str(tmp_path_factory.mktemp("store") / "d")
    return prepare(corpus, TokenizerConfig(kind="char"), directory, lambda _: None)
