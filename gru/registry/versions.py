"""Versions of a model in MLflow's registry: register, promote, roll back, resolve, download.

A registered version is a bundle with its score as tags. `@champion` is the version that is served, `@challenger` the
newest one that did not beat it.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gru.digests import digest_of, read_verified, write_digests
from gru.errors import UserError
from gru.registry.tracking import Run

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from gru.registry.bundle import Bundle

CHAMPION, CHALLENGER = "champion", "challenger"
PYFUNC_REQUIREMENTS = ["gigatoken", "numpy", "pydantic", "safetensors", "tokenizers", "torch"]  # besides this package
PREVIOUS_TAG = "previous_champion"  # on a champion: the version that had the alias before
PROMOTED_TAG = "promoted_at"  # on each version that became the champion here: seconds since the epoch
RETURNED_TAG = "returned_at"  # on each version that a rollback made the champion: seconds since the epoch


@dataclass(frozen=True)
class Version:
    """A registered version of a model."""

    name: str
    version: str
    run_id: str
    bits_per_byte: float
    heldout: str
    """Digest of the held-out text that bits_per_byte was measured on."""
    bundle: str
    """Digest of the bundle."""
    created: int
    """Seconds since the epoch."""
    previous: str | None
    """The champion before this version became it."""


def register(run: Run, name: str, bundle_path: str, bits_per_byte: float, heldout: str) -> Version:
    """Log the bundle as a model of the run and register it. Return the existing version if the bundle is registered
    already with a score on the same held-out text."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = run.client
    files = read_verified(bundle_path)
    digest = digest_of(files)
    for entity in client.search_model_versions(f"name = '{name}'"):
        if entity.tags.get("bundle") == digest and entity.tags.get("heldout") == heldout:
            return _version(entity)
    with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
        local = Path(temporary) / "bundle"
        local.mkdir()
        for file, data in files.items():
            (local / file).write_bytes(data)
        write_digests(local)
        with mlflow.start_run(run_id=run.id):
            info = mlflow.pyfunc.log_model(
                name="generator",
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"bundle": str(local)},
                pip_requirements=PYFUNC_REQUIREMENTS,
            )
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"bundle": digest, "bits_per_byte": repr(bits_per_byte), "heldout": heldout}
    return _version(client.create_model_version(name, info.model_uri, run.id, tags=tags, model_id=info.model_id))


def describe(version: Version, text: str) -> None:
    """Set the version's description, Markdown, unless it has one."""
    from mlflow import MlflowClient

    client = MlflowClient()
    if not client.get_model_version(version.name, version.version).description:
        client.update_model_version(version.name, version.version, text)


def promote(candidate: Version, score_champion: Callable[[Version], float]) -> tuple[bool, str]:
    """Make the candidate the champion if its bits per byte are lower than the current champion's on the same held-out
    text, else the challenger. `score_champion` scores a champion whose recorded score is on other text.

    Return whether the candidate is the champion now, and the reason, for people.
    """
    from mlflow import MlflowClient

    client = MlflowClient()
    champion = resolve(candidate.name, CHAMPION)
    score = math.inf
    if champion is None:
        reason = "the first version"
    elif champion.version == candidate.version:
        return True, "already the champion"
    else:
        same_text = champion.heldout == candidate.heldout
        score = champion.bits_per_byte if same_text else score_champion(champion)
        reason = f"{candidate.bits_per_byte:.4f} bits per byte, version {champion.version} has {score:.4f}"
    if not candidate.bits_per_byte < score:  # written so that NaN never wins
        client.set_registered_model_alias(candidate.name, CHALLENGER, candidate.version)
        return False, reason
    if champion:
        client.set_model_version_tag(candidate.name, candidate.version, PREVIOUS_TAG, champion.version)
    challenger = resolve(candidate.name, CHALLENGER)
    if challenger and challenger.version == candidate.version:
        client.delete_registered_model_alias(candidate.name, CHALLENGER)
    client.set_model_version_tag(candidate.name, candidate.version, PROMOTED_TAG, repr(time.time()))
    client.set_registered_model_alias(candidate.name, CHAMPION, candidate.version)
    return True, reason


def rollback(name: str, to: str | None = None) -> Version:
    """Move `@champion` to the version `to`, or back to the one that had it before. Raises UserError if there is none.

    If the alias was moved by hand, that is the version that was promoted, or returned to by a rollback, last. After a
    move to a version that was not champion before the current one, such as a newer one, the current one is the one
    before.
    """
    from mlflow import MlflowClient

    champion = resolve(name, CHAMPION)
    if champion is None:
        raise UserError(f"model {name!r} has no @{CHAMPION}")
    target = to or champion.previous or _last_promoted(champion)
    if target is None:
        raise UserError(
            f"model {name!r}: version {champion.version} is the first champion: there is no version to roll back to; "
            "to move to a newer one, name it with --to"
        )
    version = find(f"{name}:{target}")  # which may not exist, or not any more
    client = MlflowClient()
    if to and version.version not in _line_of(champion):
        client.set_model_version_tag(name, version.version, PREVIOUS_TAG, champion.version)
    client.set_model_version_tag(name, version.version, RETURNED_TAG, repr(time.time()))
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return version


def _line_of(champion: Version) -> list[str]:
    """Return the champion's version and those that further rollbacks lead to."""
    from mlflow import MlflowClient

    entities = MlflowClient().search_model_versions(f"name = '{champion.name}'")
    before = {str(entity.version): entity.tags.get(PREVIOUS_TAG) for entity in entities}
    line = [champion.version]
    while (earlier := before.get(line[-1])) and earlier not in line:
        line.append(earlier)
    return line


def _last_promoted(champion: Version) -> str | None:
    """Return the version that was promoted last before the champion; None without one.

    If the champion never was, the alias was moved to it: return the version that was promoted or returned to last.
    """
    from mlflow import MlflowClient

    entities = MlflowClient().search_model_versions(f"name = '{champion.name}'")
    tags = {str(entity.version): entity.tags for entity in entities}
    times = {version: float(each[PROMOTED_TAG]) for version, each in tags.items() if PROMOTED_TAG in each}
    before = times.pop(champion.version, math.inf)
    if before == math.inf:
        returned = {version: float(each[RETURNED_TAG]) for version, each in tags.items() if RETURNED_TAG in each}
        times |= {version: at for version, at in returned.items() if version != champion.version}
    earlier = {version: at for version, at in times.items() if at < before}
    return max(earlier, key=earlier.__getitem__, default=None)


def exists(name: str, version: str, bundle: str) -> bool:
    """Return whether the registry has this version, with the bundle of this digest."""
    from mlflow import MlflowClient

    entities = MlflowClient().search_model_versions(f"name = '{name}'")
    return any(str(entity.version) == version and entity.tags.get("bundle") == bundle for entity in entities)


def resolve(name: str, alias: str) -> Version | None:
    """Return the version with this alias; None if the model or the alias does not exist."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return _version(MlflowClient().get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find(spec: str) -> Version:
    """Return the version that `spec` names: NAME (its champion), NAME@ALIAS or NAME:VERSION. Raises UserError."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name, _, number = spec.partition(":")
    if number:
        try:
            return _version(MlflowClient().get_model_version(name, number))
        except MlflowException as error:
            raise UserError(f"{spec}: {error.message}") from None
    name, _, alias = spec.partition("@")
    resolved = resolve(name, alias or CHAMPION)
    if resolved is None:
        raise UserError(f"{spec}: no version of a model {name!r} is @{alias or CHAMPION}")
    return resolved


def fetch_bundle(version: Version, directory: Path) -> "Bundle":
    """Download a version's bundle into a local directory and load it. Raises DamagedFiles."""
    from gru.registry.bundle import load_bundle  # it needs PyTorch, which those who only look versions up do without

    return load_bundle(download_bundle(version, directory))


def download_bundle(version: Version, directory: Path) -> Path:
    """Download a version's bundle into a local directory and return the path of the bundle below it."""
    import mlflow

    uri = f"models:/{version.name}/{version.version}"
    local = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(directory))
    return Path(local) / "artifacts" / "bundle"


def _version(entity: "ModelVersion") -> Version:
    return Version(
        name=entity.name,
        version=str(entity.version),
        run_id=entity.run_id or "",
        bits_per_byte=float(entity.tags.get("bits_per_byte", "inf")),
        heldout=entity.tags.get("heldout", ""),
        bundle=entity.tags.get("bundle", ""),
        created=int(entity.creation_timestamp // 1000),
        previous=entity.tags.get(PREVIOUS_TAG),
    )
