"""The signals that stop a `gru` command, and a block that they do not interrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # handled as Ctrl-C


@contextmanager
def interrupts_deferred(*only: signal.Signals) -> Iterator[None]:
    """Let no signal that stops this process interrupt the block; one that arrives raises KeyboardInterrupt after it.

    only: the signals meant; none: Ctrl-C and STOP_SIGNALS.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    arrived: list[int] = []
    deferred = only or (signal.SIGINT, *STOP_SIGNALS)
    numbers = [number for number in deferred if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, lambda number, frame: arrived.append(number))
        yield
    finally:
        for number, handler in reversed(before.items()):  # SIGINT last, since its handler may interrupt this loop
            signal.signal(number, handler)
        if arrived:
            raise KeyboardInterrupt
