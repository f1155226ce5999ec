"""The model manager: loads the models that the registry's aliases name, each only after it has passed a smoke test.

Polling the registry never disturbs the current models: a new version is downloaded, checked and tested first. Then it
gets the new requests, while the old engine finishes its own. If anything is wrong, the current models are kept.
The manager knows no Ray and no HTTP.
"""

import json
import logging
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gru import storage
from gru.config import ServeConfig
from gru.generation.engine import Engine
from gru.model.inference import inference_model
from gru.registry import versions
from gru.registry.bundle import Bundle, load_bundle
from gru.registry.versions import Version
from gru.serving.loaded_model import LoadedModel
from gru.serving.metrics import Metrics
from gru.serving.smoke_test import PROMPT, UnfitModel, smoke_test

RETRY_SECONDS = (30, 600)  # first and longest delay before a refused version is tried again
LAST_GOOD = "champion.json"

log = logging.getLogger(__name__)


class ModelManager:
    """The models of one replica. `models` is replaced as a whole: the champion first, then the canary if there is one.

    `directory` holds a copy of the champion, so that a replica can start while the registry is unreachable. `replica`
    is the replica's name in the metrics.
    """

    def __init__(self, config: ServeConfig, model_name: str, directory: Path, replica: str = "") -> None:
        self.models: Sequence[LoadedModel] = ()
        self.metrics = Metrics(lambda: self.models, replica)
        self._config, self._model_name = config, model_name
        self._directory = directory / model_name
        self._spare: LoadedModel | None = None  # the previous champion, loaded still, so that a rollback takes no time
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="gru-follow", daemon=True)
        self._refused: dict[tuple[str, str], tuple[float, float]] = {}  # time of the next attempt, and the last delay

    def start(self) -> None:
        """Load what the registry names, or else the last champion from disk, and start polling.

        Raises the error that prevented it if there is no model: a replica without one must not get requests.
        """
        problem: Exception | None = None
        try:
            self.update()
        except Exception as error:
            problem = error
        if not self.models and (cached := self._load_last_good()):
            version, reason = cached.version, problem or "the registry has no version that can be served"
            log.warning("serving %s version %s from disk: %s", version.name, version.version, reason)
            self.models = (cached,)
        if not self.models:
            raise problem or UnfitModel(f"{self._model_name} has no version @{versions.CHAMPION} that can be served")
        self._thread.start()

    def close(self) -> None:
        """Stop polling, and let all engines end when they have finished their requests."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        for model in self._loaded():
            model.engine.close(drain=True)

    def _poll(self) -> None:
        # The delays are random so that replicas do not poll at the same time.
        while not self._closed.wait(self._config.poll_seconds * random.uniform(0.8, 1.2)):
            try:
                self.update()
            except Exception as error:
                log.warning(
                    "cannot look up %s@%s; keeping the current model: %s", self._model_name, versions.CHAMPION, error
                )

    def update(self) -> None:
        """Look up the aliases, and load the versions that they name now. Raises if the registry does not answer."""
        canary = self._config.canary
        try:
            champion_version = versions.resolve(self._model_name, versions.CHAMPION)
            canary_version = versions.resolve(self._model_name, canary.alias) if canary.share else None
        except Exception:
            self.metrics.unreachable.inc()
            raise
        champion = champion_version and self._model(champion_version, versions.CHAMPION)
        champion = champion or next(iter(self.models), None)
        if champion is None:
            return
        models = [champion]
        if canary_version and canary_version.version != champion.version.version:
            challenger = self._model(canary_version, canary.alias)
            models += [challenger] if challenger else []
        self._replace(models)

    def _replace(self, models: list[LoadedModel]) -> None:
        """Let these models serve, and close the engines that are no longer needed."""
        before, self.models = self.models, tuple(models)
        dropped: list[LoadedModel] = []
        if not before or before[0].engine is not models[0].engine:
            log.info("serving %s version %s", models[0].version.name, models[0].version.version)
            if before and before[0].healthy:
                before[0].engine.forget_sessions()
                dropped = [self._spare] if self._spare else []
                self._spare = before[0]
            self._record_champion()
        needed = {id(model.engine) for model in self._loaded()}
        for model in (*before, *dropped):
            if id(model.engine) not in needed:
                model.engine.close(drain=True)

    def _loaded(self) -> list[LoadedModel]:
        return [*self.models, *([self._spare] if self._spare else [])]

    def _model(self, version: Version, alias: str) -> LoadedModel | None:
        """Return the version's model, loaded already or from the registry; None if it is refused."""
        for loaded in self._loaded():
            same = loaded.version.version == version.version and version.bundle in ("", loaded.bundle.digest)
            if same and loaded.healthy:
                since = loaded.since if loaded in self.models else time.time()  # the spare one did not serve
                return replace(loaded, version=version, alias=alias, since=since)
        key = version.version, version.bundle
        next_attempt, delay = self._refused.get(key, (0.0, RETRY_SECONDS[0] / 2))
        if time.monotonic() < next_attempt:
            return None
        try:
            with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
                files = versions.download_bundle(version, Path(temporary))
                model = self._load(load_bundle(files), version, alias)
                self._save_files(files, model)
        except Exception as error:
            delay = min(2 * delay, RETRY_SECONDS[1])
            self._refused[key] = time.monotonic() + delay, delay
            self.metrics.refused.inc()
            log.error(
                "%s version %s cannot be served; keeping the current model: %s", version.name, version.version, error
            )
            return None
        self._refused.pop(key, None)
        return model

    def _load(self, bundle: Bundle, version: Version, alias: str) -> LoadedModel:
        """Start an engine and run the smoke test. Raises UnfitModel, or the error that the test ended with."""
        if version.bundle and bundle.digest != version.bundle:
            raise UnfitModel(f"its files have the digest {bundle.digest}, but {version.bundle} was registered")
        config, tokenizer = self._config, bundle.tokenizer
        engine = Engine(
            inference_model(bundle.model, config.threads),
            tokenizer.end_of_text,
            config.slots,
            config.max_queue,
            config.max_tokens_in_flight,
            config.cache_bytes,
        )
        try:
            smoke_test(engine, tokenizer.encode(PROMPT).tolist())
        except BaseException:
            engine.close(drain=False)
            raise
        return LoadedModel(engine, bundle, version, alias)

    def _save_files(self, files: Path, model: LoadedModel) -> None:
        """Copy the bundle to disk. A model that cannot be copied serves all the same."""
        target = self._directory / folder(model)
        if target.exists():
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = Path(tempfile.mkdtemp(dir=self._directory, prefix=".draft-"))
            try:
                shutil.copytree(files, draft, dirs_exist_ok=True)
                draft.rename(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            if not target.exists():  # else another replica was faster
                log.warning("cannot copy the bundle to %s: %s", target, error)

    def _record_champion(self) -> None:
        """Record which version on disk to serve if the registry is unreachable, and remove the bundles not needed."""
        champion = self.models[0]
        if not (self._directory / folder(champion)).exists():
            return
        try:
            record = {"bundle": folder(champion), "version": asdict(champion.version)}
            storage.write_json(str(self._directory / LAST_GOOD), record)
        except OSError as error:
            log.warning("cannot write %s: %s", self._directory / LAST_GOOD, error)
            return
        needed = {folder(model) for model in self._loaded()}
        for old in self._directory.iterdir():
            if old.is_dir() and not old.name.startswith(".") and old.name not in needed:
                shutil.rmtree(old, ignore_errors=True)

    def _load_last_good(self) -> LoadedModel | None:
        """Load the last champion from disk; None if there is none that can be served."""
        try:
            record = json.loads((self._directory / LAST_GOOD).read_text())
            bundle = load_bundle(self._directory / record["bundle"])
            return self._load(bundle, Version(**record["version"]), versions.CHAMPION)
        except FileNotFoundError:
            return None
        except Exception as error:
            log.error("the bundle in %s cannot be served: %s", self._directory, error)
            return None


def folder(model: LoadedModel) -> str:
    """Return the name of the model's folder on disk."""
    return f"{model.version.version}-{model.bundle.digest[:16]}"
