"""Offsets of partitions and of consumer groups.

Responsible for: finding where partitions begin and end, reading what a job has committed, and deleting
records before an offset. Invariant: an answer without an offset doesn't count, and the request is repeated
(`common.offsets`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    OffsetSpec,  # pyright: ignore[reportPrivateImportUsage]
)

from fcluster.common.errors import IncompatibleState, KafkaUnavailable
from fcluster.common.isolation import Isolation
from fcluster.common.offsets import NotKnownYetError, Offset, known_offset
from fcluster.common.positions import CommittedPosition, UnreadableMetadataError, decode_position
from fcluster.kafka.asking import (
    ANSWER_TIMEOUT_S,
    ATTEMPT_TIMEOUT_S,
    POLL_INTERVAL_S,
    REQUEST_TIMEOUT_S,
    ask_until_known,
    asking,
    cause_of,
    is_not_known_yet,
    remedy_for,
    unavailable,
    untyped,
)
from fcluster.kafka.topic_ids import reset_remedy
from fcluster.kafka.troubles import Trouble, trouble_of

_NO_OFFSET: Final = -1001


def begin_offsets(
    admin: AdminClient, partitions: Iterable[TopicPartition], timeout_s: float = ANSWER_TIMEOUT_S
) -> dict[TopicPartition, Offset]:
    """The first offset that each partition still has.

    Raises:
        KafkaUnavailable: the brokers don't answer, or a topic or partition doesn't exist.
    """
    return _offsets(admin, partitions, OffsetSpec.earliest(), "read-uncommitted", timeout_s)


def end_offsets(
    admin: AdminClient,
    partitions: Iterable[TopicPartition],
    isolation: Isolation,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[TopicPartition, Offset]:
    """The offset after the last record that readers with that isolation can see in each partition.

    With "read-committed" it is the last stable offset. Open transactions hold it back, and so does one whose
    commit has just returned, until its markers are written (see `settled_end_offsets`).

    Raises:
        KafkaUnavailable: the brokers don't answer, or a topic or partition doesn't exist.
    """
    return _offsets(admin, partitions, OffsetSpec.latest(), isolation, timeout_s)


def settled_end_offsets(
    admin: AdminClient, partitions: Iterable[TopicPartition], timeout_s: float = ANSWER_TIMEOUT_S
) -> dict[TopicPartition, Offset]:
    """The ends of partitions that nobody writes to, once all their transactions are settled.

    A commit returns when it is decided. Its markers reach the partitions a little later, one by one. A worker
    that takes over a shard has to wait for the markers in its changelog, or it would read too few deltas.

    Raises:
        KafkaUnavailable: a transaction was still open after `timeout_s` seconds, or brokers don't answer.
    """
    wanted = list(partitions)
    deadline = time.monotonic() + timeout_s
    while True:
        # The order matters: if a record is written in between, the two differ; they never agree by mistake.
        stable = end_offsets(admin, wanted, "read-committed", timeout_s)
        ends = end_offsets(admin, wanted, "read-uncommitted", timeout_s)
        waiting = [at for at in wanted if stable[at] < ends[at]]
        if not waiting:
            return ends
        if time.monotonic() > deadline:
            names = ", ".join(f"{at.topic}/{at.partition}" for at in waiting[:3])
            raise KafkaUnavailable(
                f"A transaction in {names} is still open after {timeout_s:g} s.",
                remedy="Look for another program that writes to this topic. If there is none, and the "
                "partition had no leader before, Kafka may have lost the end of the transaction "
                "(KAFKA-20734): docs/kafka.md says what to do.",
            )
        time.sleep(POLL_INTERVAL_S)


def _offsets(
    admin: AdminClient,
    partitions: Iterable[TopicPartition],
    spec: Any,
    isolation: Isolation,
    timeout_s: float,
) -> dict[TopicPartition, Offset]:
    request = {TopicPartition(at.topic, at.partition): spec for at in partitions}
    if not request:
        return {}
    level = (
        IsolationLevel.READ_COMMITTED if isolation == "read-committed" else IsolationLevel.READ_UNCOMMITTED
    )

    def ask() -> dict[TopicPartition, Offset]:
        futures: dict[TopicPartition, Future[Any]] = untyped(admin).list_offsets(
            request, isolation_level=level, request_timeout=ATTEMPT_TIMEOUT_S
        )
        # If a leader didn't answer, its offset is -1001, and there is no error.
        return {
            at: known_offset(future.result().offset, f"{at.topic}/{at.partition}")
            for at, future in futures.items()
        }

    with asking(admin, "listing offsets"):
        return ask_until_known(ask, timeout_s)


def read_committed_positions(
    consumer: Consumer,
    group: str,
    partitions: Iterable[TopicPartition],
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[TopicPartition, CommittedPosition | None]:
    """The group's committed offset for each partition. None where there is none.

    While an open transaction holds an offset of one of them, the answer isn't settled, and a read-committed
    consumer waits for it. So fence the transaction's owner first. A read-uncommitted consumer answers at once
    with the last committed offset.

    Args:
        consumer: of that group. It reads no records. An admin client could ask the same, but librdkafka 2.16
            crashes if the group's coordinator isn't ready to answer it (librdkafka then treats the admin
            client like a consumer).
        group: the job's name.
        partitions: partitions of source topics.
        timeout_s: seconds to wait.

    Raises:
        KafkaUnavailable: no settled answer came in time.
        IncompatibleState: the offsets were not committed by fcluster.
    """
    wanted = [TopicPartition(at.topic, at.partition) for at in partitions]
    if not wanted:
        return {}
    what = f"reading the committed offsets of the group {group!r}"

    def ask() -> list[TopicPartition]:
        try:
            answer = consumer.committed(wanted, timeout=min(timeout_s, ATTEMPT_TIMEOUT_S))
        except KafkaException as error:
            if cause_of(error).code() == KafkaError._TIMED_OUT:
                _raise_refusal(consumer)
            raise
        answered = {(at.topic, at.partition) for at in answer}
        for at in answer:
            if at.error is not None and is_not_known_yet(at.error):
                raise KafkaException(at.error)
        if any((at.topic, at.partition) not in answered for at in wanted):
            raise NotKnownYetError("the answer lacks some partitions")
        return answer

    try:
        answer = ask_until_known(ask, timeout_s)
    except KafkaException as error:
        problem = unavailable(consumer, what, cause_of(error))
        if cause_of(error).code() == KafkaError._TIMED_OUT:
            # A refusal that was reported before isn't reported again.
            problem = KafkaUnavailable(
                problem.message,
                remedy="Check that the brokers are up and reachable from here. If Kafka has ACLs, a missing "
                f"authorization for the group {group!r} may look the same; docs/security.md lists what a job "
                "needs.",
            )
        raise problem from error
    return {TopicPartition(at.topic, at.partition): _position(group, at) for at in answer}


def _raise_refusal(consumer: Consumer) -> None:
    """While the group is refused to this user, librdkafka keeps looking for its coordinator, and answers
    that the time is over. It reports why only once, to `poll`.

    Raises:
        KafkaException: the group is refused.
    """
    while (report := consumer.poll(0)) is not None:
        error = report.error()
        if error is not None and trouble_of(error.code()) is Trouble.FORBIDDEN:
            raise KafkaException(error)


def _position(group: str, at: TopicPartition) -> CommittedPosition | None:
    if at.error is not None:
        raise KafkaUnavailable(
            f"Can't read the committed offset of {at.topic}/{at.partition}: {at.error.str()}.",
            remedy=remedy_for(at.error),
        )
    if at.offset == _NO_OFFSET:
        return None
    try:
        return decode_position(known_offset(at.offset, f"{at.topic}/{at.partition}"), at.metadata)
    except NotKnownYetError as error:
        raise KafkaUnavailable(
            f"Can't read the committed offset of {at.topic}/{at.partition}: {error}.",
            remedy="Check the brokers. fcluster keeps asking.",
        ) from error
    except UnreadableMetadataError as error:
        raise IncompatibleState(
            f"The consumer group {group!r} has an offset for {at.topic}/{at.partition} that fcluster did not "
            f"commit: {error}.",
            remedy="Stop the program that uses the job's group, or give the job another name. Then "
            + reset_remedy(group),
        ) from error


def offsets_at_time(
    consumer: Consumer,
    partitions: Iterable[TopicPartition],
    time_ms: int,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[TopicPartition, Offset]:
    """The first record of each partition with this timestamp or a later one. A partition without one isn't in
    the answer.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """
    wanted = [TopicPartition(at.topic, at.partition, time_ms) for at in partitions]
    what = "looking for the offsets of a time"

    def ask() -> list[TopicPartition]:
        answer = consumer.offsets_for_times(wanted, timeout=min(timeout_s, REQUEST_TIMEOUT_S))
        for at in answer:
            if at.error is not None:
                raise KafkaException(at.error)
        return answer

    try:
        found = ask_until_known(ask, timeout_s) if wanted else []
    except KafkaException as error:
        raise unavailable(consumer, what, cause_of(error)) from error
    return {
        TopicPartition(at.topic, at.partition): known_offset(at.offset, what)
        for at in found
        if at.offset >= 0
    }


def delete_records_before(
    admin: AdminClient, offsets: Mapping[TopicPartition, int], timeout_s: float = REQUEST_TIMEOUT_S
) -> dict[TopicPartition, Offset]:
    """Delete all records before the given offsets.

    Returns:
        The first offset that each partition has now. It is no error if the records were already deleted.

    Raises:
        KafkaUnavailable: the brokers don't answer or refuse, or an offset is after the partition's end.
    """
    if not offsets:
        return {}
    request = [
        TopicPartition(at.topic, at.partition, known_offset(offset, f"{at.topic}/{at.partition}"))
        for at, offset in offsets.items()
    ]

    def ask() -> dict[TopicPartition, Offset]:
        futures: dict[TopicPartition, Future[Any]] = untyped(admin).delete_records(
            request, request_timeout=ATTEMPT_TIMEOUT_S, operation_timeout=ATTEMPT_TIMEOUT_S
        )
        return {
            TopicPartition(at.topic, at.partition): known_offset(
                future.result().low_watermark, f"{at.topic}/{at.partition}"
            )
            for at, future in futures.items()
        }

    with asking(admin, "deleting records"):
        return ask_until_known(ask, timeout_s)
