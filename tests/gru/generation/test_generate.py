"""Texts without an endpoint: whole, piece by piece, and continued."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from gru.config import TokenizerConfig
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.errors import UserError
from gru.generation.engine import StateNotCached
from gru.generation.generate import TextGenerator, generate, generate_ids
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import make_model


class Model(NamedTuple):
    model: GRULanguageModel
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def bundle() -> Model:
    """A model that learned nothing, with single bytes as tokens, whose documents do not end by chance."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    model = make_model(vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text)
    return Model(model, tokenizer)


@pytest.fixture
def generator(bundle: Model) -> Iterator[TextGenerator]:
    with TextGenerator(bundle) as generator:
        yield generator


def test_the_text_is_that_of_the_engine_whole_and_in_pieces(bundle: Model) -> None:
    options: dict[str, Any] = {"tokens": 60, "temperature": 0.9, "seed": 7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    params = SamplingParams(7, 0.9, 50, 0.9, 0.01, repetition_penalty=1.1)
    [ids] = generate_ids(bundle.model, bundle.tokenizer, "The crow", 60, [params])
    expected = bundle.tokenizer.decode(ids)
    assert generate(bundle, "The crow", repetition_penalty=1.1, **options) == expected
    pieces = list(generate(bundle, "The crow", stream=True, repetition_penalty=1.1, **options))
    assert len(pieces) > 1 and "".join(pieces) == expected


def test_a_random_seed_is_used_without_one(bundle: Model) -> None:
    assert generate(bundle, "a") != generate(bundle, "a")


def test_a_text_ends_before_a_stop_string(bundle: Model) -> None:
    whole = generate(bundle, "a", tokens=300, seed=1)
    stop = whole[40:42]
    assert generate(bundle, "a", tokens=300, seed=1, stop=stop) == whole[: whole.index(stop)]


def test_a_session_continues_until_a_text_of_it_is_closed(bundle: Model, generator: TextGenerator) -> None:
    greedy = SamplingParams(0, temperature=0)
    whole = generate(bundle, "a", tokens=50, temperature=0, seed=0)
    first = list(generator.stream("a", greedy, 20, session="s"))
    assert [piece.finish for piece in first] == [None] * (len(first) - 1) + ["length"]
    second = list(generator.stream("", greedy, 30, session="s", resume=True))
    assert "".join(piece.text for piece in first + second) == whole
    closed = generator.stream("a", greedy, 1_000_000, session="t")
    next(closed)
    closed.close()
    with pytest.raises(StateNotCached):
        next(generator.stream("", greedy, 30, session="t", resume=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens: must be an integer >= 1, not 0"),
        ({"temperature": -1}, "temperature: must be a number >= 0, not -1"),
        ({"temperature": float("nan")}, "temperature: must be a number >= 0, not nan"),
        ({"top_p": 0}, "top_p: must be a number > 0 and <= 1, not 0"),
        ({"top_k": -1}, "top_k: must be an integer >= 0, not -1"),
        ({"min_p": 2}, "min_p: must be a number from 0 to 1, not 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be a number > 0, not 0"),
        ({"stop": ["a", ""]}, "stop: must not be empty"),
    ],
)
def test_an_option_out_of_range_is_refused(bundle: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        generate(bundle, "a", **options)
    assert str(refused.value) == message
