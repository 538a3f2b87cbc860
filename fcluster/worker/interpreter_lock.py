"""Lets the other threads run while a handler holds the interpreter: a regular expression that backtracks for
minutes, say.

Such a call doesn't give up the interpreter's lock. No heartbeat could be sent, and nobody would notice that a
record takes too long. But many such calls look for signals. So the thread of the heartbeats puts off a timer
again and again; if it can't, the timer's signal makes the main thread pause for a moment. The timer counts
CPU time of the process: a call that sleeps has given up the lock. SIGALRM is left to handlers.

Other calls don't look for signals either (`sum(range(10**12))`). By then the worker's session is over, and
it would use a core for nothing. So a second timer ends the process, with the stacks of all threads.

Must not: know about records.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from types import FrameType

STARVED_CPU_S = 1.0
"""Busy threads of libraries may use that much within a moment: then the signal comes, and nothing is done."""
AGAIN_CPU_S = 0.2
STARVED_S = 0.6
PAUSE_S = 0.005

CPUS_MAX = 8
"""Other threads, those of RocksDB say, hardly use more at the same time."""

_is_installed = False
_put_off_s = 0.0
_end_cpu_s = 0.0


def install(session_timeout_s: float) -> None:
    """Handle the timers' signals in this process. Call it in the main thread.

    Args:
        session_timeout_s: a worker that sends no heartbeat for so long has lost its session. The process ends
            after twice as long, however many CPUs it can use meanwhile.
    """
    global _is_installed, _end_cpu_s
    signal.signal(signal.SIGVTALRM, _pause)
    # Not a handler in Python, which would never be called.
    faulthandler.register(signal.SIGPROF, sys.stderr, all_threads=True, chain=True)
    _end_cpu_s = 2 * session_timeout_s * min(CPUS_MAX, os.cpu_count() or 1)
    _is_installed = True


def put_off() -> None:
    """The calling thread runs, so it isn't starved. Call it several times a second."""
    global _put_off_s
    _put_off_s = time.monotonic()
    if _is_installed:
        signal.setitimer(signal.ITIMER_VIRTUAL, STARVED_CPU_S, AGAIN_CPU_S)
        signal.setitimer(signal.ITIMER_PROF, _end_cpu_s)


def rest() -> None:
    """Stop the timers: nobody puts them off any more."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def uninstall() -> None:
    """Undo `install`. Call it in the main thread."""
    global _is_installed
    _is_installed = False
    rest()
    faulthandler.unregister(signal.SIGPROF)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _pause(_number: int, _frame: FrameType | None) -> None:
    if time.monotonic() - _put_off_s > STARVED_S:
        time.sleep(PAUSE_S)
