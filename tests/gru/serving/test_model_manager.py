"""Following the registry: a real MLflow, real bundles, and all that can be wrong with them."""

import logging
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from gru import storage
from gru.config import CanaryConfig, ModelConfig, ServeConfig, TokenizerConfig
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.digests import write_digests
from gru.generation.engine import Closed, Request
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from gru.registry import tracking, versions
from gru.registry.bundle import write_bundle
from gru.registry.versions import CHALLENGER, CHAMPION, Version
from gru.serving.model_manager import LAST_GOOD, ModelManager
from gru.serving.smoke_test import UnfitModel
from tests.gru.registry.bundles import LINEAGE

MODEL = ModelConfig(embedding=8, hidden=8)
SERVE = ServeConfig(slots=4, max_queue=64, poll_seconds=0.05)


class Registry:
    """Versions of one model in an MLflow of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer: Tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["A crow met a fox."])
        self.run = tracking.open_run("test", "key", "promote")
        self._count = 0

    def bundle(self, config: ModelConfig = MODEL, **weights: torch.Tensor) -> Path:
        self._count += 1
        path = self.directory / f"bundle-{self._count}"
        torch.manual_seed(self._count)
        model = GRULanguageModel(config, self.tokenizer.vocab_size)
        state = {**model.state_dict(), **weights}
        write_bundle(str(path), config, state, self.tokenizer, LINEAGE)
        return path

    def register(self, path: Path | None = None) -> Version:
        return versions.register(self.run, "poet", str(path or self.bundle()), 2.0, "text")

    def name(self, version: Version, alias: str = CHAMPION) -> None:
        mlflow.MlflowClient().set_registered_model_alias("poet", alias, version.version)

    def files(self, version: Version) -> Path:
        """Where MLflow keeps the bundle of a version."""
        uri = mlflow.MlflowClient().get_model_version_download_uri("poet", version.version)
        if uri.startswith("models:"):
            uri = mlflow.get_logged_model(uri.removeprefix("models:/")).artifact_location
        return Path(uri.removeprefix("file://")) / "artifacts" / "bundle"


@pytest.fixture
def models(mlflow_store: str, tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture
def lineup(tmp_path: Path) -> Iterator[ModelManager]:
    made = ModelManager(SERVE, "poet", tmp_path / "kept")
    yield made
    made.close()


def serving(lineup: ModelManager) -> list[tuple[str, str]]:
    return [(served.alias, served.version.version) for served in lineup.models]


def refused(lineup: ModelManager) -> float:
    return lineup.metrics.registry.get_sample_value("gru_models_refused_total") or 0.0


def write(lineup: ModelManager, tokens: int = 20) -> list[int]:
    """What the champion writes."""
    done, text = threading.Event(), []

    def on_token(token: int | None, end: object) -> None:
        text.extend([] if token is None else [token])
        if end is not None:
            done.set()

    lineup.models[0].engine.submit(Request([1], SamplingParams(0), tokens, on_token))
    assert done.wait(20)
    return text


def test_it_follows_the_alias_forwards_and_back(models: Registry, lineup: ModelManager) -> None:
    lineup.follow()
    assert serving(lineup) == []
    one, two, three = models.register(), models.register(), models.register()
    models.name(one)
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "1")]
    first = lineup.models[0].engine
    text = write(lineup)
    models.name(two)
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "2")] and lineup.models[0].engine is not first
    models.name(one)
    lineup.follow()
    assert lineup.models[0].engine is first and write(lineup) == text, "going back takes what was kept warm"
    models.name(two)
    lineup.follow()
    models.name(three)
    lineup.follow()
    with pytest.raises(Closed):
        first.submit(Request([1], SamplingParams(0), 1, lambda token, end: None))


def test_the_old_engine_finishes_what_it_has_begun(models: Registry, lineup: ModelManager) -> None:
    versions = [models.register() for _ in range(4)]
    models.name(versions[0])
    lineup.follow()
    ends: list[Any] = []
    tokens: list[int] = []

    def on_token(token: int | None, end: object) -> None:
        tokens.append(0)
        if end is not None:
            ends.append(end)

    lineup.models[0].engine.submit(
        Request([1], SamplingParams(0, logit_bias={models.tokenizer.end_of_text: -100.0}), 3000, on_token)
    )
    for version in versions[1:]:
        models.name(version)
        lineup.follow()
    deadline = time.monotonic() + 60
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ends == ["length"] and len(tokens) == 3000


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError("somebody unpickled it")


def spoil(models: Registry, version: Version, how: str) -> None:
    files = models.files(version)
    if how == "a flipped bit":
        flip(files / "weights.safetensors")
    elif how == "a missing file":
        (files / "tokenizer.json").unlink()
    elif how == "weights of another shape":
        shutil.copy(models.bundle(ModelConfig(embedding=8, hidden=16)) / "weights.safetensors", files)
        write_digests(files)
    elif how == "another model, whole":
        shutil.copytree(models.bundle(), files, dirs_exist_ok=True)
    elif how == "a pickle":
        (files / "weights.safetensors").write_bytes(
            b"\x80\x04c__builtin__\neval\n(S'open(\"/nonexistent\")'\ntR." + pickle.dumps([1])
        )
        write_digests(files)
    else:
        shutil.rmtree(files)


@pytest.mark.parametrize(
    "how",
    [
        "a flipped bit",
        "a missing file",
        "weights of another shape",
        "another model, whole",
        "a pickle",
        "nothing there",
    ],
)
def test_a_version_that_is_wrong_is_refused_and_the_old_one_stays(
    models: Registry, lineup: ModelManager, how: str
) -> None:
    good, bad = models.register(), models.register()
    models.name(good)
    lineup.follow()
    text = write(lineup)
    spoil(models, bad, how)
    models.name(bad)
    lineup.follow()
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "1")] and write(lineup) == text
    assert refused(lineup) == 1, "it is not downloaded again at every look"
    better = models.register()
    models.name(better)
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "3")]


def test_a_model_that_says_no_numbers_is_refused(models: Registry, lineup: ModelManager) -> None:
    good = models.register()
    bias = torch.full((models.tokenizer.vocab_size,), float("nan"))
    models.name(good)
    lineup.follow()
    models.name(models.register(models.bundle(output_bias=bias)))
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "1")] and refused(lineup) == 1


def test_a_canary_comes_goes_and_becomes_the_champion(models: Registry, tmp_path: Path) -> None:
    config = SERVE.model_copy(update={"canary": CanaryConfig(share=0.1)})
    lineup = ModelManager(config, "poet", tmp_path / "kept")
    one, two = models.register(), models.register()
    models.name(one)
    lineup.follow()
    models.name(two, CHALLENGER)
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "1"), (CHALLENGER, "2")]
    engine = lineup.models[1].engine
    models.name(two)
    lineup.follow()
    assert serving(lineup) == [(CHAMPION, "2")] and lineup.models[0].engine is engine
    lineup.close()


def test_a_version_of_the_same_number_is_another_if_its_bundle_is(models: Registry, lineup: ModelManager) -> None:
    models.name(models.register())
    lineup.follow()
    text = write(lineup)
    mlflow.MlflowClient().delete_registered_model("poet")
    again = models.register()
    models.name(again)
    lineup.follow()
    assert again.version == "1" and lineup.models[0].bundle.digest == again.bundle and write(lineup) != text


def test_a_champion_that_comes_back_remembers_no_sessions(models: Registry, lineup: ModelManager) -> None:
    def turn() -> bool:
        done = threading.Event()
        request = Request([1], SamplingParams(0), 3, lambda token, end: done.set() if end else None, session="s")
        lineup.models[0].engine.submit(request)
        assert done.wait(20)
        return request.resumed > 0

    one, two = models.register(), models.register()
    models.name(one)
    lineup.follow()
    assert [turn(), turn()] == [False, True]
    for version in (two, one):
        models.name(version)
        lineup.follow()
        assert [turn(), turn()] == [False, True]  # it has missed what was said meanwhile


def test_a_dead_champion_is_no_spare(models: Registry, lineup: ModelManager) -> None:
    one, two = models.register(), models.register()
    models.name(one)
    lineup.follow()
    first = lineup.models[0].engine
    models.name(two)
    lineup.follow()
    dead = lineup.models[0].engine
    dead.close(drain=False)
    assert dead.join(10)
    lineup.follow()
    models.name(one)
    lineup.follow()
    assert lineup.models[0].engine is first


def test_a_replica_without_a_model_does_not_start(models: Registry, tmp_path: Path) -> None:
    bad = models.register()
    spoil(models, bad, "a flipped bit")
    models.name(bad)
    with pytest.raises(UnfitModel):
        ModelManager(SERVE, "poet", tmp_path / "kept").start()


def test_a_dead_engine_is_replaced(models: Registry, lineup: ModelManager) -> None:
    models.name(models.register())
    lineup.follow()
    text = write(lineup)
    dead = lineup.models[0].engine
    dead.close(drain=False)
    assert dead.join(10) and not lineup.models[0].healthy
    lineup.follow()
    assert lineup.models[0].healthy and write(lineup) == text


def test_it_starts_from_disk_while_the_registry_is_away(
    models: Registry, lineup: ModelManager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = models.register(), models.register()
    for version in (one, two):
        models.name(version)
        lineup.follow()
    text = write(lineup)
    kept = tmp_path / "kept" / "poet"
    for version in (models.register(), one, two):  # back to one, and forth
        models.name(version)
        lineup.follow()
        assert storage.read_json(str(kept / LAST_GOOD))["version"]["version"] == version.version
    assert write(lineup) == text
    assert len([path for path in kept.iterdir() if path.is_dir()]) == 2, "the champion and the one before"
    there = mlflow.get_tracking_uri()
    tracking.connect_impatiently("http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(Exception):  # noqa: B017  # of whatever library
        lineup.follow()
    assert lineup.metrics.registry.get_sample_value("gru_registry_unreachable_total") == 1
    assert serving(lineup) == [(CHAMPION, "2")]
    caplog.set_level(logging.WARNING)
    again = ModelManager(SERVE, "poet", tmp_path / "kept")
    again.start()
    assert serving(again) == [(CHAMPION, "2")] and write(again) == text and "from disk" in caplog.text
    flip(kept / storage.read_json(str(kept / LAST_GOOD))["bundle"] / "weights.safetensors")
    with pytest.raises(Exception):  # noqa: B017
        ModelManager(SERVE, "poet", tmp_path / "kept").start()
    with pytest.raises(Exception):  # noqa: B017
        ModelManager(SERVE, "poet", tmp_path / "empty").start()
    mlflow.set_tracking_uri(there)
    models.name(one)
    deadline = time.monotonic() + 20
    while serving(again) != [(CHAMPION, "1")]:  # it has gone on asking
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again.close()


def test_an_alias_that_moves_under_load_fails_nobody(models: Registry, tmp_path: Path) -> None:
    lineup = ModelManager(SERVE, "poet", tmp_path / "kept")
    versions = [models.register() for _ in range(3)]
    models.name(versions[0])
    lineup.start()
    expected: dict[str, list[int]] = {}
    for version in versions:
        models.name(version)
        while serving(lineup) != [(CHAMPION, version.version)]:
            time.sleep(0.02)
        expected[version.version] = write(lineup)
    stop = threading.Event()
    seen: list[str] = []
    wrong: list[object] = []

    def ask() -> None:
        while not stop.is_set():
            served = lineup.models[0]
            done, text = threading.Event(), []

            def on_token(token: int | None, end: Any, text: Any = text, done: Any = done) -> None:
                text.extend([] if token is None else [token])
                if end is not None:
                    wrong.extend([end] if isinstance(end, Exception) else [])
                    done.set()

            try:
                served.engine.submit(Request([1], SamplingParams(0), 20, on_token))
            except Closed:  # as the HTTP interface does, it takes the new one
                continue
            done.wait(20)
            seen.append(served.version.version)
            if text != expected[served.version.version]:
                wrong.append(text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for move in range(20):
        models.name(versions[move % 3])
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and set(seen) == {"1", "2", "3"}
    lineup.close()
