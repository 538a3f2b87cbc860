"""Where a bounded run ends: the offsets up to which it reads, fixed once when the run begins.

Responsible for: `RunEnd`, and its form in the journal. Invariant: the journal holds an end before any worker
is told of it, and it never changes while the run lasts, whoever leads. So each record is in the run or not,
whatever dies in between. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from fcluster.common.ids import ShardId
from fcluster.wire.messages import EndOffset

if TYPE_CHECKING:
    from fcluster.coordinator.core.cluster import Cluster

RUN_END_KEY: Final = "run-end"
"""Journal key of the end of a bounded run."""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The end of a bounded run.

    Attributes:
        text: what the user has asked for, in words.
        offsets: for each topic and partition: the first offset that the run doesn't read. It has the topics
            that the job only reads. Those of the user that it also writes are added once all that is written
            to them is committed.
        is_over: whether the run has come to its end.
    """

    text: str
    offsets: Mapping[str, Mapping[int, int]]
    is_over: bool = False

    def with_topic(self, topic: str, offsets: Mapping[int, int]) -> RunEnd:
        """A copy that knows the end of this topic, too. If it is known already, that one stays."""
        return replace(self, offsets={topic: dict(offsets), **self.offsets})

    def over(self) -> RunEnd:
        """A copy that says that the run has come to its end."""
        return replace(self, is_over=True)

    def document(self) -> dict[str, Any]:
        """Its form in the journal."""
        return {
            "text": self.text,
            "offsets": {
                topic: {str(partition): offset for partition, offset in offsets.items()}
                for topic, offsets in self.offsets.items()
            },
            "over": self.is_over,
        }

    @staticmethod
    def of_document(document: Mapping[str, Any]) -> RunEnd:
        """What `document` was made from."""
        offsets = {
            topic: {int(partition): int(offset) for partition, offset in of_topic.items()}
            for topic, of_topic in document["offsets"].items()
        }
        return RunEnd(str(document["text"]), offsets, bool(document["over"]))


def ends_of(
    cluster: Cluster, shards: Iterable[ShardId], topics: Collection[str] | None = None
) -> list[EndOffset]:
    """What the workers of these shards have to know about the end of the run.

    Args:
        topics: only of these topics. None: of all.
    """
    run_end = cluster.run_end
    if run_end is None:
        return []
    return [
        EndOffset(shard, offsets.get(shard.partition, 0), number)
        for shard in shards
        for number, source in enumerate(cluster.terms.topology.stage(shard.stage).inputs)
        if not source.internal and (topics is None or source.topic.name in topics)
        if (offsets := run_end.offsets.get(source.topic.name)) is not None
    ]
