"""Checks the job's topics and its consumer group repeatedly, in its own thread.

Responsible for: deciding when to check, and passing on the result (`TopicsLooked`, `GroupLooked`). Rules: a
check costs the brokers next to nothing (one request a second), brokers that don't answer are asked at growing
intervals, and no check blocks the coordinator's loop. Must not judge the result.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from fcluster.common.positions import UnreadableMetadataError, decode_position
from fcluster.coordinator.core.events import GroupLooked, TopicsLooked
from fcluster.kafka.clients import Admin
from fcluster.kafka.topic_looks import look_at_topics

_log = logging.getLogger("fcluster.coordinator")

LOOK_INTERVAL_S: Final = 1.0
DOUBTFUL_INTERVAL_S: Final = 0.4
UNANSWERED_INTERVAL_S_MAX: Final = 10.0
GROUP_EVERY_LOOKS: Final = 3
GROUP_TIMEOUT_S: Final = 3.0


class TopicWatch:
    """Checks until it is closed.

    Args:
        admin: asks about topics and the group.
        consumer: a read-uncommitted consumer of the job's group. It asks for the committed offsets.
        group: the job's name.
        topics: the topics to check.
        partitions: returns the source partitions whose offsets belong to the job.
        post: called with the result, in the watch's thread.
        in_doubt: says whether another check is wanted soon.
    """

    def __init__(
        self,
        admin: Admin,
        consumer: Consumer,
        group: str,
        *,
        topics: Iterable[str],
        partitions: Callable[[], Sequence[tuple[str, int]]],
        post: Callable[[TopicsLooked | GroupLooked], None],
        in_doubt: Callable[[], bool],
    ) -> None:
        self._admin = admin
        self._consumer = consumer
        self._members = GroupMembers(admin, group)
        self._topics = sorted(topics)
        self._partitions = partitions
        self._post = post
        self._in_doubt = in_doubt
        self._closing = threading.Event()
        self._interval_s = LOOK_INTERVAL_S
        self._thread = threading.Thread(target=self._run, name="topics", daemon=True)

    def start(self) -> None:
        """Start checking."""
        self._thread.start()

    def close(self) -> None:
        """Stop. A check that is running ends by itself."""
        self._closing.set()

    def join(self, timeout_s: float) -> None:
        """Wait until no request is running, so that the clients can be released."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        looks = 0
        while not self._closing.is_set():
            try:
                self._look(with_group=looks % GROUP_EVERY_LOOKS == 0)
            except Exception:  # noqa: BLE001  the watch must survive unexpected errors
                _log.exception("checking the topics failed")
            looks += 1
            self._closing.wait(DOUBTFUL_INTERVAL_S if self._in_doubt() else self._interval_s)

    def _look(self, *, with_group: bool) -> None:
        look = look_at_topics(self._admin, self._topics)
        if self._closing.is_set():
            return
        if not look:
            self._interval_s = min(2 * self._interval_s, UNANSWERED_INTERVAL_S_MAX)
            return
        self._interval_s = LOOK_INTERVAL_S
        self._post(TopicsLooked(look))
        if with_group:
            group = look_at_group(self._members, self._consumer, self._partitions())
            if group is not None and not self._closing.is_set():
                self._post(group)


def look_at_group(
    members: GroupMembers, consumer: Consumer, partitions: Sequence[tuple[str, int]]
) -> GroupLooked | None:
    """The members and offsets of the job's group that don't belong to fcluster. None if that isn't known at
    present.
    """
    try:
        answer = consumer.committed([TopicPartition(*at) for at in partitions], timeout=GROUP_TIMEOUT_S)
    except KafkaException:
        return None
    foreign: dict[tuple[str, int], int] = {}
    for at in answer:
        if at.error is not None:
            return None
        if at.offset >= 0:
            try:
                decode_position(at.offset, at.metadata)
            except UnreadableMetadataError:
                foreign[at.topic, at.partition] = at.offset
    return GroupLooked(foreign, members.now())


class GroupMembers:
    """Asks which members a consumer group has.

    It asks all brokers, by a call that librdkafka has deprecated. The call that replaces it aborts the
    process when a broker comes back, like every request of an admin client to a group's coordinator (decision
    0083).
    """

    def __init__(self, admin: Admin, group: str) -> None:
        self._admin = admin
        self._group = group

    def now(self) -> list[str] | None:
        """The present members, each as CLIENT at HOST. None if they aren't known, because a broker is
        down.
        """
        try:
            groups = self._admin.list_groups(self._group, timeout=GROUP_TIMEOUT_S)
        except KafkaException:
            return None
        if any(group.error is not None for group in groups):
            return None
        return [
            f"{member.client_id} at {str(member.client_host).lstrip('/')}"
            for group in groups
            for member in group.members
        ]
