"""A client that doesn't know is asked again: a sentinel, an empty or a partial answer never counts as a
fact."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import KafkaUnavailable, SourceGap
from fcluster.common.ids import ShardId, journal_topic
from fcluster.common.offsets import NotKnownYetError, known_offset, offset_or_none
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.kafka import asking
from fcluster.kafka.asking import ask_until_known
from fcluster.kafka.clients import Admin, make_admin
from fcluster.kafka.offsets import (
    begin_offsets,
    delete_records_before,
    end_offsets,
    read_committed_positions,
    settled_end_offsets,
)
from fcluster.kafka.topics import partition_counts
from fcluster.storage import restore
from fcluster.wire import discovery
from fcluster.worker import shards
from fcluster.worker.committed import CommittedOffsets
from fcluster.worker.shards import ShardHost
from fcluster.worker.transactions import (
    FrozenEpoch,
    ShardEpoch,
    TransactionLostError,
    check_deltas,
    deltas_of,
)

AT = TopicPartition("in", 0)
AWAY = KafkaException(KafkaError(KafkaError._TRANSPORT))
POSITION = CommittedPosition(7, 3, 3, "print")


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [None, -1, -2, OFFSET_INVALID, -1000])
def test_sentinels_of_clients_never_become_offsets(unknown: int | None) -> None:
    with pytest.raises(NotKnownYetError, match="in/0"):
        known_offset(unknown, "in/0")
    assert offset_or_none(unknown) is None
    if unknown is not None:
        with pytest.raises(ValueError, match="a position: clients"):
            CommittedPosition(unknown, 0, 0, "print")


def test_offsets_from_zero_on_are_known() -> None:
    assert known_offset(0, "in/0") == offset_or_none(0) == 0


# --- the admin client --------------------------------------------------------------------------------------


class Cluster:
    """The answers of an admin client, in turn. The last one is repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[int | KafkaException] = [5]
        self.leaders: list[int] = [1]
        self.topics: list[set[str]] = [{"in"}]
        self.topic_errors: list[KafkaError | None] = [None]
        self.overlapped = False
        self.asked = 0
        self._asking = threading.Lock()
        monkeypatch.setattr(AdminClient, "list_topics", lambda _admin, **_arguments: self._list_topics())
        monkeypatch.setattr(
            AdminClient, "list_offsets", lambda _admin, request, **_arguments: self._answer(request)
        )
        monkeypatch.setattr(
            AdminClient, "delete_records", lambda _admin, request, **_arguments: self._answer(request)
        )
        monkeypatch.setattr(asking, "POLL_INTERVAL_S", 0.001)
        self.admin = make_admin(Settings())

    def _list_topics(self) -> Any:
        leader, error = _next(self.leaders), _next(self.topic_errors)
        partitions = {} if error is not None else {0: SimpleNamespace(id=0, leader=leader)}
        return SimpleNamespace(
            brokers={1: "one"},
            topics={name: SimpleNamespace(partitions=partitions, error=error) for name in _next(self.topics)},
        )

    def _answer(self, request: Iterable[TopicPartition]) -> dict[TopicPartition, Future[Any]]:
        self.overlapped |= not self._asking.acquire(blocking=False)
        self.asked += 1
        futures = {at: Future[Any]() for at in request}
        # As in librdkafka, another thread answers after the call has returned.
        threading.Timer(0.002, self._fill, [futures]).start()
        return futures

    def _fill(self, futures: Mapping[TopicPartition, Future[Any]]) -> None:
        offset = _next(self.offsets)
        self._asking.release()
        for future in futures.values():
            if isinstance(offset, KafkaException):
                future.set_exception(offset)
            else:
                future.set_result(SimpleNamespace(offset=offset, low_watermark=offset))


def _next(answers: list[Any]) -> Any:
    return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


ASKING: list[Callable[[Admin], Any]] = [
    lambda admin: begin_offsets(admin, [AT], 5),
    lambda admin: end_offsets(admin, [AT], "read-committed", 5),
    lambda admin: settled_end_offsets(admin, [AT], 5),
    lambda admin: delete_records_before(admin, {AT: 5}, 5),
]


@pytest.mark.parametrize("ask", ASKING)
@pytest.mark.parametrize(
    "unknown",
    [
        OFFSET_INVALID,
        -1,
        AWAY,
        KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE)),
        KafkaException(KafkaError(KafkaError.FENCED_LEADER_EPOCH)),
        KafkaException(KafkaError(KafkaError._NOOP)),
    ],
)
def test_offset_that_a_leader_did_not_return_is_requested_again(
    cluster: Cluster, ask: Callable[[Admin], Any], unknown: Any
) -> None:
    cluster.offsets = [unknown, unknown, 5]
    assert ask(cluster.admin) == {AT: 5}


@pytest.mark.parametrize(
    "ask",
    [
        lambda admin: end_offsets(admin, [AT], "read-committed", 0.05),
        lambda admin: delete_records_before(admin, {AT: 5}, 0.05),
    ],
)
def test_offset_that_stays_unknown_is_an_error_in_bounded_time(
    cluster: Cluster, ask: Callable[[Admin], Any]
) -> None:
    cluster.offsets = [OFFSET_INVALID]
    with pytest.raises(KafkaUnavailable, match="not known yet"):
        ask(cluster.admin)


def test_partition_without_leader_is_waited_for_and_not_asked_about(cluster: Cluster) -> None:
    cluster.leaders = [-1, 2, 1]  # no leader, one that isn't among the brokers, one that runs
    assert end_offsets(cluster.admin, [AT], "read-committed", 5) == {AT: 5}
    assert cluster.asked == 1, "librdkafka was asked about a partition without a known leader"


def test_topic_that_a_broker_does_not_list_yet_is_not_missing(cluster: Cluster) -> None:
    cluster.topics = [set(), set(), {"in"}]
    assert end_offsets(cluster.admin, [AT], "read-committed", 5) == {AT: 5}


def test_topic_that_stays_unlisted_is_missing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MISSING_TIMEOUT_S", 0.02)
    cluster.topics = [set()]
    with pytest.raises(KafkaUnavailable, match="UNKNOWN_TOPIC_OR_PART"):
        end_offsets(cluster.admin, [AT], "read-committed", 5)


def test_topic_whose_partitions_are_unknown_does_not_count_as_missing(cluster: Cluster) -> None:
    cluster.topic_errors = [KafkaError(KafkaError.LEADER_NOT_AVAILABLE), None]
    assert partition_counts(cluster.admin, ["in"]) == {"in": 1}


def test_error_that_a_retry_cannot_change_is_raised_at_once(cluster: Cluster) -> None:
    cluster.offsets = [KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))]
    with pytest.raises(KafkaUnavailable, match="TOPIC_AUTHORIZATION_FAILED"):
        end_offsets(cluster.admin, [AT], "read-committed", 30)
    assert cluster.asked == 1


def test_threads_that_share_an_admin_client_ask_leaders_one_at_a_time(cluster: Cluster) -> None:
    asking = [threading.Thread(target=ask, args=[cluster.admin]) for ask in 4 * ASKING]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(10)
    assert cluster.asked >= len(asking)
    assert not cluster.overlapped, "a request began before another one was answered"


def test_topic_ids_are_requested_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [AWAY, SimpleNamespace(topic_id="id")]

    def describe(_admin: AdminClient, _topics: object, **_arguments: object) -> dict[str, Future[Any]]:
        future = Future[Any]()
        answer = _next(answers)
        if isinstance(answer, KafkaException):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return {"in": future}

    monkeypatch.setattr(AdminClient, "describe_topics", describe)
    assert restore.topic_ids(cluster.admin, ["in"]) == {"in": "id"}


def test_answer_that_is_no_longer_needed_is_not_waited_for() -> None:
    def ask() -> None:
        raise NotKnownYetError("no")

    begun_s = time.monotonic()
    with pytest.raises(KafkaException):
        ask_until_known(ask, 60, given_up=lambda: True)
    assert time.monotonic() - begun_s < 10


# --- committed offsets -------------------------------------------------------------------------------------


class Group:
    """A consumer. Its answers about committed offsets come in turn. `reports`: what `poll` returns."""

    def __init__(
        self, *answers: Sequence[TopicPartition] | KafkaException, reports: Sequence[int] = ()
    ) -> None:
        self._answers = list(answers)
        self._reports = [SimpleNamespace(error=lambda code=code: KafkaError(code)) for code in reports]

    def poll(self, _timeout: float) -> Any:
        return self._reports.pop(0) if self._reports else None

    def committed(self, _wanted: object, *, timeout: float) -> Sequence[TopicPartition]:
        assert timeout > 0
        answer = _next(self._answers)
        if isinstance(answer, KafkaException):
            raise answer
        return answer


def committed(offset: int, error: int | None = None) -> Any:
    return SimpleNamespace(
        topic="in",
        partition=0,
        offset=offset,
        metadata=POSITION.encode_metadata(),
        error=None if error is None else KafkaError(error),
    )


def test_committed_offset_is_requested_until_the_coordinator_returns_it() -> None:
    group: Any = Group(
        AWAY,
        KafkaException(KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS)),
        [],  # lacks the partition
        [committed(OFFSET_INVALID, KafkaError.UNSTABLE_OFFSET_COMMIT)],
        [committed(7)],
    )
    assert read_committed_positions(group, "job", [AT], 10) == {AT: POSITION}


def test_refused_group_is_not_asked_again() -> None:
    """librdkafka itself says only that the time is over."""
    timed_out = KafkaException(KafkaError(KafkaError._TIMED_OUT))
    reports = (KafkaError._ALL_BROKERS_DOWN, KafkaError.GROUP_AUTHORIZATION_FAILED)
    group: Any = Group(timed_out, [committed(7)], reports=reports)
    with pytest.raises(KafkaUnavailable, match="GROUP_AUTHORIZATION_FAILED") as refused:
        read_committed_positions(group, "job", [AT], 10)
    assert "ACL" in str(refused.value.remedy)
    waits: Any = Group(timed_out, [committed(7)], reports=reports[:1])
    assert read_committed_positions(waits, "job", [AT], 10) == {AT: POSITION}


def test_partial_answer_does_not_mean_that_nothing_is_committed() -> None:
    group: Any = Group([])
    with pytest.raises(KafkaUnavailable, match="lacks some partitions"):
        read_committed_positions(group, "job", [AT], 0.1)


def test_nothing_committed_is_distinguished_from_an_unknown_negative_offset() -> None:
    nothing: Any = Group([committed(OFFSET_INVALID)])
    assert read_committed_positions(nothing, "job", [AT], 1) == {AT: None}
    unknown: Any = Group([committed(-2)])
    with pytest.raises(KafkaUnavailable, match="not known yet"):
        read_committed_positions(unknown, "job", [AT], 1)


# --- where a shard begins ----------------------------------------------------------------------------------


def host(cluster: Cluster, position: CommittedPosition) -> ShardHost:
    class AtOnce:
        def submit(self, ask: Callable[..., Any], *arguments: Any) -> Future[Any]:
            future = Future[Any]()
            future.set_result(ask(*arguments))
            return future

    host: Any = ShardHost.__new__(ShardHost)
    stage = SimpleNamespace(topics=("in",), keeps_time=False)
    host._topology = SimpleNamespace(job="job", fingerprint="", stage=lambda _name: stage, keeps_time=False)
    host._admin, host._asking = cluster.admin, AtOnce()
    host._offsets = CommittedOffsets("job", lambda: Group([committed(position.offset)]), threading.Event())
    return host


def test_end_before_the_committed_offset_is_trusted_only_when_it_is_repeated(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "look_at_topics", lambda _admin, _topics: {})
    # begins at 0; the leader has just started and knows little, isn't known, then has caught up
    cluster.offsets = [0, 3, OFFSET_INVALID, 3, 9]
    found = host(cluster, POSITION)._positions([ShardId("in", 0)])
    assert found == {ShardId("in", 0): POSITION}

    monkeypatch.setattr(shards, "LOSS_CONFIRMED_S", 0.1)
    cluster.offsets = [0, 3]
    with pytest.raises(SourceGap, match="offset 7, but the partition ends at 3"):
        host(cluster, POSITION)._positions([ShardId("in", 0)])


# --- deltas and the journal --------------------------------------------------------------------------------


def test_delta_with_an_unknown_offset_is_replayed() -> None:
    """A broker that took a record before its answer was lost may answer without an offset."""

    def write(offsets: Sequence[int | None]) -> FrozenEpoch:
        part = ShardEpoch(ShardId("in", 0), ["in"], POSITION, "changelog", records=[b"one", b"two"])
        frozen = FrozenEpoch(4, 1, [part])
        for (topic, partition, _record, note), offset in zip(deltas_of(frozen), offsets, strict=True):
            assert (topic, partition) == ("changelog", 0)
            note(None, SimpleNamespace(offset=lambda offset=offset: offset))
        return frozen

    frozen = write([5, 6])
    check_deltas(frozen)
    assert frozen.changelog_next == {ShardId("in", 0): 7}
    for offsets in ([5, None], [None, 6], [-1001, 6]):
        with pytest.raises(TransactionLostError, match="not acknowledged"):
            check_deltas(write(offsets))


class JournalConsumer:
    """Each time reading begins, it returns the next one of these lists."""

    def __init__(self, *readings: list[Any]) -> None:
        self._readings, self._reading = list(readings), list[Any]()

    def assign(self, _partitions: object) -> None:
        self._reading = self._readings.pop(0)

    def poll(self, _timeout: float) -> Any:
        return self._reading.pop(0)

    def consume(self, _count: int, _timeout: float) -> list[Any]:
        return [self._reading.pop(0)]

    def close(self) -> None:
        pass


def journal_message(key: bytes, value: bytes) -> Any:
    return SimpleNamespace(error=lambda: None, key=lambda: key, value=lambda: value)


def journal_event(code: int) -> Any:
    return SimpleNamespace(error=lambda: KafkaError(code))


@pytest.mark.parametrize("once", [True, False])
def test_journal_whose_beginning_a_broker_does_not_know_yet_is_read_again(
    monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """A broker that has just got the topic may answer that it doesn't know it."""
    unknown, end = journal_event(KafkaError._AUTO_OFFSET_RESET), journal_event(KafkaError._PARTITION_EOF)
    leader = b'{"term": 3, "address": "tcp://host:1", "host": "host", "pid": 1, "cluster_id": "c"}'
    consumer = JournalConsumer([unknown], [unknown], [journal_message(b"leader", leader), end])
    monkeypatch.setattr(discovery, "_make_journal_consumer", lambda *_a, **_k: consumer)
    monkeypatch.setattr(discovery, "_list_topics", lambda *_arguments: {journal_topic("job")})
    monkeypatch.setattr(discovery, "JOURNAL_LISTED_INTERVAL_S", 0.001)
    if once:
        assert discovery.read_journal(Settings(), "job", 10)["leader"]["term"] == 3
        return
    follower = discovery.LeaderFollower(Settings(), "job")
    while not follower.poll(0.01):
        assert follower.leader is None
    assert follower.leader is not None
    assert follower.leader.term == 3


def test_journal_that_a_broker_does_not_list_yet_does_not_count_as_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topic = journal_topic("job")
    listed = [set[str](), set[str](), {topic}]
    monkeypatch.setattr(discovery, "_make_journal_consumer", lambda *_a, **_k: SimpleNamespace(**consumer))
    monkeypatch.setattr(discovery, "_list_topics", lambda *_arguments: _next(listed))
    monkeypatch.setattr(discovery, "_read_to_end", lambda *_arguments: {"term": {"term": 3}})
    monkeypatch.setattr(discovery, "JOURNAL_LISTED_INTERVAL_S", 0.001)
    consumer = {"close": lambda: None}
    assert discovery.read_journal(Settings(), "job", 10, must_exist=True) == {"term": {"term": 3}}
    listed = [set()]
    with pytest.raises(KafkaUnavailable, match="none of the brokers asked lists it"):
        discovery.read_journal(Settings(), "job", 0.01, must_exist=True)
    assert discovery.read_journal(Settings(), "job", 0.01) == {}
