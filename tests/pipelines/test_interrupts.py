import os
import signal

import pytest

from pipelines.interrupts import interrupts_deferred


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("block")
        done.append("never")
    assert done == ["block"]
    with interrupts_deferred():
        done.append("again")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
