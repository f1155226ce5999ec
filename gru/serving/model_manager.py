"""Which models answer: those that the registry's aliases name, each taken into service only when it has proved itself.

A look at the registry never touches what is serving: a new version is downloaded, checked and tried first, and then
takes the new requests, while the old engine finishes what it has begun. Anything that is wrong keeps what there is.
It knows no Ray and no HTTP.
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

RETRY_SECONDS = (30, 600)  # how long a version that was refused is left alone: at first, and at most
LAST_GOOD = "champion.json"

log = logging.getLogger(__name__)


class ModelManager:
    """The models of one replica. `models` is replaced as a whole: the champion first, then the canary if there is one.

    directory: where the champion is kept on disk, so that a replica can start while the registry is away. replica: its
    name in the metrics.
    """

    def __init__(self, config: ServeConfig, model_name: str, directory: Path, replica: str = "") -> None:
        self.models: Sequence[LoadedModel] = ()
        self.metrics = Metrics(lambda: self.models, replica)
        self._config, self._model_name = config, model_name
        self._directory = directory / model_name
        self._spare: LoadedModel | None = None  # the champion before, kept warm: going back to it takes no time
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_following, name="gru-follow", daemon=True)
        self._refused: dict[tuple[str, str], tuple[float, float]] = {}  # when to try again, and how long it was left

    def start(self) -> None:
        """Load what the registry names; where nothing comes of that, the last champion that was served here. Raises
        what stood against it if there is none: a replica without a model must not get requests."""
        problem: Exception | None = None
        try:
            self.follow()
        except Exception as error:
            problem = error
        if not self.models and (kept := self._last_good()):
            log.warning("serving %s version %s, from disk: %s", kept.version.name, kept.version.version, problem)
            self.models = (kept,)
        if not self.models:
            raise problem or UnfitModel(f"no version of {self._model_name} is @{versions.CHAMPION}, and can be served")
        self._thread.start()

    def close(self) -> None:
        """Follow no more, and end all engines once they have finished what they have begun."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        for served in self._loaded():
            served.engine.close(drain=True)

    def _keep_following(self) -> None:
        # Replicas do not ask in step.
        while not self._closed.wait(self._config.poll_seconds * random.uniform(0.8, 1.2)):
            try:
                self.follow()
            except Exception as error:
                log.warning("cannot ask for %s@%s (%s): what serves stays", self._model_name, versions.CHAMPION, error)

    def follow(self) -> None:
        """Bring the models to what the aliases name now. Raises if the registry does not answer."""
        canary = self._config.canary
        try:
            version = versions.resolve(self._model_name, versions.CHAMPION)
            other = versions.resolve(self._model_name, canary.alias) if canary.share else None
        except Exception:
            self.metrics.unreachable.inc()
            raise
        champion = (version and self._served(version, versions.CHAMPION)) or next(iter(self.models), None)
        if champion is None:
            return
        models = [champion]
        if other and other.version != champion.version.version and (second := self._served(other, canary.alias)):
            models.append(second)
        self._replace(models)

    def _replace(self, models: list[LoadedModel]) -> None:
        before, self.models = self.models, tuple(models)
        dropped: list[LoadedModel] = []
        if not before or before[0].engine is not models[0].engine:
            log.info("serving %s version %s", models[0].version.name, models[0].version.version)
            if before and before[0].healthy:
                before[0].engine.forget_sessions()
                dropped = [self._spare] if self._spare else []
                self._spare = before[0]
            self._note_champion()
        keeping = {id(served.engine) for served in self._loaded()}
        for served in (*before, *dropped):
            if id(served.engine) not in keeping:
                served.engine.close(drain=True)

    def _loaded(self) -> list[LoadedModel]:
        return [*self.models, *([self._spare] if self._spare else [])]

    def _served(self, version: Version, alias: str) -> LoadedModel | None:
        """That version under this alias: as it is loaded already, or from the registry; None if it is refused."""
        for loaded in self._loaded():
            same = loaded.version.version == version.version and version.bundle in ("", loaded.bundle.digest)
            if same and loaded.healthy:
                return replace(loaded, version=version, alias=alias)
        key = version.version, version.bundle
        again, waited = self._refused.get(key, (0.0, RETRY_SECONDS[0] / 2))
        if time.monotonic() < again:
            return None
        try:
            with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
                files = versions.download_bundle(version, Path(temporary))
                served = self._proved(load_bundle(files), version, alias)
                self._keep_files(files, served)
        except Exception as error:
            waited = min(2 * waited, RETRY_SECONDS[1])
            self._refused[key] = time.monotonic() + waited, waited
            self.metrics.refused.inc()
            log.error("%s version %s is not taken into service: %s", version.name, version.version, error)
            return None
        self._refused.pop(key, None)
        return served

    def _proved(self, bundle: Bundle, version: Version, alias: str) -> LoadedModel:
        """With an engine that has written something. Raises Unfit, or what else is wrong."""
        if version.bundle and bundle.digest != version.bundle:
            raise UnfitModel(f"its files have the digest {bundle.digest}, and it was registered with {version.bundle}")
        config, tokenizer = self._config, bundle.tokenizer
        engine = Engine(
            inference_model(bundle.model),
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

    def _keep_files(self, files: Path, served: LoadedModel) -> None:
        """That they cannot be kept is no reason not to serve."""
        target = self._directory / folder(served)
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
                log.warning("%s is not kept on disk: %s", target, error)

    def _note_champion(self) -> None:
        """Which version on disk is to be served if the registry is away; those that nobody needs are removed."""
        champion = self.models[0]
        if not (self._directory / folder(champion)).exists():
            return
        try:
            noted = {"bundle": folder(champion), "version": asdict(champion.version)}
            storage.write_json(str(self._directory / LAST_GOOD), noted)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._directory / LAST_GOOD, error)
            return
        needed = {folder(served) for served in self._loaded()}
        for old in self._directory.iterdir():
            if old.is_dir() and not old.name.startswith(".") and old.name not in needed:
                shutil.rmtree(old, ignore_errors=True)

    def _last_good(self) -> LoadedModel | None:
        try:
            kept = json.loads((self._directory / LAST_GOOD).read_text())
            bundle = load_bundle(self._directory / kept["bundle"])
            return self._proved(bundle, Version(**kept["version"]), versions.CHAMPION)
        except FileNotFoundError:
            return None
        except Exception as error:
            log.error("what is in %s cannot be served: %s", self._directory, error)
            return None


def folder(served: LoadedModel) -> str:
    """Of its files on disk."""
    return f"{served.version.version}-{served.bundle.digest[:16]}"
