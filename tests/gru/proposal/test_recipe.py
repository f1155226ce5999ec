"""The recipe: near the presets on corpora of their sizes, and sensible elsewhere."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gru.config import ModelConfig, TrainConfig
from gru.model.language_model import GRULanguageModel
from gru.proposal.recipe import (
    Machine,
    TextFacts,
    parameters,
    propose_heldout,
    propose_tokenizer,
    propose_training,
)

PRESETS = Path(__file__).parents[3] / "pipelines" / "configs"


def machine(tokens_per_second: float, minutes: float, gpu: bool = False) -> Machine:
    return Machine(2, lambda: gpu, lambda model, train, vocab_size: tokens_per_second, minutes)


def values(settings: list[Any]) -> dict[str, Any]:
    assert all(setting.reason for setting in settings)
    return {setting.key: setting.value for setting in settings}


@pytest.mark.parametrize(
    ("preset", "facts", "size", "documents", "tokens", "plain", "vocab_size", "speed", "minutes"),
    [
        ("shakespeare", TextFacts(65, 64, 0.0), 1_115_394, 1, 1_115_395, True, 322, 62_200, 3),
        ("quickstart", TextFacts(300, 250, 0.0), 8.8e6, 449, 2_752_416, True, 2048, 24_500, 2.33),
        ("poetry", TextFacts(8500, 7000, 1.0), 63.6e6, 311_855, 23e6, False, 8192, 15_880, 30),
    ],
)
def test_the_recipe_is_near_the_preset_for_a_corpus_of_its_size(
    preset: str,
    facts: TextFacts,
    size: float,
    documents: float,
    tokens: float,
    plain: bool,
    vocab_size: int,
    speed: float,
    minutes: float,
) -> None:
    """The speeds are such that the steps of the preset fit into the time."""
    wanted = tomllib.loads((PRESETS / f"{preset}.toml").read_text())
    here = machine(speed, minutes)
    heldout = values(propose_heldout(size, documents, plain))
    assert heldout == {key: wanted["corpus"][key] for key in ("heldout", "heldout_share") if key in wanted["corpus"]}
    assert values(propose_tokenizer(facts, size, here)) == wanted["tokenizer"]
    training = propose_training(tokens * (1 - heldout.get("heldout_share", 0.01)), vocab_size, here)
    assert values(training.model) == wanted["model"]
    train = TrainConfig.model_validate(values(training.train))
    preset_train = TrainConfig.model_validate(wanted["train"])
    assert train.steps == pytest.approx(preset_train.steps, rel=0.05)
    assert train.learning_rate == preset_train.learning_rate
    assert train.weight_decay == pytest.approx(preset_train.weight_decay, rel=0.1)
    assert (train.batch_size, train.sequence_length) == (preset_train.batch_size, preset_train.sequence_length)
    assert training.minutes == pytest.approx(minutes, rel=0.05)


def test_a_text_that_is_read_often_needs_dropout_and_an_end() -> None:
    training = propose_training(1e6, 322, machine(50_000, 24 * 60))
    train = values(training.train)
    assert training.epochs == pytest.approx(40, rel=0.05)
    assert training.minutes < 20
    assert values(training.model)["dropout"] == 0.25
    assert "more often teaches little" in training.train[0].reason
    assert train["learning_rate"] == 2e-3


@pytest.mark.parametrize(("minutes", "seconds"), [(30, 1785), (2, 105), (0.4, 12)])
def test_the_start_of_the_workers_and_the_processes_of_ray_count(minutes: float, seconds: float) -> None:
    training = propose_training(1e9, 2048, machine(20_000, minutes))
    assert training.tokens_per_second == pytest.approx(16_000)
    assert values(training.train)["steps"] * 32 * 64 == pytest.approx(16_000 * seconds, rel=0.1)
    assert training.minutes == pytest.approx(minutes, rel=0.1)


def test_a_short_run_has_short_measurements() -> None:
    train = values(propose_training(23e6, 8192, machine(9_700, 2)).train)
    assert train["heldout_tokens"] == pytest.approx(0.15 * train["heldout_steps"] * 32 * 64, rel=0.25)
    assert "heldout_tokens" not in values(propose_training(23e6, 8192, machine(9_700, 30)).train)


def test_little_text_gets_a_narrow_model_and_few_lanes() -> None:
    training = propose_training(15_000, 322, machine(50_000, 30))
    assert values(training.model)["hidden"] == 256
    assert values(training.train)["batch_size"] == 8
    TrainConfig.model_validate(values(training.train))


def test_a_fast_machine_with_much_text_gets_a_wider_model() -> None:
    assert values(propose_training(1e9, 4096, machine(20_000, 30)).model)["hidden"] == 512
    assert values(propose_training(1e9, 4096, machine(2e5, 30)).model)["hidden"] == 1024
    assert values(propose_training(5e6, 4096, machine(2e5, 30)).model)["hidden"] == 512, "too little text for it"


def test_a_gpu_gets_the_model_of_its_preset() -> None:
    wanted = tomllib.loads((PRESETS / "gpu.toml").read_text())
    training = propose_training(1e9, 16_384, machine(1.64e6, 15, gpu=True))
    model, train = values(training.model), values(training.train)
    assert {key: model[key] for key in ("embedding", "hidden", "layers")} == {
        key: wanted["model"][key] for key in ("embedding", "hidden", "layers")
    }
    assert {key: train[key] for key in ("batch_size", "sequence_length", "learning_rate", "ema_decay")} == {
        key: wanted["train"][key] for key in ("batch_size", "sequence_length", "learning_rate", "ema_decay")
    }
    assert train["steps"] == pytest.approx(20_000, rel=0.05)
    assert values(training.resources) == wanted["resources"]


@pytest.mark.parametrize(("size", "vocab_size"), [(3e6, 1024), (9e6, 2048), (5e7, 4096), (1e10, 8192)])
def test_the_vocabulary_grows_with_the_text_that_is_read(size: float, vocab_size: int) -> None:
    tokenizer = values(propose_tokenizer(TextFacts(300, 250, 0.0), size, machine(40_000, 30)))
    assert tokenizer == {"kind": "bpe", "vocab_size": vocab_size}


def test_little_text_with_many_characters_is_not_tokenized_by_character() -> None:
    assert values(propose_tokenizer(TextFacts(900, 800, 0.1), 1e6, machine(1e4, 30)))["kind"] == "bpe"


@pytest.mark.parametrize(
    ("size", "documents", "plain", "heldout"),
    [
        (3e6, 1, True, {"heldout": "tail", "heldout_share": 0.1}),
        (3e6, 1, False, {"heldout_share": 0.1}),
        (1e8, 3, True, {"heldout": "tail", "heldout_share": 0.01}),
        (1e10, 1e6, False, {}),
    ],
)
def test_the_tail_of_a_few_texts_is_held_out(
    size: float, documents: float, plain: bool, heldout: dict[str, Any]
) -> None:
    assert values(propose_heldout(size, documents, plain)) == heldout


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("embedding", [32, 64])
def test_parameters_are_counted_as_the_model_has_them(layers: int, embedding: int) -> None:
    config = ModelConfig(embedding=embedding, hidden=64, layers=layers)
    built = GRULanguageModel(config, 300)
    assert parameters(config, 300) == sum(math.prod(parameter.shape) for parameter in built.parameters())


def test_the_facts_of_a_text() -> None:
    assert TextFacts.of(["白日依山盡,", "白日 ab!"]) == TextFacts(10, 2, 7 / 9)
