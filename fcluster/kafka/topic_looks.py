"""Asks the brokers which topics exist.

Responsible for: one check (`look_at_topics`), and one that is repeated while it contradicts what is expected
(`settled_look`). Rule: a missing answer proves nothing. A topic about which a broker didn't answer, or that
it may not show us, has no entry in the result. Brokers learn of changes one after another, so a single answer
may be slightly outdated: ask again before acting on it. Must not judge the result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from fcluster.kafka.topic_ids import Look, TopicSeen, fits

LOOK_TIMEOUT_S: Final = 5.0
FIRST_TIMEOUT_S: Final = 0.3
"""Brokers answer within milliseconds; a slower request may be waiting for a dead broker."""
ATTEMPT_TIMEOUT_S: Final = 1.0
REPEAT_S: Final = 0.05
SETTLE_S: Final = 2.0
"""How much later than another one a broker may learn that a topic was created or deleted."""
SETTLE_POLL_S: Final = 0.4

_NO_ID: Final = "AAAAAAAAAAAAAAAAAAAAAA"
_SILENT: Final = frozenset({"_TIMED_OUT", "_TIMED_OUT_QUEUE", "_TRANSPORT", "_DESTROY_BROKER"})
_GONE: Final = frozenset({"UNKNOWN_TOPIC_OR_PART", "UNKNOWN_TOPIC_ID", "_UNKNOWN_TOPIC"})


def look_at_topics(
    admin: AdminClient, topics: Iterable[str], timeout_s: float = LOOK_TIMEOUT_S
) -> dict[str, TopicSeen | None]:
    """What a broker says about each topic. Topics about which it says nothing are left out, without an
    error.
    """
    wanted = sorted(set(topics))
    if not wanted:
        return {}
    # The request goes to the broker that was last known to be the controller. If that broker is dead, the
    # request waits for it until another answer names another controller (decision 0082).
    deadline_s = time.monotonic() + timeout_s
    seen, unanswered = _ask(admin, wanted, min(timeout_s, FIRST_TIMEOUT_S))
    while unanswered and (left_s := deadline_s - time.monotonic()) > 0:
        with contextlib.suppress(KafkaException):
            admin.list_topics(timeout=min(left_s, ATTEMPT_TIMEOUT_S))
        time.sleep(REPEAT_S)
        again, unanswered = _ask(admin, sorted(unanswered), min(left_s, ATTEMPT_TIMEOUT_S))
        seen |= again
    return seen


def _ask(
    admin: AdminClient, wanted: list[str], timeout_s: float
) -> tuple[dict[str, TopicSeen | None], set[str]]:
    """The answers about topics, and the topics without an answer."""
    client: Any = admin  # the client's own types don't say what the futures return
    seen: dict[str, TopicSeen | None] = {}
    unanswered: set[str] = set()
    try:
        futures: dict[str, Future[Any]] = client.describe_topics(
            TopicCollection(wanted), request_timeout=timeout_s
        )
    except KafkaException:
        return seen, unanswered
    for topic, future in futures.items():
        try:
            described = future.result(timeout_s + 1)
        except KafkaException as error:
            cause = error.args[0]
            if isinstance(cause, KafkaError) and cause.name() in _GONE:
                seen[topic] = None
            elif isinstance(cause, KafkaError) and cause.name() in _SILENT:
                unanswered.add(topic)
            continue
        except TimeoutError:
            unanswered.add(topic)
            continue
        topic_id = str(described.topic_id)
        partitions = len(described.partitions)
        if partitions:  # a topic that is just being created has none yet
            seen[topic] = TopicSeen("" if topic_id == _NO_ID else topic_id, partitions)
    return seen, unanswered


def settled_look(
    look: Callable[[Iterable[str]], Look], expected: Mapping[str, str], settle_s: float = SETTLE_S
) -> dict[str, TopicSeen | None]:
    """A check of topics that is repeated for a while if it contradicts the expectation.

    A broker that lags behind the others contradicts it only for a moment; a real change stays.

    Args:
        look: the check, for example `look_at_topics` of a client.
        expected: topics and their ids. With an empty id, any id is fine, but the topic has to exist.
        settle_s: how long to repeat it.
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
        # A topic about which nothing is answered during this time stays doubtful, but the earlier answer
        # isn't believed either.
        settled = {topic for topic in doubtful if topic in again and fits(again[topic], expected[topic])}
        doubtful = [topic for topic in doubtful if topic not in settled]
    return seen
