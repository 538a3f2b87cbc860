"""What is known to be committed, to tell an old answer by.

Responsible for: the rule that a committed offset never goes back, so what a worker has reported as committed
is a lower bound for what Kafka answers. Who asks, and asks again, is the shell (`worker.committed`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

Partition = tuple[str, int]


class ReportedOffsets:
    """By partition of a source: so much is committed at least."""

    def __init__(self) -> None:
        self._offsets: dict[Partition, int] = {}

    def report(self, topic: str, partition: int, offset: int) -> None:
        """So much of this partition is committed at least."""
        self._offsets[topic, partition] = offset

    def known(self, partition: Partition) -> int:
        """What was reported of a partition, 0 if nothing was."""
        return self._offsets.get(partition, 0)

    def find_older(self, answered: Mapping[Partition, int | None]) -> Partition | None:
        """A partition of which less was answered than is committed; None: there is none.

        Args:
            answered: the committed offsets as a broker tells them; None: it has none.
        """
        return next((at for at, offset in answered.items() if (offset or 0) < self.known(at)), None)

    def forget(self) -> None:
        """The offsets were set back from outside: what was reported is no bound any more."""
        self._offsets.clear()
