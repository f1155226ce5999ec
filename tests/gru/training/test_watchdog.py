import threading
import time

from gru.training.watchdog import Watchdog


def test_a_thread_that_stands_still_is_noticed_with_the_place_where_it_is() -> None:
    heard: list[tuple[str, str]] = []
    noticed = threading.Event()

    def stalled(place: str, stack: str) -> None:
        heard.append((place, stack))
        noticed.set()

    with Watchdog(0.4, stalled):
        assert noticed.wait(10)
        time.sleep(0.6)
    [(place, stack)] = heard
    assert "wait" in place
    assert "test_a_thread_that_stands_still" in stack


def test_one_that_goes_on_is_left_alone_and_so_is_one_that_has_ended() -> None:
    heard: list[str] = []
    with Watchdog(0.5, lambda place, stack: heard.append(place)) as watchdog:
        for _ in range(20):
            time.sleep(0.05)
            watchdog.heartbeat()
    time.sleep(0.7)
    assert not heard
