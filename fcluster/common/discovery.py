"""Finds the coordinator of a job, through the job's journal.

Responsible for: reading the journal topic, and what its `leader` record means. Used by workers and commands,
which need nothing but the brokers and the job's name, and by the coordinator to read its whole past.
Keeps the rule that every wait is bounded. Must not write.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from fcluster.common.errors import IncompatibleState, KafkaUnavailable
from fcluster.common.ids import journal_topic
from fcluster.common.kafka_clients import make_consumer, reason_of
from fcluster.common.settings import Settings

READ_TIMEOUT_S = 10.0
LEADER_KEY = "leader"


@dataclass(frozen=True, slots=True)
class Leader:
    """Who led the job last; whether it still lives the journal doesn't know.

    Attributes:
        address: ``tcp://host:port`` where it listens.
        term: of its leadership.
        host: it runs on.
        pid: its process there.
        cluster_id: random for each run of a coordinator.
        public_key: the one it proves itself with, as Z85 text; empty if connections to it go without keys.
            Who may write the journal could put another one here: see `security.client_security`.
    """

    address: str
    term: int
    host: str
    pid: int
    cluster_id: str
    public_key: str = ""


def find_leader(settings: Settings, job: str, timeout_s: float = READ_TIMEOUT_S) -> Leader | None:
    """The coordinator that led `job` last, None if there never was one.

    Raises:
        KafkaUnavailable: the brokers didn't give the journal within `timeout_s` seconds.
        IncompatibleState: the journal can't be understood.
    """
    record = read_journal(settings, job, timeout_s).get(LEADER_KEY)
    if record is None:
        return None
    try:
        return msgspec.convert(record, Leader)
    except msgspec.ValidationError as error:
        raise _not_a_journal(job, f"its leader record is wrong: {error}") from error


def read_journal(settings: Settings, job: str, timeout_s: float = READ_TIMEOUT_S) -> dict[str, Any]:
    """What the journal of `job` holds: key to JSON value. Empty if there is no journal.

    Raises:
        KafkaUnavailable: the brokers didn't give it within `timeout_s` seconds.
        IncompatibleState: what is in the topic is not a journal.
    """
    topic = journal_topic(job)
    deadline_s = time.monotonic() + timeout_s
    # The end is told by an event, which comes at the last stable offset with an empty answer to a fetch: for
    # that the broker would wait half a second by default.
    config = {"enable.partition.eof": True, "fetch.wait.max.ms": 5}
    consumer = make_consumer(settings, "read-committed", **config)
    try:
        if topic not in consumer.list_topics(timeout=timeout_s).topics:
            return {}
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        return _read_to_end(consumer, job, deadline_s)
    except KafkaException as error:
        raise KafkaUnavailable(
            f"The journal {topic!r} can't be read from {settings.bootstrap_servers}: {reason_of(error)}.",
            remedy="Check that the brokers are up and reachable from here.",
        ) from error
    finally:
        consumer.close()


def _read_to_end(consumer: Consumer, job: str, deadline_s: float) -> dict[str, Any]:
    journal: dict[str, Any] = {}
    while True:
        message = consumer.poll(max(0.0, deadline_s - time.monotonic()))
        if message is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the end was not reached in time"))
        error = message.error()
        if error is None:
            _apply(journal, job, message.key(), message.value())
        elif error.code() == KafkaError._PARTITION_EOF:
            return journal
        elif not error.retriable() and error.code() != KafkaError._TRANSPORT:
            raise KafkaException(error)


def _apply(journal: dict[str, Any], job: str, key: Any, value: Any) -> None:
    try:
        name = cast(bytes, key).decode()
        if value is None:
            journal.pop(name, None)
        else:
            journal[name] = msgspec.json.decode(value)
    except (AttributeError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise _not_a_journal(job, f"a record with the key {key!r} is wrong: {error}") from error


def _not_a_journal(job: str, why: str) -> IncompatibleState:
    return IncompatibleState(
        f"The topic {journal_topic(job)!r} is not this job's journal: {why}.",
        remedy="Give the job another name, or find out who else writes to that topic.",
    )
