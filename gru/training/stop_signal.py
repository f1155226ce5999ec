"""SIGTERM and SIGINT in the driver of a training run: they stop the workers, which save a checkpoint first."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from ray.actor import ActorHandle

PATIENCE_SECONDS = 30
"""How long workers have for their last checkpoint after a signal."""


class StopSignal:
    """The signal that this process has received; 0 before one."""

    def __init__(self) -> None:
        self.number = 0

    def wait(self, future: "Future[Any]", channel: ActorHandle) -> bool:
        """Wait until training ends, and return True; raise what it raises.

        After a signal, ask the workers to save and stop; return False if they do not.
        """
        while not future.done() and not self.number:
            with suppress(TimeoutError):
                future.exception(timeout=0.5)
        if not future.done():
            channel.request_stop.remote()
            with suppress(TimeoutError):
                future.exception(timeout=PATIENCE_SECONDS)
        if future.done():
            future.result()
        return future.done()


@contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """In the main thread, catch the first SIGTERM or SIGINT; a second one of the same kind has its usual effect."""
    stop_signal = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop_signal
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        stop_signal.number = number
        signal.signal(number, handlers[signal.Signals(number)])

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield stop_signal
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_in_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Run a function in a daemon thread, so that the main thread is free for signals and may end before it."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future
