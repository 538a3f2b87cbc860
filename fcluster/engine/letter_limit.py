"""How many dead letters may be written before the job stops.

Responsible for: the dead letters of a process's shards, by topic, and whether another one may be written.
What a shard has written is committed with its offsets (`common.letter_counts`). So a shard that begins again
from its committed position has the count that belongs there, wherever it was before, and a dead letter that
is written again counts once. The coordinator adds up what all shards have committed. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from fcluster.common.failures import bounded_text
from fcluster.common.ids import ShardId

LETTER_CHARACTERS_MAX = 1_000


class ShardLetters:
    """The dead letters of one shard.

    Attributes:
        counts: by topic.
    """

    __slots__ = ("_limit", "counts")

    def __init__(self, limit: LetterLimit) -> None:
        self._limit = limit
        self.counts: Counter[str] = Counter()

    @property
    def most(self) -> int:
        """See `LetterLimit`."""
        return self._limit.most

    def is_reached(self, topic: str) -> bool:
        """Whether no further dead letter may be written to the topic."""
        return 0 < self._limit.most <= self._limit.totals[topic]

    def count(self, topic: str, error: str) -> None:
        """A dead letter is written in the open epoch, because of this error."""
        if self._limit.most:
            self.counts[topic] += 1
            self._limit.totals[topic] += 1
            self._limit.last = bounded_text(error, LETTER_CHARACTERS_MAX)

    def restore(self, counts: Mapping[str, int]) -> None:
        """The shard begins again where these were committed."""
        self._limit.totals.subtract(self.counts)
        self.counts = Counter(counts)
        self._limit.totals.update(counts)


class LetterLimit:
    """Counts dead letters.

    Args:
        most: how many may be written to a topic. 0: any number, and none are counted.

    Attributes:
        totals: those of all its shards, by topic.
        last: the error of the last one.
    """

    __slots__ = ("_shards", "last", "most", "totals")

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self.totals: Counter[str] = Counter()
        self.last = ""
        self._shards: dict[ShardId, ShardLetters] = {}

    def of(self, shard: ShardId) -> ShardLetters:
        """The dead letters of a shard."""
        letters = self._shards.get(shard)
        if letters is None:
            letters = self._shards[shard] = ShardLetters(self)
        return letters

    def forget(self, shards: Iterable[ShardId]) -> None:
        """Other processes have these shards."""
        for shard in shards:
            letters = self._shards.pop(shard, None)
            if letters is not None:
                letters.restore({})

    def clear(self) -> None:
        """What isn't committed is lost. Shards that go on are restored."""
        self.forget(list(self._shards))
