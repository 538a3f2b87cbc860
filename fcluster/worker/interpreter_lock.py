"""Lets the other threads run while a handler holds the interpreter, for example in a regular expression that
backtracks for minutes.

Such a call doesn't release the interpreter's lock. No heartbeat could be sent, and nobody would notice that a
record takes too long. But many such calls check for signals. So the heartbeat thread keeps postponing a
timer. If it can't, the timer's signal makes the main thread pause for a moment. The timer counts CPU time of
the process, because a call that sleeps has released the lock. SIGALRM stays free for handlers.

Other calls don't check for signals either (`sum(range(10**12))`). Their worker soon loses its session, and
would use a core for nothing. So a second timer ends the process, with the stacks of all threads.

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
"""Busy threads of libraries may use this much within a moment. Then the signal comes, but has no effect."""
AGAIN_CPU_S = 0.2
STARVED_S = 0.6
PAUSE_S = 0.005

CPUS_MAX = 8
"""Other threads, for example RocksDB's, hardly use more at the same time."""

_is_installed = False
_put_off_s = 0.0
_end_cpu_s = 0.0


def install(session_timeout_s: float) -> None:
    """Handle the timers' signals in this process. Call it in the main thread.

    Args:
        session_timeout_s: a worker that sends no heartbeat for this long has lost its session. The process
            ends after twice as long, however many CPUs it can use meanwhile.
    """
    global _is_installed, _end_cpu_s
    signal.signal(signal.SIGVTALRM, _pause)
    # This isn't a Python handler, because that would never be called.
    faulthandler.register(signal.SIGPROF, sys.stderr, all_threads=True, chain=True)
    _end_cpu_s = 2 * session_timeout_s * min(CPUS_MAX, os.cpu_count() or 1)
    _is_installed = True


def put_off() -> None:
    """Postpone the timers: the calling thread runs, so it isn't starved. Call it several times a second."""
    global _put_off_s
    _put_off_s = time.monotonic()
    if _is_installed:
        signal.setitimer(signal.ITIMER_VIRTUAL, STARVED_CPU_S, AGAIN_CPU_S)
        signal.setitimer(signal.ITIMER_PROF, _end_cpu_s)


def rest() -> None:
    """Stop the timers, because nobody postpones them any more."""
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
