"""Tests of the watchdog."""

import threading
import time

from gru.training.watchdog import Watchdog


def test_a_stalled_thread_is_reported_with_its_location() -> None:
    reports: list[tuple[str, str]] = []
    reported = threading.Event()

    def on_stall(location: str, stack: str) -> None:
        reports.append((location, stack))
        reported.set()

    with Watchdog(0.4, on_stall):
        assert reported.wait(10)
        time.sleep(0.6)
    [(location, stack)] = reports
    assert "wait" in location
    assert "test_a_stalled_thread" in stack


def test_a_thread_with_heartbeats_and_one_that_has_ended_are_not_reported() -> None:
    reports: list[str] = []
    with Watchdog(0.5, lambda location, stack: reports.append(location)) as watchdog:
        for _ in range(20):
            time.sleep(0.05)
            watchdog.heartbeat()
    time.sleep(0.7)
    assert not reports
