"""Of several processes that would work on the same, one does; the next one's turn comes when that one ends, or dies.

The lock goes with the process that holds it: flock beside an SQLite database, a session's advisory lock in Postgres.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from pipelines.database import answering, file_of

LOOK_SECONDS = 1.0
GRACE_SECONDS = 5.0  # once Postgres is back, whoever had the turn is to have it again
# Seconds and tries after which Postgres gives up a host that is silent: a process that dies says so itself.
KEEPALIVES = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}


@contextmanager
def workflow_lock(database: str, name: str, meanwhile: Callable[[], None]) -> Iterator[None]:
    """Among all that use this database, work on `name` alone. While another process does, `meanwhile` is called every
    LOOK_SECONDS. Raises UserError where the database does not answer."""
    with answering():
        lock = _lock(database, name)
    try:
        while not lock.acquire():
            meanwhile()
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        lock.release()


def _lock(database: str, name: str) -> "_FileLock | _SessionLock":
    file = file_of(database)
    return _FileLock(file.parent / "turns" / name) if file else _SessionLock(database, name)


class _FileLock:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self.lock = FileLock(path, blocking=False)

    def acquire(self) -> bool:
        try:
            self.lock.acquire()
        except Timeout:
            return False
        return True

    def release(self) -> None:
        self.lock.release()


class _SessionLock:
    """Held by asking for it again and again: the session, and the lock with it, may be lost when Postgres restarts."""

    def __init__(self, database: str, name: str) -> None:
        url = make_url(database).set(drivername="postgresql+psycopg")
        timeout = {"tcp_user_timeout": int(1000 * GRACE_SECONDS)}  # of what is sent over a link that is cut
        self.engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=timeout)
        self.name = name
        self.session: Connection | None = self._connect()
        self.failed_at = -math.inf
        self.ended = threading.Event()
        self.keeper = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> bool:
        if time.monotonic() - self.failed_at < GRACE_SECONDS or not self._ask():
            return False
        self.keeper.start()
        return True

    def release(self) -> None:
        self.ended.set()
        if self.keeper.is_alive():
            self.keeper.join()
        self._disconnect()

    def _connect(self) -> Connection:
        session = self.engine.connect()
        for setting, value in KEEPALIVES.items():
            session.execute(text(f"SET {setting} = {value}"))
        return session

    def _ask(self) -> bool:
        try:
            self.session = self.session or self._connect()
            query = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
            return bool(self.session.execute(query, {"name": self.name}).scalar_one())
        except DBAPIError:  # it does not answer: the workflow, too, waits until it does
            self.failed_at = time.monotonic()
            self._disconnect()
            return False

    def _keep(self) -> None:
        while not self.ended.wait(LOOK_SECONDS):
            self._ask()

    def _disconnect(self) -> None:
        if self.session is not None:
            self.session.invalidate()  # closes the connection, with which the lock goes
            self.session.close()
            self.session = None
