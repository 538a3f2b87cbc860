from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import ConfigResource, NewTopic

from fcluster import Job
from fcluster.common.errors import IncompatibleState, KafkaUnavailable, MissingTopic, SettingsError
from fcluster.common.ids import changelog_topic, repartition_topic
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings, resolve
from fcluster.graph.topology import Topology
from fcluster.kafka import topics
from fcluster.kafka.asking import cause_of
from fcluster.kafka.brokers import connect_or_raise
from fcluster.kafka.clients import Admin, make_admin, make_consumer, make_producer, serve_rest
from fcluster.kafka.fencing import fence_transactional_id
from fcluster.kafka.offsets import (
    begin_offsets,
    delete_records_before,
    end_offsets,
    read_committed_positions,
    settled_end_offsets,
)
from fcluster.kafka.ports import reserve_for_process
from fcluster.kafka.topics import ensure_internal_topics, partition_counts


@pytest.fixture
def settings(kafka: str) -> Settings:
    return resolve({}, None, {}, {"bootstrap.servers": kafka})


@pytest.fixture
def admin(settings: Settings) -> Admin:
    return make_admin(settings)


def create(admin: Admin, topic: str, partitions: int) -> str:
    admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result()
    deadline = time.monotonic() + 10
    while topic not in admin.list_topics(timeout=5).topics:
        assert time.monotonic() < deadline, f"{topic} was created but isn't listed"
    return topic


def open_transaction(settings: Settings, transactional_id: str, topic: str) -> Producer:
    """A producer with an open transaction that contains a record."""
    producer = make_producer(settings, transactional_id)
    producer.list_topics(timeout=10)
    producer.init_transactions(10)
    begin_and_write(producer, topic)
    return producer


def begin_and_write(producer: Producer, topic: str) -> None:
    producer.begin_transaction()
    producer.produce(topic, b"value", partition=0)
    assert producer.flush(10) == 0


def send_offset(
    producer: Producer, settings: Settings, group: str, topic: str, at: CommittedPosition
) -> None:
    consumer = make_consumer(settings, "read-committed", **{"group.id": group})
    offsets = [TopicPartition(topic, 0, at.offset, metadata=at.encode_metadata())]
    producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata(), 10)
    consumer.close()


# --- connecting ----------------------------------------------------------------------------------------


def test_reachable_brokers_are_accepted(admin: Admin, settings: Settings) -> None:
    connect_or_raise(admin, settings)


def test_unreachable_brokers_are_named_with_the_cause_within_the_bound() -> None:
    brokers = f"127.0.0.1:{reserve_for_process()}"
    settings = resolve({}, None, {}, {"brokers": brokers})
    begun = time.monotonic()
    with pytest.raises(KafkaUnavailable, match=f"{brokers}.*Connection refused") as caught:
        connect_or_raise(make_admin(settings), settings, timeout_s=1)
    assert time.monotonic() - begun < 5
    assert "--brokers" in caught.value.remedy


def test_missing_brokers_are_reported_with_how_to_give_them() -> None:
    settings = Settings()
    with pytest.raises(KafkaUnavailable, match="No Kafka brokers") as caught:
        connect_or_raise(make_admin(settings), settings)
    assert "--brokers" in caught.value.remedy


def test_transaction_timeout_above_the_brokers_limit_is_refused_at_the_start(
    admin: Admin, kafka: str
) -> None:
    flags = {"brokers": kafka, "transaction.timeout.ms": "1h"}
    with pytest.raises(SettingsError, match=r"3600000 is above .* 900000"):
        connect_or_raise(admin, resolve({}, None, {}, flags))
    connect_or_raise(admin, resolve({}, None, {}, {**flags, "processing.guarantee": "at-least-once"}))


def test_setting_that_librdkafka_refuses_is_named(kafka: str) -> None:
    settings = resolve({}, None, {}, {"brokers": kafka, "kafka.no.such.setting": 1})
    for make in (make_producer, make_admin, lambda s: make_consumer(s, "read-committed")):
        with pytest.raises(SettingsError, match=r"no\.such\.setting") as caught:
            make(settings)
        assert "kafka." in caught.value.remedy


# --- topics --------------------------------------------------------------------------------------------


def count(ctx: Any, value: Any) -> Any:
    return value


def topology(prefix: str) -> Topology:
    job = Job(f"{prefix}job")
    source, out = job.topic(f"{prefix}source"), job.topic(f"{prefix}out")
    letters = job.topic(f"{prefix}letters")
    job.stream(source).process(count, name="first", on_error=letters)
    job.stream(source).key_by("k").process(count, name="second", to=out)
    return job.build(Settings())


def config_of(admin: Admin, topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    entries = admin.describe_configs([resource])[resource].result()
    return {name: entry.value for name, entry in entries.items()}


def test_missing_source_is_an_error_that_names_the_near_topic(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    create(admin, f"{topic_prefix}sources", 1)
    with pytest.raises(
        MissingTopic, match=f"(?s)'{topic_prefix}source' doesn't exist.*'{topic_prefix}sources'"
    ):
        ensure_internal_topics(admin, topology(topic_prefix), settings)
    with pytest.raises(MissingTopic):
        partition_counts(admin, [f"{topic_prefix}source"])


def test_topics_are_created_with_the_sources_partition_count_and_never_expire(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    create(admin, f"{topic_prefix}source", 3)
    job = f"{topic_prefix}job"
    created = {
        f"{job}-journal": 1,
        changelog_topic(job, f"{topic_prefix}source"): 3,
        repartition_topic(job, "second"): 3,
        changelog_topic(job, "second"): 3,
        f"{topic_prefix}out": 3,
        f"{topic_prefix}letters": 3,
    }
    counts = ensure_internal_topics(admin, topology(topic_prefix), settings)
    assert counts == {f"{topic_prefix}source": 3, **created}
    assert partition_counts(admin, created) == created
    for topic in (repartition_topic(job, "second"), changelog_topic(job, "second")):
        config = config_of(admin, topic)
        assert (config["cleanup.policy"], config["retention.ms"]) == ("delete", "-1")
    assert config_of(admin, f"{job}-journal")["cleanup.policy"] == "compact"
    assert ensure_internal_topics(admin, topology(topic_prefix), settings) == counts


@pytest.mark.parametrize("is_known", [True, False])
def test_topics_between_stages_take_all_timestamps_if_brokers_know_the_setting(
    admin: Admin, settings: Settings, topic_prefix: str, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Kafka 4 refuses those an hour ahead by default. A source with other settings may have them."""
    create(admin, f"{topic_prefix}source", 1)
    if not is_known:
        monkeypatch.setattr(topics, "broker_settings", lambda _admin: {"log.retention.ms": "1"})
    counts = ensure_internal_topics(admin, topology(topic_prefix), settings)
    limits = {name: config_of(admin, name)["message.timestamp.after.max.ms"] for name in counts}
    between = {repartition_topic(f"{topic_prefix}job", "second"), f"{topic_prefix}letters"}
    unlimited = between if is_known else set[str]()
    assert limits == {name: str(2**63 - 1) if name in unlimited else "3600000" for name in counts}


def test_two_processes_creating_the_topics_at_once_both_succeed(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    create(admin, f"{topic_prefix}source", 2)
    outcomes: list[Any] = []

    def ensure() -> None:
        outcomes.append(ensure_internal_topics(make_admin(settings), topology(topic_prefix), settings))

    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 2
    assert outcomes[0] == outcomes[1]


def test_source_with_another_partition_count_than_its_state_is_incompatible(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    create(admin, f"{topic_prefix}source", 2)
    create(admin, changelog_topic(f"{topic_prefix}job", f"{topic_prefix}source"), 4)
    with pytest.raises(IncompatibleState, match=r"has 2 partitions, but had 4"):
        ensure_internal_topics(admin, topology(topic_prefix), settings)


def test_replication_factor_above_the_number_of_brokers_is_reported(
    admin: Admin, settings: Settings, kafka: str, topic_prefix: str
) -> None:
    create(admin, f"{topic_prefix}source", 1)
    greedy = resolve({}, None, {}, {"brokers": kafka, "replication.factor": 1000})
    with pytest.raises(KafkaUnavailable, match="INVALID_REPLICATION_FACTOR") as caught:
        ensure_internal_topics(admin, topology(topic_prefix), greedy)
    assert "replication.factor" in caught.value.remedy


# --- offsets -------------------------------------------------------------------------------------------


def test_open_transaction_holds_back_the_read_committed_end_only(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic = create(admin, f"{topic_prefix}a", 2)
    partitions = [TopicPartition(topic, 0), TopicPartition(topic, 1)]
    producer = open_transaction(settings, f"{topic_prefix}id", topic)
    assert list(end_offsets(admin, partitions, "read-uncommitted").values()) == [1, 0]
    assert list(end_offsets(admin, partitions, "read-committed").values()) == [0, 0]
    producer.commit_transaction(10)
    # The commit marker takes an offset as well, and arrives shortly after the commit has returned.
    assert settled_end_offsets(admin, partitions) == {partitions[0]: 2, partitions[1]: 0}
    assert end_offsets(admin, partitions, "read-committed") == {partitions[0]: 2, partitions[1]: 0}
    assert end_offsets(admin, [], "read-committed") == {}


def test_end_offset_after_an_open_transaction_is_not_settled(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic = create(admin, f"{topic_prefix}a", 1)
    producer = open_transaction(settings, f"{topic_prefix}id", topic)
    with pytest.raises(KafkaUnavailable, match=f"{topic}/0 is still open"):
        settled_end_offsets(admin, [TopicPartition(topic, 0)], timeout_s=0.1)
    producer.abort_transaction(10)
    assert list(settled_end_offsets(admin, [TopicPartition(topic, 0)]).values()) == [2]


def test_offsets_of_a_missing_topic_are_an_error(admin: Admin, topic_prefix: str) -> None:
    with pytest.raises(KafkaUnavailable, match="listing offsets"):
        end_offsets(admin, [TopicPartition(f"{topic_prefix}none", 0)], "read-committed")


def test_records_are_deleted_up_to_the_offset_and_again_without_harm(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic = create(admin, f"{topic_prefix}a", 1)
    at = TopicPartition(topic, 0)
    producer = make_producer(settings)
    for _ in range(5):
        producer.produce(topic, b"value")
    assert producer.flush(10) == 0
    assert begin_offsets(admin, [at]) == {at: 0}
    assert delete_records_before(admin, {at: 3}) == {at: 3}
    assert delete_records_before(admin, {at: 2}) == {at: 3}
    assert begin_offsets(admin, [at]) == {at: 3}
    with pytest.raises(KafkaUnavailable, match="deleting records"):
        delete_records_before(admin, {at: 99})
    assert delete_records_before(admin, {}) == {}


def test_committed_positions_are_read_back_with_their_epochs(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic, group = create(admin, f"{topic_prefix}a", 2), f"{topic_prefix}job"
    zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
    consumer = make_consumer(settings, "read-committed", **{"group.id": group})
    assert read_committed_positions(consumer, group, [zero, one]) == {zero: None, one: None}
    position = CommittedPosition(offset=1, epoch=7, state_epoch=5, fingerprint="0123456789ab")
    producer = open_transaction(settings, f"{topic_prefix}id", topic)
    send_offset(producer, settings, group, topic, position)
    producer.commit_transaction(10)
    assert read_committed_positions(consumer, group, [one, zero]) == {zero: position, one: None}
    consumer.close()


def test_unsettled_offsets_are_waited_for_until_the_transaction_is_fenced(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic, group, id_ = create(admin, f"{topic_prefix}a", 1), f"{topic_prefix}job", f"{topic_prefix}id"
    at = TopicPartition(topic, 0)
    first = CommittedPosition(1, 1, 1, "f")
    producer = open_transaction(settings, id_, topic)
    send_offset(producer, settings, group, topic, first)
    producer.commit_transaction(10)
    begin_and_write(producer, topic)
    send_offset(producer, settings, group, topic, CommittedPosition(2, 2, 2, "f"))
    consumer = make_consumer(settings, "read-committed", **{"group.id": group})
    with pytest.raises(KafkaUnavailable, match="committed offsets"):
        read_committed_positions(consumer, group, [at], timeout_s=0.5)
    fence_transactional_id(settings, id_)
    assert read_committed_positions(consumer, group, [at]) == {at: first}
    consumer.close()


def test_offsets_of_another_program_are_an_error(admin: Admin, settings: Settings, topic_prefix: str) -> None:
    topic, group = create(admin, f"{topic_prefix}a", 1), f"{topic_prefix}job"
    consumer = make_consumer(settings, "read-committed", **{"group.id": group})
    consumer.commit(offsets=[TopicPartition(topic, 0, 3)], asynchronous=False)
    with pytest.raises(IncompatibleState, match=group) as caught:
        read_committed_positions(consumer, group, [TopicPartition(topic, 0)])
    consumer.close()
    assert "another name" in caught.value.remedy


# --- fencing -------------------------------------------------------------------------------------------


def test_fencing_aborts_what_is_open_and_the_zombies_commit_fails(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic, id_ = create(admin, f"{topic_prefix}a", 1), f"{topic_prefix}id"
    zombie = open_transaction(settings, id_, topic)
    fence_transactional_id(settings, id_)
    ends = end_offsets(admin, [TopicPartition(topic, 0)], "read-committed")
    assert list(ends.values()) == [2], "the record and the abort marker, with nothing held back"
    with pytest.raises(KafkaException) as caught:
        zombie.commit_transaction(10)
    assert cause_of(caught.value).fatal()


def produce_until_refused(producer: Producer, topic: str) -> None:
    """Write until the broker refuses, without serving any delivery report."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        producer.produce(topic, b"x" * 200)
        time.sleep(0.0001)


def test_all_reports_of_a_fenced_producer_are_served_before_it_is_destroyed(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic, id_ = create(admin, f"{topic_prefix}a", 1), f"{topic_prefix}id"
    zombie = open_transaction(settings, id_, topic)
    fence_transactional_id(settings, id_)
    with pytest.raises(KafkaException) as refused:
        produce_until_refused(zombie, topic)
    assert cause_of(refused.value).name() == "_FATAL"
    assert len(zombie) > 0
    serve_rest(zombie)
    assert len(zombie) == 0


def test_owner_after_a_fence_is_not_fenced_by_a_late_retry(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic, id_ = create(admin, f"{topic_prefix}a", 1), f"{topic_prefix}id"
    zombie = open_transaction(settings, id_, topic)
    fence_transactional_id(settings, id_)
    owner = open_transaction(settings, id_, topic)
    # librdkafka would ask again 500 ms after it found the open transaction, so the commit comes later than
    # that.
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        owner.poll(0.1)
    owner.commit_transaction(10)
    del zombie


def test_fencing_an_idle_or_unknown_id_repeatedly_does_no_harm(settings: Settings, topic_prefix: str) -> None:
    for _ in range(3):
        fence_transactional_id(settings, f"{topic_prefix}never-used")


def test_fencing_without_brokers_fails_within_its_time_limit() -> None:
    settings = resolve({}, None, {}, {"brokers": f"127.0.0.1:{reserve_for_process()}"})
    begun = time.monotonic()
    with pytest.raises(KafkaUnavailable, match="fencing 'some-id'"):
        fence_transactional_id(settings, "some-id", timeout_s=0.5)
    assert time.monotonic() - begun < 5


# --- records -------------------------------------------------------------------------------------------


def test_keys_go_to_the_partitions_that_javas_partitioner_chooses(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic = create(admin, f"{topic_prefix}a", 8)
    # These hashes are from Kafka's own tests of Utils.murmur2.
    hashes = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    placed: dict[bytes, int] = {}
    producer = make_producer(settings)
    for key in hashes:
        producer.produce(topic, b"v", key, on_delivery=lambda _e, m: placed.update({m.key(): m.partition()}))
    assert producer.flush(10) == 0
    assert placed == {key: (hashed & 0x7FFFFFFF) % 8 for key, hashed in hashes.items()}


def test_consumer_without_a_valid_offset_reports_it_and_never_jumps(
    admin: Admin, settings: Settings, topic_prefix: str
) -> None:
    topic = create(admin, f"{topic_prefix}a", 1)
    consumer = make_consumer(settings, "read-committed")
    consumer.assign([TopicPartition(topic, 0, 1000)])
    message = consumer.poll(10)
    consumer.close()
    assert message is not None
    assert message.error() is not None
    assert message.error().name() == "_AUTO_OFFSET_RESET"


def test_expected_errors_are_not_logged_and_lost_brokers_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    brokers = f"127.0.0.1:{reserve_for_process()}"
    settings = resolve({}, None, {}, {"brokers": brokers, "kafka.fetch.min.bytes": 1})
    caplog.set_level(logging.INFO)
    producer = make_producer(settings)
    deadline = time.monotonic() + 10
    while brokers not in caplog.text and time.monotonic() < deadline:
        producer.poll(0.1)
    # Clients of other tests that are closed at this moment may log as well.
    messages = [record.message for record in caplog.records if brokers in record.message]
    assert messages == [f"can't reach any Kafka broker at {brokers}; retrying"]
