"""The limit on dead letters of the whole job, `dead.letters.max`.

Responsible for: adding up what the shards have committed, and ending the job when a topic has got more than
allowed. Each shard commits its count with its offsets (`common.letter_counts`) and its owner reports it. So
the sum is exact, whatever was written again, moved or lost in between, and a new leader learns it again.
It counts from the start of the job (`starts`).

A worker doesn't write more than the limit by itself. Several may together, before their epochs are committed
and reported here. Pure.
"""

from __future__ import annotations

from collections import Counter

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.letter_counts import decode_counts
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.ending import Ending
from fcluster.wire.messages import ShardStatus


class Letters:
    """The dead letters of the job.

    Attributes:
        totals: how many the shards have committed since the job's start, by topic.
    """

    def __init__(self, cluster: Cluster, ending: Ending) -> None:
        self._cluster = cluster
        self._ending = ending
        self._most = cluster.settings.dead_letters_max
        self._topics = {stage.name: stage.dead_letter_names for stage in cluster.terms.topology.stages}
        self._texts: dict[ShardId, str] = {}
        self.totals: Counter[str] = Counter()

    def learn(self, status: ShardStatus, last: str = "") -> None:
        """A shard's owner reports what is committed.

        Args:
            status: of a shard that the reporting session owns.
            last: the error of the owner's last dead letter, if it is known.
        """
        if not self._most or status.input:
            return  # the usual case: it comes with each epoch of each shard
        known = self._texts.get(status.shard, "")
        if status.letters == known:
            return
        self._texts[status.shard] = status.letters
        self.totals.subtract(self._counts(status.shard, known))
        self.totals.update(self._counts(status.shard, status.letters))
        for topic, count in self.totals.items():
            if count > self._most:
                self._ending.fail(_too_many(topic, count, self._most, last), self._grace_ms)
                return

    def _counts(self, shard: ShardId, text: str) -> dict[str, int]:
        return decode_counts(text, self._cluster.job_start or 0, self._topics[shard.stage])

    @property
    def _grace_ms(self) -> float:
        return self._cluster.settings.checkpoint_timeout_ms


def _too_many(topic: str, count: int, most: int, last: str) -> Failure:
    latest = f"; the last error: {last}" if last else ""
    return Failure.of_record(
        f"{count:,} dead letters were written to {topic!r} since the job has started, more than the {most:,} "
        f"that dead.letters.max allows{latest}",
        "correct the cause, or raise dead.letters.max, then start the job again: it goes on with the next "
        "record, and counts anew",
    ).fitted()
