"""Wait for what threads and other processes do."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(what: str, condition: Callable[[], Any], seconds: float = 300, every: float = 0.1) -> Any:
    """Return the first truthy value of `condition`. Fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"waited {seconds:g} s for {what}")
