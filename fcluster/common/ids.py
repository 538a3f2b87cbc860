"""Names that coordinator and workers share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

TOPIC_NAME_CHARACTERS_MAX: Final = 249
"""Kafka's own limit."""
_DIGEST_CHARACTERS: Final = 10
_INTERNAL: Final = re.compile(rf".+-(changelog|repartition)-[0-9a-f]{{{_DIGEST_CHARACTERS}}}")


class ShardId(NamedTuple):
    """(stage, partition): the unit of work, state, assignment, recovery and migration."""

    stage: str
    partition: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.partition}"


def transactional_ids(job: str, slot: int) -> tuple[str, str]:
    """The two transactional ids of a slot, one for each of its producers.

    They depend only on the slot, so there are few. Open transactions of every id that was ever used can
    therefore be found and aborted.
    """
    return (f"{job}-slot-{slot}-0", f"{job}-slot-{slot}-1")


def journal_topic(job: str) -> str:
    """The compacted topic in which the coordinator records slots, assignment and its term.

    It must be possible to find it by the job's name alone. No two jobs have the same journal topic.
    """
    plain = f"{job}-journal"
    if len(plain) <= TOPIC_NAME_CHARACTERS_MAX:
        return plain
    return _shortened(job, f"-{_digest('journal', job)}-journal")


def coordinator_id(job: str) -> str:
    """The transactional id with which the leading coordinator writes the journal."""
    return f"{job}-coordinator"


def changelog_topic(job: str, stage: str) -> str:
    """The topic that holds the deltas of a stage's state, with one partition for each shard."""
    return _internal_topic("changelog", job, stage)


def repartition_topic(job: str, stage: str) -> str:
    """The topic that feeds a stage whose records had to be routed by a new key."""
    return _internal_topic("repartition", job, stage)


def former_changelog_topic(job: str, stage: str) -> str:
    """The changelog's name in older versions, where names were ambiguous. State may still be there."""
    return f"{job}-{stage}-changelog"


def former_repartition_topic(job: str, stage: str) -> str:
    """The repartition topic's name in older versions, where names were ambiguous. Records may still be
    there.
    """
    return f"{job}-{stage}-repartition"


def is_internal_topic(name: str) -> bool:
    """Whether a changelog or repartition topic of some fcluster job could have this name."""
    return _INTERNAL.fullmatch(name) is not None


def colliding_topic(name: str, existing: Iterable[str]) -> str | None:
    """The topic among `existing` that keeps Kafka from creating `name`, or None.

    In the names of its metrics, Kafka replaces "." by "_". So it refuses a topic whose name differs from
    another one only in that.
    """
    plain = name.replace(".", "_")
    return next((other for other in existing if other != name and other.replace(".", "_") == plain), None)


def _internal_topic(kind: str, job: str, stage: str) -> str:
    # Names of jobs and stages may contain every character that is legal in a topic's name, so no separator
    # between them is unambiguous. The digest is unambiguous: it is computed from each name separately. It
    # also distinguishes names that differ only in "." and "_", and names that had to be cut.
    return _shortened(f"{job}-{stage}", f"-{kind}-{_digest(kind, job, stage)}")


def _shortened(text: str, tail: str) -> str:
    return text[: TOPIC_NAME_CHARACTERS_MAX - len(tail)] + tail


def _digest(*names: str) -> str:
    return hashlib.sha256("/".join(names).encode()).hexdigest()[:_DIGEST_CHARACTERS]
