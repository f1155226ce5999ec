"""The model card: what it says, and that nothing in it leaves its code block."""

import json
import re
import shlex
from typing import Any

import pytest

from gru import config as configuration
from gru.config import PipelineConfig
from jobs.model_card import MOST_CHARACTERS, curl, fenced, model_card
from jobs.results import StageResults

SAMPLE = "class A:\n```\n````\n<script>alert(1)</script> **x**\n# y\x1b[2J"
DONE: Any = {
    "prepare": {"documents": 3000, "bytes": 8_800_000, "tokens": 2_753_202, "vocabulary": 2048},
    "train": {"steps": 1200, "heldout_loss": 3.3114, "run": "r"},
    "evaluate": {
        **{"bits_per_byte": 1.5744, "nats_per_character": 1.0914, "ngram_bits_per_byte": 1.9},
        "samples": [SAMPLE, "other"],
    },
    "promote": {"model": "fables", "version": "3"},
}


def config(**changes: Any) -> PipelineConfig:
    table = {"name": "fables", "corpus": {"sources": ["a_*.txt", "b`c.txt"]}, "evaluate": {"prompt": 'It\'s "so" '}}
    return configuration.load(json.dumps(table | changes))


def done(*names: str) -> StageResults:
    return {name: DONE[name] for name in names}  # type: ignore[return-value]


def blocks(card: str) -> list[str]:
    """The contents of the code blocks."""
    return [block for _, block in re.findall(r"^(`{3,}|~{3,})\w+\n(.*?)\n\1$", card, re.M | re.S)]


def test_a_card_grows_with_the_stages() -> None:
    first = model_card(config(), {})
    assert first == "**Model** gru, 1 x 384, embedding 384  \n**Dataset** `a_*.txt`, `` b`c.txt ``"
    prepared = model_card(config(), done("prepare"))
    assert "vocabulary 2,048" in prepared
    assert "**Dataset** 3,000 documents, 8.8 MB, 2,753,202 tokens from `a_*.txt`" in prepared
    trained = model_card(config(), done("prepare", "train"))
    assert "**Training** 1,200 steps of 32 x 64 tokens, held-out 3.311 nats per token" in trained
    evaluated = model_card(config(), done("prepare", "train", "evaluate"))
    assert evaluated.startswith("**1.574 bits per byte** on held-out text, 1.091 nats per character; an n-gram model")
    assert "curl" not in evaluated, "the model is not registered yet"


def test_a_sample_stays_in_its_code_block() -> None:
    card = model_card(config(), done("prepare", "train", "evaluate"))
    assert blocks(card) == [SAMPLE.replace("\x1b", "\ufffd")]
    assert "~~~text\n" in card, "tildes make the shorter fence here"
    assert fenced("plain") == "```text\nplain\n```"


def test_a_registered_model_can_be_called_as_the_card_says() -> None:
    _, command, program = blocks(model_card(config(), DONE))
    assert command == curl(config(), "fables:3")
    words = shlex.split(command)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[-1]) == {"model": "fables:3", "prompt": 'It\'s "so" ', "max_tokens": 100}
    assert "models:/fables/3" in program
    compile(program, "card", "exec")
    assert "Bearer $GRU_API_KEY" in model_card(config(serve={"keys": "keys"}), DONE)


@pytest.mark.parametrize("character", ["`", "`~", "'", "\\", "\x00", "狐", "\U0001f98a"])
def test_a_card_is_never_longer_than_mlflow_allows(character: str) -> None:
    text = character * 5000
    long = config(corpus={"sources": [f"{i}{text}" for i in range(20)]}, evaluate={"prompt": text})
    results = {**DONE, "evaluate": {**DONE["evaluate"], "samples": [text]}}
    card = model_card(long, results)  # type: ignore[arg-type]
    assert len(card) <= MOST_CHARACTERS and "and 15 more" in card
    assert len(blocks(card)) == 3
