"""Batches that wait to be processed, and how much of them is processed at a time.

Responsible for: handing out the records in order, in chunks that take about `AIM_S` however long a record
takes, and the idle reports that came behind them. Must not: process records, or know of epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from confluent_kafka import Message

from fcluster.worker.consuming import Batch, Idle, SourceReader

CHUNK_RECORDS_MAX = 500
AIM_S = 0.005
"""What else has happened waits no longer than a chunk takes."""
BACKLOG_S = 0.02
"""Work for longer than that is a backlog: epochs then take their time."""
_FORGETTING = 0.5


class Chunks:
    """The batches of all readers (and merges), in the order in which they came."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self._index = 0
        self._taken = 0
        self._record_s = AIM_S  # what a record takes; the first chunk has one record
        self._idle: dict[SourceReader, Idle] = {}

    def __bool__(self) -> bool:
        return bool(self._batches)

    @property
    def backlog(self) -> bool:
        """Whether more waits behind the chunk that was taken than is soon processed."""
        if not self._batches:
            return False
        behind = len(self._batches[0].messages) - self._index - self._taken
        return len(self._batches) > 1 or behind * self._record_s > BACKLOG_S

    def add(self, batch: Batch) -> None:
        """Behind those that are there."""
        self._batches.append(batch)

    def take(self, records_max: int = CHUNK_RECORDS_MAX) -> tuple[Batch, list[Message]]:
        """The next records, of one batch. There must be some; `done` says what became of them."""
        batch = self._batches[0]
        size = max(1, min(records_max, CHUNK_RECORDS_MAX, int(AIM_S / self._record_s)))
        chunk = batch.messages[self._index : self._index + size]
        self._taken = len(chunk)
        return batch, chunk

    def done(self, left: int, elapsed_s: float) -> None:
        """What was taken is processed but for the last `left` records, which come again."""
        if not self._taken or not self._batches:
            return
        processed = self._taken - left
        self._index += processed
        self._taken = 0
        if processed:
            record_s = elapsed_s / processed
            # Slower is believed at once, faster step by step.
            self._record_s = max(1e-7, record_s, self._record_s * _FORGETTING)
        if self._index >= len(self._batches[0].messages):
            self._leave_batch()

    def drop_batch(self) -> None:
        """Nobody wants the next batch's records."""
        self._leave_batch()

    def _leave_batch(self) -> None:
        batch = self._batches.popleft()
        self._index = self._taken = 0
        batch.reader.done()

    def hold_idle(self, idle: Idle) -> bool:
        """Keep it if batches wait: it speaks of what was read, and what waits isn't processed."""
        if self._batches:
            self._idle[idle.reader] = idle
        return bool(self._batches)

    def idle(self) -> Iterator[Idle]:
        """What idle readers have reported, once no batch waits any more."""
        while self._idle and not self._batches:
            yield self._idle.popitem()[1]
