"""Each error code of Kafka's is somebody's doing, and what helps is said."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from fcluster.kafka.troubles import Trouble, remedy_for_refusal, trouble_of


@pytest.mark.parametrize(
    "code",
    [
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.INVALID_MSG,
    ],
)
def test_refusal_of_a_record_is_the_records_doing_and_names_topic_and_remedy(code: int) -> None:
    assert trouble_of(code) is Trouble.RECORD
    assert "small-topic" in remedy_for_refusal(code, "small-topic")


@pytest.mark.parametrize(
    "code",
    [KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION],
)
def test_topic_that_is_gone_is_not_the_records_doing(code: int) -> None:
    assert trouble_of(code) is Trouble.TOPIC_GONE
    assert "lost-topic" in remedy_for_refusal(code, "lost-topic")


def test_missing_right_is_not_the_records_doing() -> None:
    assert trouble_of(KafkaError.TOPIC_AUTHORIZATION_FAILED) is Trouble.FORBIDDEN
    assert "ACL" in remedy_for_refusal(KafkaError.TOPIC_AUTHORIZATION_FAILED, "secret")


@pytest.mark.parametrize(
    "code",
    [
        KafkaError._TRANSPORT,
        KafkaError._TIMED_OUT,
        KafkaError._MSG_TIMED_OUT,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError._FENCED,
        KafkaError.TRANSACTION_ABORTABLE,
    ],
)
def test_brokers_that_move_and_fenced_producers_pass(code: int) -> None:
    assert trouble_of(code) is Trouble.PASSING


def test_unknown_code_is_unexpected() -> None:
    assert trouble_of(31_999) is Trouble.UNEXPECTED
