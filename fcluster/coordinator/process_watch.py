"""Notices at once when a worker's process on this host exits.

Responsible for: waiting for processes to exit, by descriptors that stand for the process itself (pidfd), so
that a reused process id is never mistaken for it. Without such descriptors it does nothing. Then a death is
noticed by the lost connection, as on other hosts. Must not decide what an exit means.

Threads: it has its own thread. One other thread calls `watch` and `close`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import threading
from collections.abc import Callable

PROCESSES_MAX = 256
"""Beyond this number on one host, only connections are watched: each process takes a descriptor, and a
process may have only 1,024 by default."""

_log = logging.getLogger("fcluster.coordinator")


class ProcessWatch:
    """Watches processes of this host.

    Args:
        ended: called with a process's name once it has exited, in the watching thread.
    """

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._ended = ended
        self._named: set[str] = set()
        self._new: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._waking, self._wakes = socket.socketpair()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="process-watch", daemon=True)
        self._thread.start()

    def watch(self, name: str, pid: int) -> None:
        """Watch the process `pid` under the name `name`. Calling it again for the same name has no effect."""
        if name in self._named or len(self._named) >= PROCESSES_MAX or not hasattr(os, "pidfd_open"):
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended(name)
            return
        except OSError as error:  # too many descriptors, or the kernel doesn't allow it
            _log.debug("can't watch process %d: %s", pid, error)
            return
        self._named.add(name)
        self._new.put((name, descriptor))
        self._wakes.send(b"\0")

    def close(self) -> None:
        """Stop the thread."""
        self._closing = True
        self._wakes.send(b"\0")
        self._thread.join()
        self._wakes.close()
        self._waking.close()

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._waking, select.POLLIN)
        names: dict[int, str] = {}
        while not self._closing:
            for descriptor, _ in waiting.poll():
                name = names.pop(descriptor, None)
                if name is None:
                    self._waking.recv(4096)
                else:
                    waiting.unregister(descriptor)
                    os.close(descriptor)
                    self._named.discard(name)
                    self._ended(name)
            with contextlib.suppress(queue.Empty):
                while True:
                    name, descriptor = self._new.get_nowait()
                    names[descriptor] = name
                    waiting.register(descriptor, select.POLLIN)
        for descriptor in names:
            os.close(descriptor)
