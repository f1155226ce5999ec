"""The model manager with a real MLflow, real bundles, and everything that can be wrong with them."""

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
from gru.config import ModelConfig, ServeConfig, TokenizerConfig
from gru.config_stages import CanaryConfig
from gru.corpus.tokenizer import Tokenizer, train_tokenizer
from gru.digests import write_digests
from gru.generation.engine import Closed
from gru.generation.generate import Collector
from gru.generation.request import Request
from gru.generation.sampling import SamplingParams
from gru.model.inference import NativeModel
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
    """The versions of one model in the test's own MLflow."""

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
        """Return the directory in which MLflow stores the version's bundle."""
        uri = mlflow.MlflowClient().get_model_version_download_uri("poet", version.version)
        if uri.startswith("models:"):
            uri = mlflow.get_logged_model(uri.removeprefix("models:/")).artifact_location
        return Path(uri.removeprefix("file://")) / "artifacts" / "bundle"


@pytest.fixture
def models(mlflow_store: str, tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ModelManager]:
    manager = ModelManager(SERVE, "poet", tmp_path / "cache")
    yield manager
    manager.close()


def serving(manager: ModelManager) -> list[tuple[str, str]]:
    return [(model.alias, model.version.version) for model in manager.models]


def refused(manager: ModelManager) -> float:
    return manager.metrics.registry.get_sample_value("gru_models_refused_total") or 0.0


def generate(manager: ModelManager, tokens: int = 20) -> list[int]:
    """Return the token ids that the champion generates."""
    collector = Collector()
    manager.models[0].engine.submit(Request([1], SamplingParams(0), tokens, collector))
    return collector.wait(20)


def test_engines_have_the_threads_of_the_config_and_the_same_texts(models: Registry, tmp_path: Path) -> None:
    models.name(models.register(models.bundle(ModelConfig(embedding=32, hidden=64))))
    texts = []
    for threads in (1, 3):
        manager = ModelManager(SERVE.model_copy(update={"threads": threads}), "poet", tmp_path / str(threads))
        try:
            manager.update()
            native = manager.models[0].engine._model
            assert isinstance(native, NativeModel) and native.threads == threads
            texts.append(generate(manager))
        finally:
            manager.close()
    assert texts[0] == texts[1]


def test_it_follows_the_alias_forwards_and_backwards(models: Registry, manager: ModelManager) -> None:
    manager.update()
    assert serving(manager) == []
    one, two, three = models.register(), models.register(), models.register()
    models.name(one)
    manager.update()
    assert serving(manager) == [(CHAMPION, "1")]
    first = manager.models[0].engine
    text = generate(manager)
    models.name(two)
    manager.update()
    assert serving(manager) == [(CHAMPION, "2")] and manager.models[0].engine is not first
    models.name(one)
    manager.update()
    assert manager.models[0].engine is first and generate(manager) == text, "a rollback takes the engine that was kept"
    models.name(two)
    manager.update()
    models.name(three)
    manager.update()
    with pytest.raises(Closed):
        first.submit(Request([1], SamplingParams(0), 1, Collector()))


def test_the_old_engine_finishes_its_requests(models: Registry, manager: ModelManager) -> None:
    versions = [models.register() for _ in range(4)]
    models.name(versions[0])
    manager.update()
    collector = Collector()
    params = SamplingParams(0, logit_bias={models.tokenizer.end_of_text: -100.0})
    manager.models[0].engine.submit(Request([1], params, 3000, collector))
    for version in versions[1:]:
        models.name(version)
        manager.update()
    assert len(collector.wait(60)) == 3000 and collector.finish == "length"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError("the pickle was loaded")


def damage(models: Registry, version: Version, how: str) -> None:
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
def test_a_damaged_version_is_refused_and_the_current_model_kept(
    models: Registry, manager: ModelManager, how: str
) -> None:
    good, bad = models.register(), models.register()
    models.name(good)
    manager.update()
    text = generate(manager)
    damage(models, bad, how)
    models.name(bad)
    manager.update()
    manager.update()
    assert serving(manager) == [(CHAMPION, "1")] and generate(manager) == text
    assert refused(manager) == 1, "it must not be downloaded again at each poll"
    better = models.register()
    models.name(better)
    manager.update()
    assert serving(manager) == [(CHAMPION, "3")]


def test_a_model_with_nan_logprobs_is_refused(models: Registry, manager: ModelManager) -> None:
    good = models.register()
    bias = torch.full((models.tokenizer.vocab_size,), float("nan"))
    models.name(good)
    manager.update()
    models.name(models.register(models.bundle(output_bias=bias)))
    manager.update()
    assert serving(manager) == [(CHAMPION, "1")] and refused(manager) == 1


def test_a_canary_comes_goes_and_becomes_the_champion(models: Registry, tmp_path: Path) -> None:
    config = SERVE.model_copy(update={"canary": CanaryConfig(share=0.1)})
    manager = ModelManager(config, "poet", tmp_path / "cache")
    one, two = models.register(), models.register()
    models.name(one)
    manager.update()
    models.name(two, CHALLENGER)
    manager.update()
    assert serving(manager) == [(CHAMPION, "1"), (CHALLENGER, "2")]
    engine = manager.models[1].engine
    models.name(two)
    manager.update()
    assert serving(manager) == [(CHAMPION, "2")] and manager.models[0].engine is engine
    manager.close()


def test_a_version_with_the_same_number_and_another_bundle_is_loaded(models: Registry, manager: ModelManager) -> None:
    models.name(models.register())
    manager.update()
    text = generate(manager)
    mlflow.MlflowClient().delete_registered_model("poet")
    again = models.register()
    models.name(again)
    manager.update()
    assert again.version == "1" and manager.models[0].bundle.digest == again.bundle and generate(manager) != text


def test_a_champion_that_returns_has_no_sessions(models: Registry, manager: ModelManager) -> None:
    def resumes() -> bool:
        collector = Collector()
        stream = manager.models[0].engine.submit(Request([1], SamplingParams(0), 3, collector, session="s"))
        collector.wait(20)
        return stream.resumed > 0

    one, two = models.register(), models.register()
    models.name(one)
    manager.update()
    assert [resumes(), resumes()] == [False, True]
    for version in (two, one):
        models.name(version)
        manager.update()
        assert [resumes(), resumes()] == [False, True]  # the session may have continued elsewhere


def test_a_dead_champion_is_not_kept_as_the_spare(models: Registry, manager: ModelManager) -> None:
    one, two = models.register(), models.register()
    models.name(one)
    manager.update()
    first = manager.models[0].engine
    models.name(two)
    manager.update()
    dead = manager.models[0].engine
    dead.close(drain=False)
    assert dead.join(10)
    manager.update()
    models.name(one)
    manager.update()
    assert manager.models[0].engine is first


def test_a_replica_without_a_model_does_not_start(models: Registry, tmp_path: Path) -> None:
    bad = models.register()
    damage(models, bad, "a flipped bit")
    models.name(bad)
    with pytest.raises(UnfitModel):
        ModelManager(SERVE, "poet", tmp_path / "cache").start()


def test_a_dead_engine_is_replaced(models: Registry, manager: ModelManager) -> None:
    models.name(models.register())
    manager.update()
    text = generate(manager)
    dead = manager.models[0].engine
    dead.close(drain=False)
    assert dead.join(10) and not manager.models[0].healthy
    manager.update()
    assert manager.models[0].healthy and generate(manager) == text


def test_it_starts_from_disk_while_the_registry_is_unreachable(
    models: Registry, manager: ModelManager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = models.register(), models.register()
    for version in (one, two):
        models.name(version)
        manager.update()
    text = generate(manager)
    cache = tmp_path / "cache" / "poet"
    for version in (models.register(), one, two):  # back to version 1, and on to version 2
        models.name(version)
        manager.update()
        assert storage.read_json(str(cache / LAST_GOOD))["version"]["version"] == version.version
    assert generate(manager) == text
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2, "the champion and the previous one"
    there = mlflow.get_tracking_uri()
    tracking.connect_impatiently("http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(Exception):  # noqa: B017  # any library's error
        manager.update()
    assert manager.metrics.registry.get_sample_value("gru_registry_unreachable_total") == 1
    assert serving(manager) == [(CHAMPION, "2")]
    caplog.set_level(logging.WARNING)
    again = ModelManager(SERVE, "poet", tmp_path / "cache")
    again.start()
    assert serving(again) == [(CHAMPION, "2")] and generate(again) == text and "from disk" in caplog.text
    flip(cache / storage.read_json(str(cache / LAST_GOOD))["bundle"] / "weights.safetensors")
    with pytest.raises(Exception):  # noqa: B017
        ModelManager(SERVE, "poet", tmp_path / "cache").start()
    with pytest.raises(Exception):  # noqa: B017
        ModelManager(SERVE, "poet", tmp_path / "empty").start()
    mlflow.set_tracking_uri(there)
    models.name(one)
    deadline = time.monotonic() + 20
    while serving(again) != [(CHAMPION, "1")]:  # it has continued to poll
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again.close()


def test_an_alias_that_moves_under_load_fails_nobody(models: Registry, tmp_path: Path) -> None:
    manager = ModelManager(SERVE, "poet", tmp_path / "cache")
    versions = [models.register() for _ in range(3)]
    models.name(versions[0])
    manager.start()
    expected: dict[str, list[int]] = {}
    for version in versions:
        models.name(version)
        while serving(manager) != [(CHAMPION, version.version)]:
            time.sleep(0.02)
        expected[version.version] = generate(manager)
    stop = threading.Event()
    seen: list[str] = []
    wrong: list[object] = []

    def request_texts() -> None:
        while not stop.is_set():
            model = manager.models[0]
            collector = Collector()
            try:
                model.engine.submit(Request([1], SamplingParams(0), 20, collector))
            except Closed:  # like the HTTP interface, try the new model
                continue
            try:
                text = collector.wait(20)
            except Exception as error:
                wrong.append(error)
                continue
            seen.append(model.version.version)
            if text != expected[model.version.version]:
                wrong.append(text)

    threads = [threading.Thread(target=request_texts) for _ in range(4)]
    for thread in threads:
        thread.start()
    for move in range(20):
        models.name(versions[move % 3])
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and set(seen) == {"1", "2", "3"}
    manager.close()
