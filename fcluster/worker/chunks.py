"""Batches that wait to be processed, and how many of their records are processed at a time.

Responsible for: handing out the records in order, in chunks that take about `AIM_S` however long one record
takes; and keeping what readers reported of their positions until the batches before it are processed. Must
not: process records, or know epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from confluent_kafka import Message

from fcluster.worker.consuming import Batch, ReadUpTo

CHUNK_RECORDS_MAX = 500
AIM_S = 0.005
"""Other events wait at most as long as a chunk takes."""
BACKLOG_S = 0.02
"""If there is more work than this, it is a backlog: epochs then last longer."""
_FORGETTING = 0.5


class Chunks:
    """The batches of all readers and merges, in the order of their arrival."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self._index = 0
        self._taken = 0
        self._record_s = AIM_S  # how long a record takes; the first chunk has one record
        self._added = self._left = 0  # how many batches were added
        self._told: deque[tuple[int, ReadUpTo]] = deque()  # after how many batches each report comes

    def __bool__(self) -> bool:
        return bool(self._batches)

    @property
    def backlog(self) -> bool:
        """Whether more records wait after the chunk that was taken than can be processed soon."""
        if not self._batches:
            return False
        behind = len(self._batches[0].messages) - self._index - self._taken
        return len(self._batches) > 1 or behind * self._record_s > BACKLOG_S

    @property
    def waiting_s(self) -> float:
        """About how long those records take that wait after the chunk that was taken."""
        records = sum(len(batch.messages) for batch in self._batches) - self._index - self._taken
        return records * self._record_s

    def add(self, batch: Batch) -> None:
        """Append a batch."""
        self._batches.append(batch)
        self._added += 1

    def take(self, records_max: int = CHUNK_RECORDS_MAX) -> tuple[Batch, list[Message]]:
        """The next records, from one batch. There must be some. Call `done` afterwards."""
        batch = self._batches[0]
        size = max(1, min(records_max, CHUNK_RECORDS_MAX, int(AIM_S / self._record_s)))
        chunk = batch.messages[self._index : self._index + size]
        self._taken = len(chunk)
        return batch, chunk

    def done(self, left: int, elapsed_s: float) -> None:
        """The records that were taken are processed, except for the last `left` ones, which are handed out
        again.
        """
        if not self._taken or not self._batches:
            return
        processed = self._taken - left
        self._index += processed
        self._taken = 0
        if processed:
            record_s = elapsed_s / processed
            # Follow a slowdown at once, a speed-up step by step.
            self._record_s = max(1e-7, record_s, self._record_s * _FORGETTING)
        if self._index >= len(self._batches[0].messages):
            self._leave_batch()

    def drop_batch(self) -> None:
        """Drop the next batch's records."""
        self._leave_batch()

    def _leave_batch(self) -> None:
        batch = self._batches.popleft()
        self._left += 1
        self._index = self._taken = 0
        batch.reader.done()

    def hold(self, told: ReadUpTo) -> bool:
        """Keep this report while batches wait that were read before it: they aren't processed yet.

        Returns:
            False: there are no such batches, so the report is valid now.
        """
        if not self._batches:
            return False
        if self._told and self._told[-1][0] == self._added and self._told[-1][1].reader is told.reader:
            self._told.pop()  # this one is newer
        self._told.append((self._added, told))
        return True

    def reached(self) -> Iterator[ReadUpTo]:
        """The reports that are valid now, because all batches before them were processed."""
        while self._told and self._told[0][0] <= self._left:
            yield self._told.popleft()[1]
