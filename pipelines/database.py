"""The database of a storage's workflows: an SQLite file in the storage, or Postgres."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbos import DBOSClient
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from gru import storage
from gru.errors import UserError, first_line

VARIABLE = "DBOS_SYSTEM_DATABASE_URL"
FILE = "workflows.sqlite"  # in a local storage
CONNECT_SECONDS = 10


def address(store: str) -> str:
    """Return the database's URL. Raises UserError if DBOS_SYSTEM_DATABASE_URL is no URL, or is needed and not set."""
    if configured := os.environ.get(VARIABLE):
        try:
            url = make_url(configured)
        except ArgumentError:
            raise UserError(f"{VARIABLE}: expected a URL, such as postgresql://...") from None
        if url.get_backend_name() == "postgresql" and "connect_timeout" not in url.query:
            url = url.update_query_dict({"connect_timeout": str(CONNECT_SECONDS)})
        return url.render_as_string(hide_password=False)
    if not storage.is_local(store):
        raise UserError(f"storage = {store!r} cannot hold a database: set {VARIABLE}, such as postgresql://...")
    return f"sqlite:///{Path(store) / FILE}"


def file_of(database: str) -> Path | None:
    """The file of an SQLite database; None for another kind."""
    url = make_url(database)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def open_client(database: str) -> DBOSClient:
    """Return a client that reads workflows without executing any.

    Raises UserError if there is no database yet, or it does not answer at once.
    """
    path = file_of(database)
    if path and not path.exists():
        raise UserError(f"{path.parent}: no workflow has run with this storage")
    with answering():
        return DBOSClient(system_database_url=database, retry_connection_errors=False)


@contextmanager
def answering() -> Iterator[None]:
    """Raise UserError, with one line, if the database does not answer inside the block."""
    logging.getLogger("dbos").setLevel(logging.CRITICAL)
    try:
        yield
    except SQLAlchemyError as error:
        raise UserError(f"{VARIABLE}: {first_line(error)}") from None
