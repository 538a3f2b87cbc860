"""The queue of the worker's main thread: events for the core, and reports of the readers.

Responsible for: passing both to the main thread in the order of their arrival, whichever thread they come
from; and for interrupting a chunk of records, so that an event waits for at most one record.

Must not: know what the events mean.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator

from fcluster.worker.consuming import ReaderEvent
from fcluster.worker.core import events


class CallsEnded:
    """Calls to other services have ended: the main thread takes what has come of them."""


class Inbox:
    """The queue of the main thread.

    Attributes:
        interrupts: if it isn't empty, the chunk ends with the record that is being processed. It is a list,
            because checking it is all that there is time for in each record.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[events.Event | ReaderEvent | CallsEnded] = queue.SimpleQueue()
        self.interrupts: list[None] = []

    def post(self, event: events.Event) -> None:
        """Queue an event. The main thread handles it before the next record. May be called from any
        thread.
        """
        self._queue.put(event)
        self.interrupt()

    def put(self, report: ReaderEvent | CallsEnded) -> None:
        """Queue a report of a reader or of calls. The current chunk goes on. May be called from any
        thread.
        """
        self._queue.put(report)

    def interrupt(self) -> None:
        """End the current chunk with the record that is being processed. May be called from any thread."""
        self.interrupts.append(None)

    def take(self, timeout_s: float) -> Iterator[events.Event | ReaderEvent | CallsEnded]:
        """Everything that is queued, and what arrives meanwhile. Called by the main thread.

        Args:
            timeout_s: how long to wait for something if nothing is queued. 0: not at all.
        """
        self.interrupts.clear()
        try:
            yield self._queue.get(timeout_s > 0, timeout_s)
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return
