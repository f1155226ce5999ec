"""Of several processes that would work on the same, one does; the next one's turn comes when that one ends, or dies.

The lock goes with the process that holds it: flock beside an SQLite database, a session's advisory lock in Postgres.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

LOOK_SECONDS = 1.0
SQLITE = "sqlite:///"
# Seconds and tries after which Postgres gives up a host that is silent: a process that dies says so itself.
KEEPALIVES = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}


@contextmanager
def turn(database: str, name: str, meanwhile: Callable[[], None]) -> Iterator[None]:
    """Among all that use this database, work on `name` alone. While another process does, `meanwhile` is called every
    LOOK_SECONDS."""
    lock = _FileLock(database, name) if database.startswith(SQLITE) else _SessionLock(database, name)
    try:
        while not lock.acquire():
            meanwhile()
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        lock.release()


class _FileLock:
    def __init__(self, database: str, name: str) -> None:
        path = Path(database.removeprefix(SQLITE)).parent / "turns" / name
        path.parent.mkdir(exist_ok=True)
        self.descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)

    def acquire(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        os.close(self.descriptor)


class _SessionLock:
    def __init__(self, database: str, name: str) -> None:
        options = " ".join(f"-c {key}={value}" for key, value in KEEPALIVES.items())
        url = make_url(database).set(drivername="postgresql+psycopg")
        self.engine = create_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={"options": options}
        )
        self.name = name
        self.session: Connection | None = None

    def acquire(self) -> bool:
        try:
            self.session = self.session or self.engine.connect()
            query = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
            return bool(self.session.execute(query, {"name": self.name}).scalar_one())
        except DBAPIError:  # it does not answer: the workflow, too, waits until it does
            self.release()
            return False

    def release(self) -> None:
        if self.session is not None:
            self.session.invalidate()  # the connection is closed, and with it goes the lock
            self.session.close()
            self.session = None
