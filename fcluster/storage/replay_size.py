"""How much a restore of a shard would have to replay: the deltas since the newest snapshot.

Responsible for: that sum, known or estimated. It decides when a snapshot is due before its interval is over.
Must not know Kafka or the snapshot store. Pure.
"""

from __future__ import annotations

from collections import deque

STEPS_MAX = 256


class ReplaySize:
    """The deltas of one shard since this worker became its owner.

    Older deltas weren't counted here. Only the number of offsets between the newest snapshot and the takeover
    is known, so their size is estimated from the counted deltas.

    Args:
        offset: the position of the shard's state in its changelog.
    """

    def __init__(self, offset: int) -> None:
        self.snapshot_offset: int | None = None
        """The position of the newest snapshot. None if it hasn't been looked up yet."""
        self.not_before_s = 0.0
        """A failed attempt is not repeated before this time."""
        self._from_offset = offset
        self._end_offset = offset
        self._steps: deque[tuple[int, int]] = deque()

    def grown(self, next_offset: int, delta_bytes: int) -> None:
        """A delta of this many bytes was committed. The changelog continues at `next_offset`."""
        self._end_offset = next_offset
        if len(self._steps) >= STEPS_MAX:
            _, bytes_before = self._steps.pop()
            delta_bytes += bytes_before
        self._steps.append((next_offset, delta_bytes))

    def snapshotted(self, offset: int) -> None:
        """The newest snapshot is at this position."""
        self.snapshot_offset = offset
        while self._steps and self._steps[0][0] <= offset:
            self._from_offset = self._steps.popleft()[0]

    @property
    def bytes(self) -> int:
        """How many bytes a restore from the newest snapshot would read, as far as that is known."""
        counted_bytes = sum(size for _, size in tuple(self._steps))
        if self.snapshot_offset is None:
            return counted_bytes
        uncounted = max(0, self._from_offset - self.snapshot_offset)
        counted = self._end_offset - self._from_offset
        return counted_bytes + (uncounted * counted_bytes // counted if counted > 0 else 0)
