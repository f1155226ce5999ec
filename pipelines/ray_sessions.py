"""The directories that embedded Rays leave behind: Ray removes none of them.

One is an embedded Ray's if it has the marker that this program writes once that Ray is up. It can be removed when no
process uses it any more. Directories without a marker, and those of other users, are never touched.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.entry import default_ray_directory, ray_directory
from pipelines.service import EmbeddedService, is_alive

MARKER = "gru-storage"  # in the directory of a session: the storage that the embedded Ray belongs to


def mark(ray: EmbeddedService) -> None:
    """Mark the session of an embedded Ray that is up. One that cannot be marked is never removed."""
    process = ray.process()
    if process is None:
        return
    directory = Path(ray_directory() or default_ray_directory())
    with suppress(OSError):
        # The name ends with the process id, which another session may have had before.
        sessions = sorted(directory.glob(f"session_*_{process.pid}"))
        if sessions and sessions[-1].stat().st_mtime >= process.create_time() - 1:
            # Anyone can write to Ray's directories: a link that lies there already must not be followed.
            file = os.open(sessions[-1] / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(file, "w") as marker:  # noqa: PTH123
                marker.write(str(ray.directory.parent))


@dataclass(frozen=True)
class Session:
    """The directory of an embedded Ray of this user."""

    directory: Path
    store: str
    """The storage that the Ray belonged to."""
    size: int
    """Bytes."""
    changed: float
    """When one of its files was modified last: Unix time."""

    def removal(self) -> tuple[str, ...]:
        """Return the paths in the order of removal. The marker goes last, so that a part that is left is recognized."""
        inside = sorted(str(path) for path in self.directory.iterdir() if path.name != MARKER)
        return (*inside, str(self.directory))


def unused() -> list[Session]:
    """Return the marked sessions of this user that no process uses."""
    default = default_ray_directory()
    parents = {default, Path(ray_directory() or default), default.with_name(f"{default.name}-{os.geteuid()}")}
    marked = [session for parent in sorted(parents) for session in _marked(parent)]
    used = _used(marked) if marked else set()
    found: list[Session] = []
    for session in marked:
        with suppress(OSError):  # another `gru clean` may be faster
            found += [_read(session)] if session not in used else []
    return found


def _marked(parent: Path) -> Iterator[Path]:
    """Yield the marked sessions of this user. They must lie there themselves: a link may lead anywhere."""
    for session in sorted(parent.glob("session_*")):
        with suppress(OSError):
            owners = {session.lstat().st_uid, (session / MARKER).lstat().st_uid}
            if owners == {os.geteuid()} and session.is_dir() and not session.is_symlink():
                yield session


def _read(directory: Path) -> Session:
    size, changed = 0, 0.0
    for inside, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                status = Path(inside, name).lstat()
                size, changed = size + status.st_size, max(changed, status.st_mtime)
    return Session(directory, (directory / MARKER).read_text(), size, changed)


def _used(sessions: list[Path]) -> set[Path]:
    """Return the sessions that a process names in its command line, is in, or has a file of open; or whose first
    process, whose id ends the session's name, may still run."""
    used = {session for session in sessions if _is_running(int(session.name.rpartition("_")[2]))}
    for process in psutil.process_iter():
        known: list[str] = []
        with suppress(psutil.Error, OSError):
            known += process.cmdline()
        with suppress(psutil.Error, OSError):
            known += [process.cwd(), *(file.path for file in process.open_files())]
        used |= {session for session in sessions if any(session.name in text for text in known)}
    return used


def _is_running(process_id: int) -> bool:
    try:
        return is_alive(psutil.Process(process_id))
    except psutil.NoSuchProcess:
        return False
