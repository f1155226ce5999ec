"""Where `gru generate` gets its texts from: the endpoint of a config, or a bundle in this process.

Both give the same text for the same prompt, options and seed. A session is continued by later prompts; the names of
sessions are the caller's.
"""

import http.client
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gru import storage
from gru.config import PipelineConfig
from gru.digests import DIGESTS, DamagedFiles
from gru.errors import UserError, first_line
from gru.network import url_of
from jobs import entry, stages, warm_start
from jobs.results import PromoteResult, parse

if TYPE_CHECKING:
    from gru.generation.request import Finish
    from gru.generation.sampling import SamplingParams
    from gru.registry.bundle import Bundle

SENT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")  # of SamplingParams, as in the API
PROBE_SECONDS = 3
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*(@[A-Za-z0-9][A-Za-z0-9_.-]*|:[0-9]+)?"


@dataclass(frozen=True)
class TextOptions:
    """How texts are generated."""

    params: "SamplingParams"
    max_tokens: int
    stops: list[str]


@dataclass(frozen=True)
class Session:
    """A text that prompts continue, and whether this prompt continues it or begins it."""

    name: str
    resume: bool


class SessionLost(Exception):
    """The state of the session is not cached: all of its text is needed as the prompt of another one."""


Pieces = Generator[tuple[str, "Finish | None"], None, None]
"""Pieces of a text, the last one with the reason for which the text ends there. Closing it ends the text."""


class TextSource(Protocol):
    """A model that continues prompts."""

    description: str
    """Which model from where, for people."""

    def stream(self, prompt: str, options: TextOptions, session: Session | None = None) -> Pieces:
        """Yield the continuation of the prompt, as it is generated. Raises UserError, or SessionLost."""


class Endpoint:
    """The champion that an endpoint serves."""

    def __init__(self, address: str, model: str, version: str) -> None:
        self.description = f"{model} version {version} from {address}"
        self._address = address
        self._model = f"{model}@champion"  # not the canary, which gets a share of the requests for `model`
        self._held: dict[str, str] = {}  # the text that the last answer of a session held back

    def stream(self, prompt: str, options: TextOptions, session: Session | None = None) -> Pieces:
        sampling = {name: value for name, value in asdict(options.params).items() if name in SENT}
        body = {"model": self._model, "prompt": prompt, "max_tokens": options.max_tokens, "stream": True, **sampling}
        body |= {"stop": options.stops} if options.stops else {}
        body |= {"session_id": session.name} if session else {}
        headers = {"Content-Type": "application/json", **authorization()}
        request = urllib.request.Request(f"{self._address}/v1/completions", json.dumps(body).encode(), headers)
        finish: Finish | None = None
        # What the last text held back is shown with it, and repeated by the text that continues it without a prompt.
        held = self._held.pop(session.name, "") if session else ""
        repeated = 0 if prompt else len(held)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                for line in response:
                    data = line.decode().removeprefix("data: ").strip()
                    if data and data != "[DONE]":
                        piece, finish = self._piece(json.loads(data), session)
                        yield piece[repeated:], finish
                        repeated = max(0, repeated - len(piece))
            if finish is None:
                raise UserError(f"{self._address}: the text broke off: the endpoint has ended")
        except urllib.error.HTTPError as error:
            hint = f" (set {entry.KEY_VARIABLE} to an API key of the endpoint)" if error.code == 401 else ""
            message = error.read().decode(errors="replace")[:500]
            raise UserError(f"{self._address}: status {error.code}: {message}{hint}") from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self._address} does not answer any more: {error!r}") from None

    def _piece(self, event: dict[str, Any], session: Session | None) -> tuple[str, "Finish | None"]:
        if "error" in event:
            raise UserError(f"{self._address}: {event['error']['message']}")
        if session and session.resume and not event["session"]["resumed_tokens"]:
            raise SessionLost
        [choice] = event["choices"]
        text, finish = choice["text"], choice["finish_reason"]
        if session and finish == "length":
            # An incomplete character, which is U+FFFD at the end, is complete in the next text.
            self._held[session.name] = event["session"].get("held_text", "").removesuffix("\ufffd")
            text += self._held[session.name]
        return text, finish


class LocalModel:
    """A bundle in this process."""

    def __init__(self, bundle: "Bundle", description: str) -> None:
        import torch

        from gru.generation.generate import TextGenerator

        torch.set_num_threads(1)  # as a replica of the endpoint: the number of threads may change rounding
        self.description = description
        self._generator = TextGenerator(bundle)

    def stream(self, prompt: str, options: TextOptions, session: Session | None = None) -> Pieces:
        from gru.generation.engine import StateNotCached

        name, resume = (session.name, session.resume) if session else (None, False)
        try:
            yield from self._generator.stream(
                prompt, options.params, options.max_tokens, options.stops, session=name, resume=resume
            )
        except StateNotCached:
            raise SessionLost from None


def open_source(model: str, overrides: list[str], store: str) -> TextSource:
    """Return the source of texts that `model` names: a config, a bundle, the directory of a run, or NAME, NAME@ALIAS or
    NAME:VERSION, a registered version. Raises UserError.

    store: the storage whose registered versions are meant; that of a config is used instead.
    """
    home = os.environ.get(entry.HOME_VARIABLE) or str(Path.cwd())
    path = storage.absolute(model, home)
    if storage.is_local(path) and Path(path).is_file():
        return _of_config(entry.load_config(path, overrides), model)
    if overrides:
        raise UserError(f"--set: {model} is not the TOML file of a config")
    try:
        directory = next((each for each in (path, f"{path}/bundle") if storage.exists(f"{each}/{DIGESTS}")), None)
    except Exception as error:  # of the library that fsspec uses for the URL, such as missing credentials
        raise UserError(f"{model}: cannot be read: {first_line(error)}") from None
    if directory:
        return _of_bundle(directory, f"the bundle {directory}")
    if not re.fullmatch(NAME, model) or Path(path).exists():
        raise UserError(
            f"{model}: not a config file, a bundle, the directory of a run, or a registered model as in "
            "NAME@champion or NAME:VERSION"
        )
    source = _registered(model, storage.normalize(store, home))
    if source is None:
        raise UserError(
            f"{model}: no such file, bundle or run, and no promoted version of a model of this "
            f"name in the storage {store} (--storage)"
        )
    return source


def _of_config(config: PipelineConfig, file: str) -> TextSource:
    """Return the endpoint of the config if it is up, else the champion of its model, else the model that it trained."""
    address = url_of(config.serve.host, config.serve.port)
    authorization()  # a malformed key is an error, whether or not the endpoint is up
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=PROBE_SECONDS) as response:
            served = json.load(response)
    except (OSError, ValueError, http.client.HTTPException):
        served = {}
    if served.get("model") == config.model_name:
        return Endpoint(address, config.model_name, served["version"])
    if source := _registered(config.model_name, config.storage):
        return source
    config = warm_start.pinned(config)
    prepared = stages.prepare_stage(config).result()
    trained = prepared and stages.train_stage(config, prepared).result()
    if trained is None:
        raise UserError(
            f"{file}: its endpoint {address} is not up, and {config.storage} has no trained model of it: run `gru run`"
        )
    return _of_bundle(trained["bundle"], f"{config.model_name}, not registered yet, from {trained['bundle']}")


def _registered(spec: str, store: str) -> TextSource | None:
    """Return the version that `spec` names, from MLflow if a server is up, else as the records of a storage name it.

    Return None if there is none. Raises UserError if an MLflow server is up and has no such version.
    """
    from pipelines import embedded

    url = os.environ.get("MLFLOW_TRACKING_URI") or embedded.address(store, "mlflow")
    if url is None:
        return _recorded(spec, store)
    from gru.registry import tracking, versions

    tracking.connect_impatiently(url)
    if tracking.unreachable():
        return _recorded(spec, store)
    name = re.split("[@:]", spec)[0]
    if spec == name and versions.resolve(name, versions.CHAMPION) is None:
        return None
    version = versions.find(spec)
    with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary, _damage_reported():
        bundle = versions.fetch_bundle(version, Path(temporary))
    place = re.sub("//[^/@]*@", "//", url)  # without a password
    return LocalModel(bundle, f"{version.name} version {version.version} from {place}")


def _recorded(spec: str, store: str) -> TextSource | None:
    """Return a version by the results of promote stages in a storage: the champion is the one promoted last."""
    name, _, alias = spec.partition("@")
    name, _, number = name.partition(":")
    if alias not in ("", "champion"):
        raise UserError(f"{spec}: only the MLflow server knows this alias: set MLFLOW_TRACKING_URI, or start `gru run`")
    found: dict[int, str] = {}
    for run in storage.names(storage.join(store, "runs")):
        directory = storage.join(store, "runs", run)
        for file in storage.names(directory):
            if file.startswith("promotion-"):
                record = parse(PromoteResult, storage.read_json(storage.join(directory, file)))
                if not record or record["model"] != name:
                    continue
                if record["version"] == number if number else record["promoted"]:
                    found[int(record["version"])] = storage.join(directory, "bundle")
    if not found:
        return None
    version = max(found)
    return _of_bundle(found[version], f"{name} version {version} from {found[version]}")


def _of_bundle(directory: str, description: str) -> TextSource:
    """Raises UserError if the bundle is damaged."""
    from gru.registry.bundle import load_bundle

    with _damage_reported():
        return LocalModel(load_bundle(directory), description)


@contextmanager
def _damage_reported() -> Iterator[None]:
    """Raise UserError for a bundle that is incomplete or damaged."""
    try:
        yield
    except DamagedFiles as damage:
        raise UserError(str(damage)) from None


def authorization() -> dict[str, str]:
    """Return the header with the API key of the environment, if it has one. Raises UserError if it is malformed."""
    api_key = os.environ.get(entry.KEY_VARIABLE, "").strip()
    if not api_key:
        return {}
    if not re.fullmatch(r"[!-~]+", api_key):
        raise UserError(f"{entry.KEY_VARIABLE}: must be one word of ASCII characters, as `gru key` prints it")
    return {"Authorization": f"Bearer {api_key}"}
