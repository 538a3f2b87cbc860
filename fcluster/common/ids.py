"""Names that both sides use for the same things."""

from __future__ import annotations

from typing import NamedTuple


class ShardId(NamedTuple):
    """(stage, partition): the unit of work, state, assignment, recovery and migration."""

    stage: str
    partition: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.partition}"


def transactional_ids(job: str, slot: int) -> tuple[str, str]:
    """The two transactional ids of a slot, one for each of its alternating producers.

    They depend on nothing but the slot: few and fixed, so that strays of any id that was ever used
    can be found and aborted.
    """
    return (f"{job}-slot-{slot}-0", f"{job}-slot-{slot}-1")


def journal_topic(job: str) -> str:
    """The compacted topic in which the coordinator remembers slots, assignment and its term."""
    return f"{job}-journal"


def changelog_topic(job: str, stage: str) -> str:
    """The topic that holds the deltas of a stage's state, one partition for each shard."""
    return f"{job}-{stage}-changelog"


def repartition_topic(job: str, stage: str) -> str:
    """The topic that feeds a stage whose records had to be routed by a new key."""
    return f"{job}-{stage}-repartition"
