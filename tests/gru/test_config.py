import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from gru.config import PipelineConfig, content_key, describe, load
from gru.errors import UserError

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "c.toml", '[corpus]\nsources = ["a.txt"]\n')


@pytest.mark.parametrize("preset", ["quickstart", "shakespeare", "poetry", "gpu"])
def test_presets_are_valid(preset: str) -> None:
    assert load(CONFIGS / f"{preset}.toml").name == preset


def test_overrides_take_toml_values_and_bare_words(minimal: Path) -> None:
    config = load(
        minimal,
        ["train.steps=7", "name=mine", 'corpus.sources=["x", "y"]', "train.bitwise_elastic=2", "storage=/a b/c"],
    )
    assert (config.train.steps, config.name, config.corpus.sources) == (7, "mine", ["x", "y"])
    assert config.storage == "/a b/c"


def test_json_text_is_the_same_configuration(minimal: Path) -> None:
    config = load(minimal, ["train.steps=7"])
    assert load(config.model_dump_json()) == config
    assert load(json.dumps(config.model_dump())) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stpes=1", "train.stpes: unknown key; known here: steps, "),
        ("trian.steps=1", "trian: unknown key; known here: name, storage, "),
        ("train.steps=many", "train.steps: "),
        ("train.steps='7'", "train.steps: input should be a valid integer"),
        ("train.learning_rate=inf", "train.learning_rate: "),
        ("registry.model=a/b", "registry.model: "),
        ("train.steps=0", "train.steps: input should be greater than 0, not 0"),
        ("train.workers=99", "train: workers = 99 exceeds batch_size = 32"),
        ("train.min_workers=2", "train: min_workers = 2 exceeds workers = 1"),
        ("train.bitwise_elastic=64", "train: bitwise_elastic = 64 exceeds batch_size = 32"),
        ("tokenizer.kind=word", "tokenizer.kind: "),
        ("corpus.sources=[]", "corpus.sources: "),
        ("train", "--set train: expected section.key=value"),
        ("name.x=1", "name: "),
        ("resources.train.gpus=2", "resources.train.gpus: input should be less than or equal to 1, not 2"),
        ("resources.serve.gpus=1", "resources.serve.gpus: unknown key; known here: cpus, memory, labels"),
        ("resources.train.labels.pool=-", "resources.train.labels.pool: expected a label's value, as in gpu, !gpu, "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(minimal: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load(minimal, [override])
    assert "\n" not in str(caught.value)


def test_labels_are_a_table_of_names_and_what_they_are_to_be(minimal: Path) -> None:
    config = load(minimal, ['resources.train={gpus=1, labels={pool="!in(a, b)"}}', "resources.serve.labels.pool=gpu"])
    assert config.resources.train.labels == {"pool": "!in(a, b)"} and config.resources.train.gpus == 1
    assert config.resources.serve.labels == {"pool": "gpu"}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: cannot read the configuration"):
        load(tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"bad\.toml: not valid TOML"):
        load(write(tmp_path / "bad.toml", "name = "))
    with pytest.raises(UserError, match=r"corpus: required, but absent"):
        load(write(tmp_path / "empty.toml", ""))


def keys(record: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in record.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_is_described_under_its_section() -> None:
    text = describe()
    assert "  resources.train.labels: table of str (default {})\n" in text
    for key in keys(PipelineConfig):
        assert re.search(rf"^  {re.escape(key)}: .+\n      \S.+$", text, re.MULTILINE), key
    assert {"[corpus]", "[serve]", "[serve.canary]", "[resources.train]"} <= set(text.splitlines())


def test_keys_differ_with_what_goes_in_and_only_then(minimal: Path) -> None:
    config = load(minimal)
    assert content_key("x", config.model) == content_key("x", load(minimal).model)
    assert content_key("x", config.model) != content_key("x", load(minimal, ["model.hidden=7"]).model)
