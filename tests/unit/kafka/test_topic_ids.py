from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.common.positions import CommittedPosition, UnreadableMetadataError, decode_position
from fcluster.kafka.topic_ids import TopicSeen, fits, source_replaced
from fcluster.kafka.topic_looks import look_at_topics, settled_look

ID = "cbT7kVgPRZK8Dz7Rp-lM8w"
OTHER = "+/T7kVgPRZK8Dz7Rp_lM8-"


@pytest.mark.parametrize("topic_id", [ID, OTHER])
def test_position_with_a_topic_id_is_read_back_unchanged(topic_id: str) -> None:
    position = CommittedPosition(7, 5, 3, "0123456789ab", topic_id)
    assert decode_position(7, position.encode_metadata()) == position


def test_topic_id_is_unknown_in_positions_of_earlier_versions() -> None:
    assert decode_position(7, "1:5:3:0123456789ab") == CommittedPosition(7, 5, 3, "0123456789ab", "")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "",
        "2:5:3:f:",
        "1:5:3:f:" + ID,
        "2:5:3:f",
        "2:5:3:f:not an id",
        "2:x:3:f:" + ID,
        "3:5:3:f:" + ID,
    ],
)
def test_metadata_that_is_not_ours_is_refused(metadata: str | None) -> None:
    with pytest.raises(UnreadableMetadataError):
        decode_position(7, metadata)


def test_metadata_stays_far_below_what_brokers_keep() -> None:
    position = CommittedPosition(2**62, 2**62, 2**62, "0123456789ab", "x" * 64)
    assert len(position.encode_metadata()) < 256


class Describes:
    """An admin client with scripted answers of its brokers."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def list_topics(self, timeout: float) -> None:
        pass

    def describe_topics(self, topics: Any, **_: Any) -> dict[str, Future[Any]]:
        del topics
        futures: dict[str, Future[Any]] = {}
        for topic, answer in self.answers.items():
            future = futures[topic] = Future()
            if isinstance(answer, str):
                future.set_exception(KafkaException(KafkaError(getattr(KafkaError, answer))))
            else:
                future.set_result(answer)
        return futures


def described(topic_id: str, partitions: int) -> Any:
    return SimpleNamespace(topic_id=topic_id, partitions=[None] * partitions)


def test_missing_topics_are_distinguished_from_unknown_ones() -> None:
    admin: Any = Describes(
        {
            "there": described(ID, 3),
            "gone": "UNKNOWN_TOPIC_OR_PART",
            "secret": "TOPIC_AUTHORIZATION_FAILED",
            "away": "_TIMED_OUT",
            "being-made": described(ID, 0),
            "old-broker": described("AAAAAAAAAAAAAAAAAAAAAA", 1),
        }
    )
    assert look_at_topics(admin, admin.answers, timeout_s=0.2) == {
        "there": TopicSeen(ID, 3),
        "gone": None,
        "old-broker": TopicSeen("", 1),
    }


def test_unknown_id_contradicts_no_other() -> None:
    assert fits(TopicSeen("", 1), ID)
    assert fits(TopicSeen(ID, 1), "")
    assert not fits(TopicSeen(OTHER, 1), ID)
    assert not fits(None, "")


def looks(*answers: dict[str, TopicSeen | None]) -> Any:
    remaining = list(answers)

    def look(topics: Iterable[str]) -> dict[str, TopicSeen | None]:
        answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return {topic: answer[topic] for topic in topics if topic in answer}

    return look


def test_single_answer_of_a_lagging_broker_is_not_trusted() -> None:
    look = looks({"t": TopicSeen(OTHER, 1)}, {"t": None}, {}, {"t": TopicSeen(ID, 2)})
    assert settled_look(look, {"t": ID}, 10) == {"t": TopicSeen(ID, 2)}


def test_lasting_change_is_reported() -> None:
    assert settled_look(looks({"t": TopicSeen(OTHER, 1)}), {"t": ID}, 0.5) == {"t": TopicSeen(OTHER, 1)}


def test_replaced_source_is_named_with_both_ids_and_the_choice() -> None:
    error = source_replaced("visits", "pages", ID, OTHER)
    assert "was deleted and created again" in error.message
    for text in ("'pages'", ID, OTHER):
        assert text in error.message
    for text in ("fcluster reset", "--to earliest", "--keep-state", "--dry-run"):
        assert text in error.remedy
