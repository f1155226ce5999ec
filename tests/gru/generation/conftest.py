"""A small model, and an engine for it."""

from collections.abc import Iterator

import pytest

from gru.generation.engine import Engine
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import END, make_model


@pytest.fixture(scope="module")
def model() -> GRULanguageModel:
    return make_model()


@pytest.fixture
def engine(model: GRULanguageModel) -> Iterator[Engine]:
    engine = Engine(model, END, slots=8, max_queue=100)
    yield engine
    engine.close(drain=False)
    assert engine.join(10)
