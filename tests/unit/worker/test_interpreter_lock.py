"""Other threads run while a call holds the interpreter's lock, if the call checks for signals."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from fcluster.worker import interpreter_lock


@pytest.fixture
def lock() -> Iterator[None]:
    interpreter_lock.install(session_timeout_s=60)
    yield
    interpreter_lock.uninstall()


class FoundError(Exception):
    """Ends the call that holds the lock, raised from another thread."""


@pytest.mark.usefixtures("lock")
def test_thread_that_postpones_the_timer_runs_while_a_regular_expression_backtracks() -> None:
    turns: list[float] = []
    main_thread = threading.get_ident()

    def end(_number: int, _frame: object) -> None:
        raise FoundError

    def pulse() -> None:
        interpreter_lock.put_off()
        began.set()
        matching.wait()
        while len(turns) < 3:
            time.sleep(0.01)
            turns.append(time.monotonic())
        signal.pthread_kill(main_thread, signal.SIGUSR1)

    def backtrack() -> None:
        matching.set()
        re.match("(a+)+$", "a" * 80 + "b")

    before = signal.signal(signal.SIGUSR1, end)
    began, matching = threading.Event(), threading.Event()
    thread = threading.Thread(target=pulse)
    try:
        thread.start()
        began.wait()
        with pytest.raises(FoundError):
            backtrack()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(turns) == 3


def test_timer_is_not_started_without_a_handler_for_its_signal() -> None:
    interpreter_lock.put_off()
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


@pytest.mark.usefixtures("lock")
def test_timers_stop_once_no_thread_postpones_them() -> None:
    interpreter_lock.put_off()
    assert signal.getitimer(signal.ITIMER_PROF)[0] > 60
    interpreter_lock.rest()
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


DEAF = """
import threading, time
from fcluster.worker import interpreter_lock

def pulse():
    while True:
        interpreter_lock.put_off()
        began.set()
        time.sleep(0.01)

def deaf_handler():
    sum(range(10**15))  # for days, without a look at signals

interpreter_lock.install(session_timeout_s=0.1)
began = threading.Event()
threading.Thread(target=pulse, daemon=True).start()
began.wait()
deaf_handler()
"""


def test_call_that_never_checks_for_signals_ends_the_process_with_its_stacks() -> None:
    ended = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGPROF, ended.stderr
    assert "in deaf_handler" in ended.stderr
