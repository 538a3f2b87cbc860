"""Finds the coordinator of a job, through the job's journal.

Responsible for: reading the journal topic, once or as it grows, and interpreting its `leader` record. Workers
and commands use it, because then they need only the brokers and the job's name. The coordinator uses it to
read the whole journal. Rule: every wait is bounded. Must not write.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from fcluster.common.errors import IncompatibleState, KafkaUnavailable
from fcluster.common.failures import Ended
from fcluster.common.ids import journal_topic
from fcluster.common.settings import Settings
from fcluster.kafka.asking import cause_of, remedy_for, said_by
from fcluster.kafka.clients import ErrorLog, make_consumer

READ_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
JOURNAL_LISTED_INTERVAL_S = 0.1
_BEGINNING_UNKNOWN: Final = KafkaError._AUTO_OFFSET_RESET
"""The broker that was asked where the topic begins doesn't know the topic yet, or doesn't lead it any more.
The client doesn't ask again by itself.
"""
LEADER_KEY = "leader"
ENDED_KEY = "ended"
"""Journal key for how the job was ended on purpose. If it is set, there is no leader record."""


@dataclass(frozen=True, slots=True)
class Leader:
    """The last leader of the job. The journal doesn't know whether it is still alive.

    Attributes:
        address: ``tcp://host:port`` where it listens.
        term: the term of its leadership.
        host: the host on which it runs.
        pid: its process id there.
        cluster_id: random for each run of a coordinator.
        topology: the fingerprint of the job that it runs.
        public_key: the key with which it authenticates itself, as Z85 text. Empty if connections to it use no
            keys. Anyone who can write to the journal could put another key here: see
            `security.client_security`.
    """

    address: str
    term: int
    host: str
    pid: int
    cluster_id: str
    public_key: str = ""
    topology: str = ""


_decode_leader = msgspec.json.Decoder(Leader).decode


def find_leader(settings: Settings, job: str, timeout_s: float = READ_TIMEOUT_S) -> Leader | None:
    """The coordinator that led `job` last. None if there never was one.

    Raises:
        KafkaUnavailable: the brokers didn't deliver the journal within `timeout_s` seconds.
        IncompatibleState: the journal can't be understood.
    """
    return leader_in(read_journal(settings, job, timeout_s), job)


def leader_in(journal: Mapping[str, Any], job: str) -> Leader | None:
    """The leader record in a journal of `job`. None if there is no leader.

    Raises:
        IncompatibleState: it can't be understood.
    """
    record = journal.get(LEADER_KEY)
    if record is None:
        return None
    try:
        return _decode_leader(msgspec.json.encode(record))
    except msgspec.ValidationError as error:
        raise _not_a_journal(job, f"its leader record is invalid: {error}") from error


def ended_in(journal: Mapping[str, Any]) -> tuple[int, Ended] | None:
    """The term in which the job was ended on purpose, and how. None if it wasn't, or if it continues."""
    record = journal.get(ENDED_KEY)
    if not isinstance(record, dict):
        return None
    ended = cast("dict[str, Any]", record)
    return int(ended.get("term", 0)), Ended.of_document(ended)


def read_journal(
    settings: Settings, job: str, timeout_s: float = READ_TIMEOUT_S, *, must_exist: bool = False
) -> dict[str, Any]:
    """The contents of the journal of `job`: key to JSON value. Empty if there is no journal.

    Args:
        settings: the cluster's settings.
        job: the job's name.
        timeout_s: the time limit for the whole call.
        must_exist: the journal's topic is known to exist. If a broker doesn't list it, it doesn't know it
            yet, and is asked again. Treating it as an empty journal would lose everything.

    Raises:
        KafkaUnavailable: the brokers didn't deliver it within `timeout_s` seconds.
        IncompatibleState: the topic's contents are not a journal.
    """
    topic = journal_topic(job)
    deadline_s = time.monotonic() + timeout_s
    errors = ErrorLog(settings.bootstrap_servers, quiet=True)
    consumer = _make_journal_consumer(settings, job, errors, fetch_wait_max_ms=5)
    try:
        while topic not in _list_topics(consumer, errors, _remaining_s(deadline_s)):
            if not must_exist:
                return {}
            if time.monotonic() >= deadline_s:
                raise KafkaException(
                    KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART, "none of the brokers asked lists it")
                )
            time.sleep(JOURNAL_LISTED_INTERVAL_S)
        return _read_to_end(consumer, job, deadline_s)
    except KafkaException as error:
        raise _unreadable(settings, topic, error, errors) from error
    finally:
        consumer.close()


def _remaining_s(deadline_s: float) -> float:
    return max(0.1, deadline_s - time.monotonic())


class LeaderFollower:
    """The journal's leader record as it changes, over one connection. Belongs to one thread.

    Args:
        settings: the cluster's settings.
        job: the job's name.
    """

    def __init__(self, settings: Settings, job: str) -> None:
        self.leader: Leader | None = None
        """The newest known leader. None if there is none, or if nothing is known yet."""
        self.ended: tuple[int, Ended] | None = None
        """How the job was ended on purpose, if there is no leader: the term, and how."""
        self._settings = settings
        self._job = job
        self._consumer: Consumer | None = None
        self._errors = ErrorLog(settings.bootstrap_servers, quiet=True)
        self._journal: dict[str, Any] = {}
        self._at_end = False

    def poll(self, timeout_s: float) -> bool:
        """Continue reading, for up to `timeout_s` seconds if nothing is new. Returns whether the journal was
        read to its end.

        Raises:
            KafkaUnavailable: it can't be read; the next call starts again.
            IncompatibleState: it can't be understood.
        """
        try:
            consumer = self._open(timeout_s)
            if consumer is None:
                return True
            for message in consumer.consume(1_000, timeout_s):
                self._take(message)
        except KafkaException as error:
            self.close()
            raise _unreadable(self._settings, journal_topic(self._job), error, self._errors) from error
        except IncompatibleState:
            self.close()
            raise
        if self._at_end:
            self.leader = leader_in(self._journal, self._job)
            self.ended = ended_in(self._journal)
        return self._at_end

    @property
    def is_open(self) -> bool:
        """Whether there is a journal, and it is being followed."""
        return self._consumer is not None

    def close(self) -> None:
        """Close the connection; `leader` stays."""
        if self._consumer is not None:
            self._consumer.close()
        self._consumer, self._journal, self._at_end = None, {}, False

    def _open(self, timeout_s: float) -> Consumer | None:
        """The consumer. None if there is no journal yet."""
        if self._consumer is not None:
            return self._consumer
        topic = journal_topic(self._job)
        self._errors.refusal = None
        consumer = _make_journal_consumer(self._settings, self._job, self._errors, fetch_wait_max_ms=20)
        try:
            if topic not in _list_topics(consumer, self._errors, max(timeout_s, CONNECT_TIMEOUT_S)):
                consumer.close()
                return None
            _read_from_the_beginning(consumer, self._job)
        except KafkaException:
            consumer.close()
            raise
        self._consumer = consumer
        return consumer

    def _take(self, message: Message) -> None:
        error = message.error()
        if error is None:
            _apply(self._journal, self._job, message.key(), message.value())
        elif error.code() == KafkaError._PARTITION_EOF:
            self._at_end = True
        elif error.code() == _BEGINNING_UNKNOWN and self._consumer is not None:
            self._journal, self._at_end = {}, False
            time.sleep(JOURNAL_LISTED_INTERVAL_S)
            _read_from_the_beginning(self._consumer, self._job)
        elif not error.retriable() and error.code() != KafkaError._TRANSPORT:
            raise KafkaException(error)


def _make_journal_consumer(
    settings: Settings, job: str, errors: ErrorLog, fetch_wait_max_ms: int
) -> Consumer:
    # The end is reported by an event. It comes with an empty answer to a fetch at the last stable offset. By
    # default, the broker would wait half a second before it sends that.
    config = {"enable.partition.eof": True, "fetch.wait.max.ms": fetch_wait_max_ms, "error_cb": errors}
    return make_consumer(settings, "read-committed", **{"group.id": job}, **config)


def _list_topics(consumer: Consumer, errors: ErrorLog, timeout_s: float) -> Container[str]:
    """Raises KafkaException if the brokers reject us, or don't answer in time."""
    try:
        return consumer.list_topics(timeout=timeout_s).topics
    except KafkaException:
        consumer.poll(0)  # lets `errors` hear of it
        if errors.refusal is not None:
            raise KafkaException(errors.refusal) from None
        raise


def _unreadable(settings: Settings, topic: str, error: KafkaException, errors: ErrorLog) -> KafkaUnavailable:
    cause = errors.refusal or cause_of(error)
    return KafkaUnavailable(
        f"Can't read the journal {topic!r} from {settings.bootstrap_servers}: {said_by(cause)} "
        f"({cause.name()}).",
        remedy=remedy_for(cause),
    )


def _read_from_the_beginning(consumer: Consumer, job: str) -> None:
    consumer.assign([TopicPartition(journal_topic(job), 0, OFFSET_BEGINNING)])


def _read_to_end(consumer: Consumer, job: str, deadline_s: float) -> dict[str, Any]:
    journal: dict[str, Any] = {}
    _read_from_the_beginning(consumer, job)
    while True:
        message = consumer.poll(max(0.0, deadline_s - time.monotonic()))
        if message is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "its end was not reached in time"))
        error = message.error()
        if error is None:
            _apply(journal, job, message.key(), message.value())
        elif error.code() == KafkaError._PARTITION_EOF:
            return journal
        elif error.code() == _BEGINNING_UNKNOWN and time.monotonic() < deadline_s:
            journal.clear()
            time.sleep(JOURNAL_LISTED_INTERVAL_S)
            _read_from_the_beginning(consumer, job)
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
        raise _not_a_journal(job, f"a record with the key {key!r} is invalid: {error}") from error


def _not_a_journal(job: str, why: str) -> IncompatibleState:
    return IncompatibleState(
        f"The topic {journal_topic(job)!r} is not this job's journal: {why}.",
        remedy="Give the job another name, or find out which other program writes to that topic.",
    )
