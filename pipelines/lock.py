"""A lock among processes: of several that are started with the same workflow, one executes it.

The next process gets the lock when its holder ends or dies. The operating system or the database releases it with the
process: flock beside an SQLite database, a session's advisory lock in Postgres.
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

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # after Postgres restarts, the previous holder gets the lock back before any other process may
# Postgres drops the session of a silent host after 10 s + 3 probes of 5 s. A process that dies closes its connection.
KEEPALIVES = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}


@contextmanager
def workflow_lock(database: str, name: str, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock `name`, exclusive among all processes that use this database.

    While another process holds it, `while_waiting` is called every POLL_SECONDS. Raises UserError if the database does
    not answer.
    """
    with answering():
        lock = _lock(database, name)
    try:
        while not lock.acquire():
            while_waiting()
            time.sleep(POLL_SECONDS)
        yield
    finally:
        lock.release()


def _lock(database: str, name: str) -> "_FileLock | _SessionLock":
    file = file_of(database)
    return _FileLock(file.parent / "locks" / name) if file else _SessionLock(database, name)


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
    """An advisory lock of a Postgres session. A thread requests it repeatedly, because a restart of Postgres ends the
    session and releases the lock."""

    def __init__(self, database: str, name: str) -> None:
        url = make_url(database).set(drivername="postgresql+psycopg")
        timeout = {"tcp_user_timeout": int(1000 * GRACE_SECONDS)}  # for data sent over a link that was cut
        self.engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=timeout)
        self.name = name
        self.session: Connection | None = self._connect()
        self.failed_at = -math.inf
        self.released = threading.Event()
        self.renewer = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> bool:
        if time.monotonic() - self.failed_at < GRACE_SECONDS or not self._try_lock():
            return False
        self.renewer.start()
        return True

    def release(self) -> None:
        self.released.set()
        if self.renewer.is_alive():
            self.renewer.join()
        self._disconnect()

    def _connect(self) -> Connection:
        session = self.engine.connect()
        for setting, value in KEEPALIVES.items():
            session.execute(text(f"SET {setting} = {value}"))
        return session

    def _try_lock(self) -> bool:
        try:
            self.session = self.session or self._connect()
            query = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
            return bool(self.session.execute(query, {"name": self.name}).scalar_one())
        except DBAPIError:  # no answer: the workflow waits for Postgres too
            self.failed_at = time.monotonic()
            self._disconnect()
            return False

    def _renew(self) -> None:
        while not self.released.wait(POLL_SECONDS):
            self._try_lock()

    def _disconnect(self) -> None:
        if self.session is not None:
            self.session.invalidate()  # closes the connection, which releases the lock
            self.session.close()
            self.session = None
