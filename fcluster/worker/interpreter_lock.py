"""Lets the other threads run while a handler holds the interpreter: a regular expression that backtracks for
minutes, say.

Such a call doesn't give up the interpreter's lock. No heartbeat could be sent, and nobody would notice that a
record takes too long. But many such calls look for signals. So the thread of the heartbeats puts off a timer
again and again; if it can't, the timer's signal makes the main thread pause for a moment. The timer counts
CPU time of the process: a call that sleeps has given up the lock. SIGALRM is left to handlers.

Must not: know about records.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

STARVED_CPU_S = 1.0
"""Busy threads of libraries may use that much within a moment: then the signal comes, and nothing is done."""
AGAIN_CPU_S = 0.2
STARVED_S = 0.6
PAUSE_S = 0.005

_is_installed = False
_put_off_s = 0.0


def install() -> None:
    """Handle the timer's signal in this process. Call it in the main thread."""
    global _is_installed
    signal.signal(signal.SIGVTALRM, _pause)
    _is_installed = True


def put_off() -> None:
    """The calling thread runs, so it isn't starved. Call it several times a second."""
    global _put_off_s
    _put_off_s = time.monotonic()
    if _is_installed:
        signal.setitimer(signal.ITIMER_VIRTUAL, STARVED_CPU_S, AGAIN_CPU_S)


def uninstall() -> None:
    """Stop the timer. Call it in the main thread."""
    global _is_installed
    _is_installed = False
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _pause(_number: int, _frame: FrameType | None) -> None:
    if time.monotonic() - _put_off_s > STARVED_S:
        time.sleep(PAUSE_S)
