"""What waits for the worker's main thread: events for the core, and what the readers report.

Responsible for: handing both to the main thread in the order of their arrival, whichever thread they come
from; and for interrupting a chunk of records, so that an event waits for one record at most.

Must not: know what the events mean.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator

from fcluster.worker.consuming import ReaderEvent
from fcluster.worker.core import events


class Inbox:
    """The queue of the main thread.

    Attributes:
        interrupts: if it isn't empty, the chunk ends with the record that is being processed. A list, because
            looking at it is all that a record can afford.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[events.Event | ReaderEvent] = queue.SimpleQueue()
        self.interrupts: list[None] = []

    def post(self, event: events.Event) -> None:
        """Queue an event. The main thread handles it before the next record. For any thread."""
        self._queue.put(event)
        self.interrupt()

    def put(self, report: ReaderEvent) -> None:
        """Queue what a reader reports. The current chunk goes on. For any thread."""
        self._queue.put(report)

    def interrupt(self) -> None:
        """End the current chunk with the record that is being processed. For any thread."""
        self.interrupts.append(None)

    def take(self, timeout_s: float) -> Iterator[events.Event | ReaderEvent]:
        """Everything that is queued, and what comes meanwhile. For the main thread.

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
