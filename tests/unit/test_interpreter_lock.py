"""Other threads run while a call holds the interpreter's lock, if it looks for signals."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from fcluster.worker import interpreter_lock


@pytest.fixture
def lock() -> Iterator[None]:
    before = signal.getsignal(signal.SIGVTALRM)
    interpreter_lock.install()
    yield
    interpreter_lock.uninstall()
    signal.signal(signal.SIGVTALRM, before)


class FoundError(Exception):
    """Ends the call that holds the lock, from another thread."""


@pytest.mark.usefixtures("lock")
def test_thread_that_puts_the_timer_off_runs_while_a_regular_expression_backtracks() -> None:
    turns: list[float] = []
    main_thread = threading.get_ident()

    def end(_number: int, _frame: object) -> None:
        raise FoundError

    def pulse() -> None:
        interpreter_lock.put_off()
        began.set()
        while len(turns) < 3:
            time.sleep(0.01)
            turns.append(time.monotonic())
        signal.pthread_kill(main_thread, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, end)
    began = threading.Event()
    thread = threading.Thread(target=pulse)
    try:
        thread.start()
        began.wait()
        with pytest.raises(FoundError):
            re.match("(a+)+$", "a" * 80 + "b")
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(turns) == 3


def test_timer_is_not_started_without_a_handler_for_its_signal() -> None:
    interpreter_lock.put_off()
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
