import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

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


@pytest.mark.parametrize("preset", ["quickstart", "shakespeare", "novel", "poetry", "gpu"])
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
    ("override", "message"),
    [
        ("train.stpes=1", "train.stpes: unknown key; known here: steps, "),
        ("trian.steps=1", "trian: unknown key; known here: name, storage, "),
        ("train.steps=many", "train.steps: must be an integer, not 'many'"),
        ("train.steps='7'", "train.steps: must be an integer, not '7'"),
        ("train.learning_rate=inf", "train.learning_rate: must be a finite number, not inf"),
        ("train.learning_rate=0", "train.learning_rate: must be a number > 0, not 0"),
        ("registry.model=a/b", "registry.model: must match the regular expression ^[A-Za-z0-9]"),
        ("train.steps=0", "train.steps: must be an integer >= 1, not 0"),
        ("train.min_workers=0", "train.min_workers: must be an integer >= 1, not 0"),
        ("tokenizer.vocab_size=3", "tokenizer.vocab_size: must be an integer >= 257, not 3"),
        ("corpus.heldout_share=2", "corpus.heldout_share: must be a number < 1, not 2"),
        ("evaluate.temperatures=[-1]", "evaluate.temperatures.0: must be a number >= 0, not -1"),
        ("train.workers=99", "train: workers = 99 exceeds batch_size = 32"),
        ("train.min_workers=2", "train: min_workers = 2 exceeds workers = 1"),
        ("train.init_digest=none", "train: init_digest needs init_from"),
        ("train.init_digest=0", "train.init_digest: must be a string, not 0"),
        ("train.bitwise_elastic=64", "train: bitwise_elastic = 64 exceeds batch_size = 32"),
        ("tokenizer.kind=sentence", "tokenizer.kind: must be 'bpe', 'char', 'byte' or 'word', not 'sentence'"),
        ("corpus.source=[{path=5}]", "corpus.source.0.path: must be a path or URL, or a list of them, not 5"),
        ("corpus.delimiter=';;'", "corpus.delimiter: must be one character, and no double quote or line end, not"),
        ("corpus.chat_template=x", "corpus.chat_template: must have {content} once, perhaps {role} before it,"),
        ("corpus.header=['a', 'a']", "corpus.header: must not have a name twice"),
        ("corpus.sources=[]", "corpus: needs sources = ["),
        ("corpus.sources=a.txt", "corpus.sources: must be a list, not 'a.txt'"),
        ("corpus.sources=[3]", "corpus.sources.0: must be a string, not 3"),
        ("train=3", "train: must be a table, not 3"),
        ("train", "--set train: must be section.key=value"),
        ("name.x=1", "name: must be a string"),
        ("resources.train.gpus=2", "resources.train.gpus: must be an integer <= 1, not 2"),
        ("resources.evaluate.gpus=2", "resources.evaluate.gpus: must be an integer <= 1, not 2"),
        ("resources.evaluate.gpus=0.5", "resources.evaluate.gpus: must be an integer, not 0.5"),
        ("resources.serve.gpus=1", "resources.serve.gpus: unknown key; known here: cpus, memory, labels"),
        ("resources.train.labels.pool=-", "resources.train.labels.pool: must be a label's value, as in gpu, !gpu, "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(minimal, [override])
    assert "\n" not in str(caught.value)


def test_labels_are_a_table_of_names_and_selectors(minimal: Path) -> None:
    config = load(minimal, ['resources.train={gpus=1, labels={pool="!in(a, b)"}}', "resources.serve.labels.pool=gpu"])
    assert config.resources.train.labels == {"pool": "!in(a, b)"} and config.resources.train.gpus == 1
    assert config.resources.serve.labels == {"pool": "gpu"}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: cannot read the configuration"):
        load(tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"bad\.toml: not valid TOML"):
        load(write(tmp_path / "bad.toml", "name = "))
    with pytest.raises(UserError, match=r"corpus: required but absent"):
        load(write(tmp_path / "empty.toml", ""))


def keys(record: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in record.model_fields.items():
        annotation = field.annotation
        inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_is_described_under_its_section() -> None:
    text = describe()
    assert "  resources.train.labels: table of str (default {})\n" in text
    for key in keys(PipelineConfig):
        assert re.search(rf"^  {re.escape(key)}: .+\n      \S.+$", text, re.MULTILINE), key
    assert {
        "[corpus]",
        "[[corpus.source]]",
        "[corpus.filter]",
        "[serve]",
        "[serve.canary]",
        "[resources.train]",
    } <= set(text.splitlines())


def test_the_json_schema_describes_every_section_and_key() -> None:
    schema = PipelineConfig.model_json_schema()
    for name, record in {"PipelineConfig": schema, **schema["$defs"]}.items():
        assert record["description"], name
        for key, field in record["properties"].items():
            described = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field
            assert described["description"], f"{name}.{key}"


def test_content_keys_differ_if_and_only_if_the_inputs_differ(minimal: Path) -> None:
    config = load(minimal)
    assert content_key("x", config.model) == content_key("x", load(minimal).model)
    assert content_key("x", config.model) != content_key("x", load(minimal, ["model.hidden=7"]).model)
