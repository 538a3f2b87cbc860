"""Bounds every wait: an operation that exceeds its limit ends the process, with a stack dump.

A call of a client library may ignore its own timeout, and a handler may never return. Python can interrupt
neither. But the rest of the system can handle the end of a process: its slot is fenced, and its shards are
replayed from their committed offsets.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from fcluster.common.exit_codes import ExitCode


@dataclass(slots=True)
class _Deadline:
    at_s: float
    name: str
    bound_s: float
    thread: int
    pauses: int = 0


class Watchdog:
    """Watches operations that have begun and not ended.

    Args:
        on_overdue: called with a description of what hangs. Default: dump all stacks and end the process.
    """

    def __init__(self, on_overdue: Callable[[str], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, _Deadline] = {}
        self._next = 0
        self._on_overdue = on_overdue or dump_and_exit

    @contextlib.contextmanager
    def bounded(self, name: str, bound_s: float) -> Generator[None]:
        """Watch the block. It may take at most `bound_s`."""
        with self._lock:
            self._next += 1
            token = self._next
            self._deadlines[token] = _Deadline(
                time.monotonic() + bound_s, name, bound_s, threading.get_ident()
            )
        try:
            yield
        finally:
            with self._lock:
                del self._deadlines[token]

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Within the block, the operations of this thread aren't watched, and their time isn't counted: the
        thread waits for something else that has its own limit.
        """
        thread, begun_s = threading.get_ident(), time.monotonic()
        with self._lock:
            mine = [deadline for deadline in self._deadlines.values() if deadline.thread == thread]
            for deadline in mine:
                deadline.pauses += 1
        try:
            yield
        finally:
            with self._lock:
                for deadline in mine:
                    deadline.pauses -= 1
                    if not deadline.pauses:
                        deadline.at_s += time.monotonic() - begun_s

    def check(self) -> None:
        """Look for overdue operations. Called about every second by a thread that never waits."""
        now = time.monotonic()
        with self._lock:
            overdue = [entry for entry in self._deadlines.values() if not entry.pauses and entry.at_s < now]
        for entry in overdue:
            self._on_overdue(f"{entry.name} has taken more than {entry.bound_s:.0f} s")


def dump_and_exit(what: str, code: int = ExitCode.CRASHED) -> None:
    """End this process with that exit code, and the reason and all stacks on stderr."""
    sys.stderr.write(f"fcluster: {what}: ending this process; its shards are replayed. Stacks:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(all_threads=True)
    os._exit(code)
