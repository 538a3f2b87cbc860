"""A request about topics that waits for a missing broker is repeated."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.kafka.topic_ids import TopicSeen
from fcluster.kafka.topic_looks import LOOK_TIMEOUT_S, look_at_topics


class Admin:
    """Gives this answer until its list of brokers is fetched again."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.renewed = False
        self.waits_s: list[float] = []

    def list_topics(self, timeout: float) -> None:
        self.renewed = True

    def describe_topics(self, topics: Any, request_timeout: float) -> dict[str, Future[Any]]:
        self.waits_s.append(request_timeout)
        future: Future[Any] = Future()
        if self.renewed:
            future.set_result(SimpleNamespace(topic_id="id", partitions=[0, 1]))
        else:
            future.set_exception(KafkaException(KafkaError(self.code)))
        return {"topic": future}


def test_unanswered_request_is_repeated_once_the_brokers_are_listed_again() -> None:
    admin: Any = Admin(KafkaError._TIMED_OUT)
    assert look_at_topics(admin, ["topic"]) == {"topic": TopicSeen("id", 2)}
    assert len(admin.waits_s) == 2
    assert sum(admin.waits_s) < LOOK_TIMEOUT_S


@pytest.mark.parametrize(
    ("code", "seen"),
    [(KafkaError.UNKNOWN_TOPIC_OR_PART, {"topic": None}), (KafkaError.TOPIC_AUTHORIZATION_FAILED, {})],
)
def test_refusal_is_an_answer(code: int, seen: dict[str, TopicSeen | None]) -> None:
    admin: Any = Admin(code)
    assert look_at_topics(admin, ["topic"]) == seen
    assert not admin.renewed
