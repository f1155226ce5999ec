"""The registry, in a real MLflow."""

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gru.corpus.tokenizer import Tokenizer
from gru.errors import UserError
from gru.registry import tracking, versions
from gru.registry.bundle import load_bundle
from gru.registry.versions import fetch_bundle
from tests.gru.registry.bundles import write


def test_versions_are_promoted_and_rolled_back(tmp_path: Path, tokenizer: Tokenizer, mlflow_store: str) -> None:
    run = tracking.open_run("test", "key", "promote")

    def register(seed: int, bits: float, heldout: str = "text") -> versions.Version:
        return versions.register(run, "m", write(tmp_path / str(seed), tokenizer, seed), bits, heldout)

    def unused(champion: versions.Version) -> float:
        raise AssertionError("the champion has a score on the same text")

    def aliases() -> tuple[str | None, str | None]:
        resolved = [versions.resolve("m", alias) for alias in (versions.CHAMPION, versions.CHALLENGER)]
        champion, challenger = [version and version.version for version in resolved]
        return champion, challenger

    assert aliases() == (None, None)
    with pytest.raises(UserError, match="no @champion"):
        versions.rollback("m")

    first = register(1, 2.0)
    assert versions.promote(first, unused) == (True, "the first version")
    assert register(1, 2.0) == first, "a bundle is registered once"
    with pytest.raises(UserError, match="version 1 is the first champion"):
        versions.rollback("m")

    assert not versions.promote(register(9, math.nan), unused)[0], "NaN never wins"
    assert aliases() == ("1", "2")
    promoted, reason = versions.promote(register(2, 2.5), unused)
    assert not promoted
    assert reason == "2.5000 bits per byte, version 1 has 2.0000"
    assert aliases() == ("1", "3")

    assert versions.promote(register(3, 1.5), unused)[0]
    assert aliases() == ("4", "3")
    # Scores on different texts cannot be compared: the champion is scored on the candidate's text.
    assert not versions.promote(register(4, 1.0, "other text"), lambda champion: 0.9)[0]
    assert aliases() == ("4", "5")
    assert versions.promote(register(4, 1.0, "other text"), lambda champion: 1.1)[0]
    assert aliases() == ("5", None)

    assert versions.rollback("m").version == "4"
    assert versions.rollback("m").version == "1"
    assert aliases() == ("1", None)
    with pytest.raises(UserError, match="version 1 is the first champion"):
        versions.rollback("m")
    assert versions.rollback("m", to="5").version == "5"
    with pytest.raises(UserError, match="m:77"):
        versions.rollback("m", to="77")
    assert versions.rollback("m").version == "1", "the version that had it before 5"
    MlflowClient().set_registered_model_alias("m", versions.CHAMPION, "3")  # by hand: it was never promoted
    assert versions.rollback("m").version == "1", "the version that had it last, not 5, from which a rollback led away"
    assert versions.rollback("m", to="4").version == "4" and versions.rollback("m", to="5").version == "5"
    assert versions.rollback("m", to="1").version == "1", "an older version"
    with pytest.raises(UserError, match="name it with --to"):
        versions.rollback("m")
    assert versions.rollback("m", to="5").version == versions.rollback("m", to="5").version == "5"
    MlflowClient().set_registered_model_alias("m", versions.CHAMPION, "3")
    assert versions.rollback("m").version == "5", "the version that was returned to last"
    MlflowClient().delete_model_version("m", "1")
    with pytest.raises(UserError, match="m:1"):
        versions.rollback("m")


def test_a_version_is_downloaded_and_loads_as_a_pyfunc(tmp_path: Path, tokenizer: Tokenizer, mlflow_store: str) -> None:
    import mlflow

    run = tracking.open_run("test", "key", "promote")
    path = write(tmp_path / "bundle", tokenizer, 1)
    version = versions.register(run, "m", path, 2.0, "text")
    for text in ("the card", "a later one"):
        versions.describe(version, text)
    assert mlflow.MlflowClient().get_model_version("m", version.version).description == "the card"
    versions.promote(version, lambda champion: 0.0)
    bundle = fetch_bundle(version, tmp_path / "fetched")
    assert bundle.digest == load_bundle(path).digest == version.bundle
    model = mlflow.pyfunc.load_model("models:/m@champion")
    texts = model.predict(["A ", "fox"])
    assert [text[: len(prompt)] for text, prompt in zip(texts, ["A ", "fox"], strict=True)] == ["A ", "fox"]
    assert texts == model.predict(["A ", "fox"])
