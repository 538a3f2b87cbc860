"""Offsets that are known to be committed, used to recognise outdated answers.

Responsible for: the rule that a committed offset never goes back. So an offset that a worker has reported as
committed is a lower bound for Kafka's answers. The shell (`worker.committed`) asks Kafka, and asks again.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

Partition = tuple[str, int]


class ReportedOffsets:
    """For each partition of a source: an offset that is committed at least."""

    def __init__(self) -> None:
        self._offsets: dict[Partition, int] = {}

    def report(self, topic: str, partition: int, offset: int) -> None:
        """Note that at least this offset of the partition is committed."""
        self._offsets[topic, partition] = offset

    def known(self, partition: Partition) -> int:
        """What was reported of a partition, 0 if nothing was reported."""
        return self._offsets.get(partition, 0)

    def find_older(self, answered: Mapping[Partition, int | None]) -> Partition | None:
        """A partition for which the answer is lower than what is committed. None if there is none.

        Args:
            answered: the committed offsets that a broker returned. None: it has none.
        """
        return next((at for at, offset in answered.items() if (offset or 0) < self.known(at)), None)

    def forget(self) -> None:
        """The offsets were set back from outside, so what was reported is no longer a bound."""
        self._offsets.clear()
