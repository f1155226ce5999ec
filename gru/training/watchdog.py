"""A watchdog for a stalled thread: a read that never returns, a peer that does not answer.

Plain Python. The caller decides what to do about a stall.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType


class Watchdog:
    """Calls `on_stall` once, from its own thread, if the thread that created it gives no heartbeat for `seconds`.

    on_stall: takes one line that says where the thread is, and its whole stack.
    """

    def __init__(self, seconds: float, on_stall: Callable[[str, str], None]) -> None:
        self._seconds, self._on_stall = seconds, on_stall
        self._watched = threading.get_ident()
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self) -> None:
        """Tell the watchdog that the thread is making progress."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last < self._seconds:
                continue
            stack = traceback.extract_stack(sys._current_frames()[self._watched])
            location = next((frame for frame in reversed(stack) if "gru" in frame.filename.split("/")), stack[-1])
            line = f"in {location.name}, {location.filename.rsplit('/', 1)[-1]}:{location.lineno}: {location.line}"
            self._on_stall(line, "".join(traceback.format_list(stack)))
            return

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
