"""Notices that a thread has come to a halt: a read that never returns, a peer that is silent.

Plain Python. What to do about it is the caller's business.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType


class Watchdog:
    """Calls `stalled` once, from a thread of its own, when the thread that made it has given no beat for `seconds`.

    stalled: takes one line that says where the thread is, and its whole stack.
    """

    def __init__(self, seconds: float, stalled: Callable[[str, str], None]) -> None:
        self._seconds, self._stalled = seconds, stalled
        self._watched = threading.get_ident()
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last < self._seconds:
                continue
            stack = traceback.extract_stack(sys._current_frames()[self._watched])
            place = next((frame for frame in reversed(stack) if "gru" in frame.filename.split("/")), stack[-1])
            line = f"in {place.name}, {place.filename.rsplit('/', 1)[-1]}:{place.lineno}: {place.line}"
            self._stalled(line, "".join(traceback.format_list(stack)))
            return

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
