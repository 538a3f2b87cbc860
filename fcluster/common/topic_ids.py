"""Which topics there are at present, by Kafka's own identity of each.

Responsible for: asking the brokers (`look_at_topics`), and what errors about a topic that isn't the former
one any more say. Kafka gives each topic an id; one that is deleted and made again under the same name has
another one, and the offsets of the former mean nothing in it.

Keeps the rule that not knowing is no fact: what a broker didn't answer, or may not show us, has no entry in
the answer; only an id that differs is a change. Brokers learn of changes one after the other, so what a
single answer says may be some moments old: whoever acts on one asks again first (`settled_look`).
Must not decide what a change leads to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import IncompatibleState

LOOK_TIMEOUT_S: Final = 5.0
SETTLE_S: Final = 2.0
"""A broker may know of a topic's creation or deletion so much later than another one."""
SETTLE_POLL_S: Final = 0.4

_NO_ID: Final = "AAAAAAAAAAAAAAAAAAAAAA"
_GONE: Final = frozenset({"UNKNOWN_TOPIC_OR_PART", "UNKNOWN_TOPIC_ID", "_UNKNOWN_TOPIC"})


@dataclass(frozen=True, slots=True)
class TopicSeen:
    """A topic as a broker describes it.

    Attributes:
        topic_id: 22 characters; empty if the brokers are too old to give ids.
        partitions: how many it has.
    """

    topic_id: str
    partitions: int


Look = Mapping[str, TopicSeen | None]
"""By topic: what was seen, None if it doesn't exist. What isn't known has no entry."""


class TopicReplaced(IncompatibleState):
    """A topic was deleted and made again under the same name."""


def look_at_topics(
    admin: AdminClient, topics: Iterable[str], timeout_s: float = LOOK_TIMEOUT_S
) -> dict[str, TopicSeen | None]:
    """What a broker says of each topic; those of which it says nothing are left out, without an error."""
    wanted = sorted(set(topics))
    if not wanted:
        return {}
    client: Any = admin  # its own types leave the futures' results open
    try:
        futures: dict[str, Future[Any]] = client.describe_topics(
            TopicCollection(wanted), request_timeout=timeout_s
        )
    except KafkaException:
        return {}
    seen: dict[str, TopicSeen | None] = {}
    for topic, future in futures.items():
        try:
            described = future.result(timeout_s + 1)
        except KafkaException as error:
            cause = error.args[0]
            if isinstance(cause, KafkaError) and cause.name() in _GONE:
                seen[topic] = None
            continue
        except TimeoutError:
            continue
        topic_id = str(described.topic_id)
        partitions = len(described.partitions)
        if partitions:  # one that is just being made has none yet
            seen[topic] = TopicSeen("" if topic_id == _NO_ID else topic_id, partitions)
    return seen


def settled_look(
    look: Callable[[Iterable[str]], Look], expected: Mapping[str, str], settle_s: float = SETTLE_S
) -> dict[str, TopicSeen | None]:
    """A look at topics that is asked again for a while where it contradicts what is expected.

    A broker that lags behind the others contradicts for some moments only; a real change stays.

    Args:
        look: such as `look_at_topics` of a client.
        expected: topics, and their ids; empty: any id will do, but the topic has to exist.
        settle_s: how long to ask again.
    """
    seen = dict(look(expected))
    deadline_s = time.monotonic() + settle_s
    doubtful = [
        topic for topic, topic_id in expected.items() if topic in seen and not fits(seen[topic], topic_id)
    ]
    while doubtful and time.monotonic() < deadline_s:
        time.sleep(SETTLE_POLL_S)
        again = look(doubtful)
        for topic in doubtful:
            seen.pop(topic, None)
        seen.update(again)
        # One that isn't answered for this time stays doubtful, but what was said before isn't believed.
        settled = {topic for topic in doubtful if topic in again and fits(again[topic], expected[topic])}
        doubtful = [topic for topic in doubtful if topic not in settled]
    return seen


def fits(seen: TopicSeen | None, topic_id: str) -> bool:
    """Whether the topic that was seen is the one that had this id. One id that isn't known fits any."""
    return seen is not None and (not topic_id or not seen.topic_id or seen.topic_id == topic_id)


def reset_remedy(job: str) -> str:
    """What to do when offsets and state don't fit the topics any more."""
    return (
        f"`fcluster reset` with the file of job {job!r} begins anew with empty state (--to earliest, latest, "
        "a time or offsets), or moves only the offsets and keeps the state (--keep-state). With --dry-run it "
        "shows what would go, and changes nothing."
    )


def source_replaced(job: str, topic: str, former_id: str, now_id: str, affected: str = "") -> TopicReplaced:
    """The error for a source that is another topic than the one the committed offsets are of.

    Args:
        job: its name.
        topic: its name.
        former_id: that the offsets were committed with.
        now_id: that it has now.
        affected: a sentence about records that may have been read under the wrong id.
    """
    return TopicReplaced(
        f"The source {topic!r} was deleted and made anew: the job's offsets are of the former topic (id "
        f"{former_id}), and mean nothing in this one (id {now_id}), whose records would be skipped or taken "
        f"for others.{' ' + affected if affected else ''}",
        remedy=reset_remedy(job),
    )
