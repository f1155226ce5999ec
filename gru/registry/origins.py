"""The lineage of every version in MLflow's registry, read from the server or, while none is up, from its database.

Versions that another program registered are left out.
"""

import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gru.errors import UserError, first_line
from gru.registry.lineage import Lineage

_LINEAGE = "artifacts/bundle/lineage.json"  # below a version's files


@dataclass(frozen=True)
class Origin:
    """A registered version, and what it was made from."""

    name: str
    version: str
    aliases: tuple[str, ...]
    lineage: Lineage


def server_origins() -> list[Origin]:
    """Return the origins of all versions at MLflow's tracking URI. Raises UserError if a lineage cannot be read."""
    import mlflow

    def read(uri: str) -> str:
        with tempfile.TemporaryDirectory(prefix="gru-lineage-") as temporary:
            local = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{_LINEAGE}", dst_path=temporary)
            return Path(local).read_text()

    return [*_origins(mlflow.MlflowClient(), read)]


def database_origins(directory: Path) -> list[Origin]:
    """As `server_origins`, of the embedded MLflow server whose database and artifacts are in this directory.

    The server need not be up; nothing is written.
    """
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

    def read(uri: str) -> str:
        inner = urllib.parse.urlsplit(uri).path.lstrip("/")  # of mlflow-artifacts:/..., which only the server resolves
        return (directory / "artifacts" / inner / _LINEAGE).read_text()

    return [*_origins(SqlAlchemyStore(f"sqlite:///{directory / 'mlflow.db'}"), read)]


def _origins(registry: Any, read: Callable[[str], str]) -> Iterator[Origin]:
    """Yield the origins of all versions. read: returns the lineage.json below the URI of a version's files."""
    aliases = {model.name: model.aliases for model in _pages(registry.search_registered_models)}
    for entity in _pages(registry.search_model_versions):
        name, version = entity.name, str(entity.version)
        if "bundle" not in entity.tags:
            continue
        try:
            lineage = Lineage.model_validate_json(read(registry.get_model_version_download_uri(name, version)))
        except Exception as error:  # a registry, its artifacts' store and a format each raise their own kinds
            raise UserError(f"lineage of {name} version {version}: {first_line(error)}") from None
        mine = tuple(alias for alias, number in aliases.get(name, {}).items() if str(number) == version)
        yield Origin(name, version, mine, lineage)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield all results of a search that returns them by page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return
