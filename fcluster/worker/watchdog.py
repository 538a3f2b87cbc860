"""Bounds every wait: what takes longer than it may ends the process, with a stack dump.

A call into a client library may ignore its own time-out, and a handler may never return. Neither can be
interrupted from within Python, but a process that ends is a case that the rest of the system handles: its
slot is fenced and its shards are replayed from their committed offsets.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Generator

EXIT_HUNG = 70
"""Exit code of a process that hung (EX_SOFTWARE)."""


class Watchdog:
    """Watches operations that have begun and not ended.

    Args:
        on_overdue: called with a description of what hangs; by default dumps all stacks and ends the
            process.
    """

    def __init__(self, on_overdue: Callable[[str], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, tuple[float, str, float]] = {}
        self._next = 0
        self._on_overdue = on_overdue or dump_and_exit

    @contextlib.contextmanager
    def bounded(self, name: str, bound_s: float) -> Generator[None]:
        """Watch the block: it may take `bound_s`."""
        with self._lock:
            self._next += 1
            token = self._next
            self._deadlines[token] = (time.monotonic() + bound_s, name, bound_s)
        try:
            yield
        finally:
            with self._lock:
                del self._deadlines[token]

    def check(self) -> None:
        """Look for operations that are overdue; called every second or so by a thread that never waits."""
        now = time.monotonic()
        with self._lock:
            overdue = [entry for entry in self._deadlines.values() if entry[0] < now]
        for _deadline, name, bound_s in overdue:
            self._on_overdue(f"{name} has taken more than {bound_s:.0f} s")


def dump_and_exit(what: str) -> None:
    """End this process, with the reason and all stacks on stderr."""
    sys.stderr.write(f"fcluster: {what}: this process ends, its shards are replayed. Stacks:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_HUNG)
