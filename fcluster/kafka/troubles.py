"""What Kafka's error codes mean for a write: the cause, and the remedy.

Responsible for: distinguishing, by error code and in one place, permanent refusals from temporary errors; and
the texts for the user. Must not: talk to Kafka, or decide what follows from an error.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from confluent_kafka import KafkaError


class Trouble(Enum):
    """The cause of an error."""

    RECORD = "record"
    """The broker refuses this record, however often it is sent: it is too large, has no key, or has a bad
    timestamp.
    """
    TOPIC_GONE = "topic gone"
    """The topic or partition doesn't exist, as far as the broker knows."""
    FORBIDDEN = "forbidden"
    """The job's Kafka user lacks the permission."""
    PASSING = "passing"
    """Temporary: brokers are down, moving or busy, or a transaction was taken from its producer."""
    UNEXPECTED = "unexpected"
    """Any other cause. It may be temporary or permanent."""


_RECORD: Final = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError._BAD_MSG,
    }
)
_TOPIC_GONE: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNKNOWN_TOPIC_ID,
        KafkaError.INCONSISTENT_TOPIC_ID,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)
_FORBIDDEN: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.DELEGATION_TOKEN_AUTHORIZATION_FAILED,
    }
)
_PASSING: Final = frozenset(
    {
        # Brokers and coordinators that are down, moving or busy.
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._DESTROY_BROKER,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._WAIT_COORD,
        KafkaError._QUEUE_FULL,
        KafkaError._RETRY,
        KafkaError._OUTDATED,
        KafkaError._ISR_INSUFF,
        KafkaError._NODE_UPDATE,
        KafkaError._CONFLICT,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_CONTROLLER,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.STALE_BROKER_EPOCH,
        KafkaError.ELIGIBLE_LEADERS_NOT_AVAILABLE,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.REASSIGNMENT_IN_PROGRESS,
        KafkaError.REBOOTSTRAP_REQUIRED,
        # A transaction that was aborted or taken over: a new session begins with its own producers.
        KafkaError._FENCED,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._PURGE_QUEUE,
        KafkaError.CONCURRENT_TRANSACTIONS,
        KafkaError.DUPLICATE_SEQUENCE_NUMBER,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.INVALID_PRODUCER_ID_MAPPING,
        KafkaError.INVALID_TXN_STATE,
        KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
        KafkaError.PRODUCER_FENCED,
        KafkaError.TRANSACTION_ABORTABLE,
        KafkaError.TRANSACTION_COORDINATOR_FENCED,
        KafkaError.UNKNOWN_PRODUCER_ID,
    }
)


def trouble_of(code: int) -> Trouble:
    """The cause of an error with this code (`KafkaError.code()`)."""
    if code in _RECORD:
        return Trouble.RECORD
    if code in _TOPIC_GONE:
        return Trouble.TOPIC_GONE
    if code in _FORBIDDEN:
        return Trouble.FORBIDDEN
    return Trouble.PASSING if code in _PASSING else Trouble.UNEXPECTED


def remedy_for_refusal(code: int, topic: str) -> str:
    """What helps if `topic` (may be empty) refuses a record for this reason."""
    name = topic or "the topic"
    match trouble_of(code):
        case Trouble.TOPIC_GONE:
            return (
                f"If {name} was deleted, start the job with --set sink.missing=create, which creates it "
                "again (`fcluster reset JOB --to earliest` also writes its old results again). Otherwise "
                "correct its name in the job."
            )
        case Trouble.FORBIDDEN:
            return f"Let the job's Kafka user write to {name} (docs/security.md lists the ACLs it needs)."
        case Trouble.RECORD:
            return _REMEDIES.get(code, _ANY).format(topic=name)
        case _:
            return "Look at the logs of the brokers."


_ANY: Final = "Compare the record with the settings of {topic}."
_LARGE: Final = "Raise max.message.bytes of {topic}, or write less into one record."
_REMEDIES: Final = {
    KafkaError.MSG_SIZE_TOO_LARGE: _LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE: _LARGE,
    KafkaError.INVALID_MSG_SIZE: _LARGE,
    KafkaError.INVALID_RECORD: (
        "{topic} is probably compacted, and a compacted topic takes no record without a key. Give the "
        "record a key, or change cleanup.policy."
    ),
    KafkaError.INVALID_TIMESTAMP: (
        "Give the record a timestamp within message.timestamp.before.max.ms and .after.max.ms of {topic}, "
        "or raise these."
    ),
}
