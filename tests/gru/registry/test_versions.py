"""Bundles on disk, and the registry in a real MLflow."""

import math
from pathlib import Path

import pytest
import torch

from gru.config import ModelConfig, TokenizerConfig
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.digests import DamagedFiles
from gru.errors import UserError
from gru.model.language_model import GRULanguageModel
from gru.registry import tracking, versions
from gru.registry.bundle import load_bundle, write_bundle
from gru.registry.versions import fetch_bundle

CONFIG = ModelConfig(embedding=8, hidden=8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind="char"), ["A crow met a fox."])


def write(path: Path, tokenizer: Tokenizer, seed: int) -> str:
    torch.manual_seed(seed)
    model = GRULanguageModel(CONFIG, tokenizer.vocab_size)
    write_bundle(str(path), CONFIG, model.state_dict(), tokenizer, {"run": "r", "seed": seed})
    return str(path)


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "bundle", tokenizer, 1)
    bundle = load_bundle(path)
    assert bundle.tokenizer.json == tokenizer.json
    assert bundle.lineage == {"run": "r", "seed": 1}
    assert bundle.digest == load_bundle(path).digest
    assert bundle.digest != load_bundle(write(tmp_path / "other", tokenizer, 2)).digest


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "tokenizer.json", "lineage.json"])
def test_a_damaged_bundle_is_refused(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    path = Path(write(tmp_path / "bundle", tokenizer, 1))
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(DamagedFiles, match=name):
        load_bundle(path)


def test_versions_are_gated_promoted_and_rolled_back(tmp_path: Path, tokenizer: Tokenizer, mlflow_store: str) -> None:
    run = tracking.open_run("test", "key", "promote")

    def register(seed: int, bits: float, heldout: str = "text") -> versions.Version:
        return versions.register(run, "m", write(tmp_path / str(seed), tokenizer, seed), bits, heldout)

    def unused(champion: versions.Version) -> float:
        raise AssertionError("its score on the same text is known")

    def aliases() -> tuple[str | None, str | None]:
        found = [versions.resolve("m", alias) for alias in (versions.CHAMPION, versions.CHALLENGER)]
        champion, challenger = [version and version.version for version in found]
        return champion, challenger

    assert aliases() == (None, None)
    with pytest.raises(UserError, match="no @champion"):
        versions.rollback("m")

    first = register(1, 2.0)
    assert versions.promote(first, unused) == (True, "the first version")
    assert register(1, 2.0) == first, "the same bundle is registered once"
    with pytest.raises(UserError, match="version 1 is the first champion"):
        versions.rollback("m")

    assert not versions.promote(register(9, math.nan), unused)[0], "not a number never wins"
    assert aliases() == ("1", "2")
    promoted, reason = versions.promote(register(2, 2.5), unused)
    assert not promoted
    assert reason == "2.5000 bits per byte, version 1 has 2.0000"
    assert aliases() == ("1", "3")

    assert versions.promote(register(3, 1.5), unused)[0]
    assert aliases() == ("4", "3")
    # A score on other text says nothing: the champion is scored on the candidate's.
    assert not versions.promote(register(4, 1.0, "other text"), lambda champion: 0.9)[0]
    assert aliases() == ("4", "5")
    assert versions.promote(register(4, 1.0, "other text"), lambda champion: 1.1)[0]
    assert aliases() == ("5", None)

    assert versions.rollback("m").version == "4"
    assert versions.rollback("m").version == "1"
    assert aliases() == ("1", None)


def test_a_version_is_fetched_whole_and_loads_as_a_pyfunc(
    tmp_path: Path, tokenizer: Tokenizer, mlflow_store: str
) -> None:
    import mlflow

    run = tracking.open_run("test", "key", "promote")
    path = write(tmp_path / "bundle", tokenizer, 1)
    version = versions.register(run, "m", path, 2.0, "text")
    versions.promote(version, lambda champion: 0.0)
    bundle = fetch_bundle(version, tmp_path / "fetched")
    assert bundle.digest == load_bundle(path).digest == version.bundle
    generator = mlflow.pyfunc.load_model("models:/m@champion")
    texts = generator.predict(["A ", "fox"])
    assert [text[: len(prompt)] for text, prompt in zip(texts, ["A ", "fox"], strict=True)] == ["A ", "fox"]
    assert texts == generator.predict(["A ", "fox"])
