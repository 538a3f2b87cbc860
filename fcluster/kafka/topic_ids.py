"""Topics identified by Kafka's topic ids, and the errors about topics that were replaced.

Responsible for: the result of checking topics (`TopicSeen`; `topic_looks` does the checking), whether it fits
the recorded ids, and the errors if it doesn't. Kafka gives each topic an id. A topic that is deleted and
created again under the same name has another id, and offsets of the old topic are meaningless in it.

Rule: a missing answer proves nothing; only a different id is a change. Must not decide how to react to a
change. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fcluster.common.errors import FclusterError, IncompatibleState, MissingTopic


@dataclass(frozen=True, slots=True)
class TopicSeen:
    """A topic as a broker describes it.

    Attributes:
        topic_id: 22 characters. Empty if the brokers are too old for topic ids.
        partitions: the number of partitions.
    """

    topic_id: str
    partitions: int


Look = Mapping[str, TopicSeen | None]
"""What was seen of each topic, by name. None if it doesn't exist. Topics about which nothing is known have no
entry.
"""


class TopicReplaced(IncompatibleState):
    """A topic was deleted and created again under the same name."""


def fits(seen: TopicSeen | None, topic_id: str) -> bool:
    """Whether the seen topic is the one with this id. An unknown id fits every topic."""
    return seen is not None and (not topic_id or not seen.topic_id or seen.topic_id == topic_id)


def reset_remedy(job: str) -> str:
    """What to do when offsets and state no longer fit the topics."""
    return (
        f"`fcluster reset` with the file of job {job!r} starts again with empty state (--to earliest, "
        "latest, a time or offsets), or changes only the offsets and keeps the state (--keep-state). With "
        "--dry-run it shows what would be deleted, and changes nothing."
    )


def source_replaced(job: str, topic: str, former_id: str, now_id: str, affected: str = "") -> TopicReplaced:
    """The error for a source that isn't the topic that the committed offsets belong to.

    Args:
        job: the job's name.
        topic: the topic's name.
        former_id: the id that the offsets were committed with.
        now_id: the topic's present id.
        affected: a sentence about records that may have been read under the wrong id.
    """
    return TopicReplaced(
        f"The source {topic!r} was deleted and created again: the job's offsets belong to the old topic "
        f"(id {former_id}) and mean nothing in the new one (id {now_id}), whose records would be skipped "
        f"or mistaken for others.{' ' + affected if affected else ''}",
        remedy=reset_remedy(job),
    )


def source_gone(job: str, topic: str) -> FclusterError:
    """The error for a source that no longer exists."""
    return MissingTopic(
        f"The source {topic!r} of job {job!r} was deleted: there is nothing left to read.",
        remedy="Create the topic again if there will be more records. Offsets of the old topic mean nothing "
        f"in the new one: {reset_remedy(job)}",
    )


def sink_lost(job: str, topic: str, former_id: str, seen: TopicSeen | None) -> FclusterError:
    """The error for an output topic that was deleted, or replaced, since the job wrote to it."""
    if seen is None:
        what = f"The output topic {topic!r} of job {job!r} was deleted, with the results in it."
    else:
        what = (
            f"The output topic {topic!r} of job {job!r} was deleted and created again (id {former_id}, now "
            f"{seen.topic_id}): its old results are lost."
        )
    return TopicReplaced(
        what,
        remedy="To go on without them, start the job with --set sink.missing=create, which also creates the "
        "topic if it is missing. To write all results again, run `fcluster reset JOB --to earliest`.",
    )


def internal_topic_lost(
    job: str, topic: str, role: str, former_id: str, seen: TopicSeen | None
) -> FclusterError:
    """The error for an internal topic that was deleted or replaced."""
    made_anew = "" if seen is None else f" and created again (id {former_id}, now {seen.topic_id})"
    lost = {
        "repartition topic": "records in it that weren't processed yet are lost",
        "changelog": "state that is in no snapshot is lost",
    }.get(role, "the coordinator's records are lost")
    return TopicReplaced(
        f"The {role} {topic!r} of job {job!r} was deleted{made_anew}: {lost}.",
        remedy="Let the job process its sources again: `fcluster reset JOB --to earliest` (with --dry-run it "
        "shows what would be deleted).",
    )
