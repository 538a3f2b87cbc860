"""How many dead letters may be written before the job stops.

Responsible for: counting a process's dead letters by topic. What an aborted epoch has written doesn't count,
so a replay counts it once. Pure.
"""

from __future__ import annotations

from collections import Counter


class LetterLimit:
    """Counts dead letters.

    Args:
        most: how many may be written to a topic. 0: any number.
    """

    __slots__ = ("_committed", "_in_flight", "_open", "most")

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._open: Counter[str] = Counter()
        self._in_flight: Counter[str] = Counter()
        self._committed: Counter[str] = Counter()

    def is_reached(self, topic: str) -> bool:
        """Whether no further dead letter may be written to the topic."""
        if not self.most:
            return False
        return self._open[topic] + self._in_flight[topic] + self._committed[topic] >= self.most

    def count(self, topic: str) -> None:
        """A dead letter was written in the open epoch."""
        self._open[topic] += 1

    def freeze(self) -> None:
        """The open epoch ends; the next one is open."""
        self.commit()
        self._in_flight, self._open = self._open, Counter()

    def commit(self) -> None:
        """The epoch that was frozen is committed."""
        self._committed += self._in_flight
        self._in_flight = Counter()

    def abort(self) -> None:
        """What isn't committed is lost, and is processed again."""
        self._open.clear()
        self._in_flight.clear()
