"""Journal and fencing on a real broker: who may write, what is read, and what a deposed coordinator can't
do."""

from __future__ import annotations

import queue
import time

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from fcluster.common.errors import IncompatibleState, KafkaUnavailable
from fcluster.common.ids import journal_topic, transactional_ids
from fcluster.common.settings import Settings
from fcluster.coordinator.core.events import SlotFenced, SlotFenceFailed
from fcluster.coordinator.fencing import Fencer
from fcluster.coordinator.journal import DeposedError, open_journal
from fcluster.kafka.clients import make_producer
from fcluster.wire.discovery import Leader, find_leader, read_journal
from tests.harness import within


def create_topic(kafka: str, name: str, **config: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(name, 1, 1, config=config)])[name].result()


@pytest.fixture
def brokers(kafka: str) -> Settings:
    return Settings(bootstrap_servers=kafka)


@pytest.fixture
def job(kafka: str, topic_prefix: str) -> str:
    """A job whose journal topic exists."""
    name = topic_prefix + "job"
    create_topic(kafka, journal_topic(name), **{"cleanup.policy": "compact"})
    return name


def test_job_without_journal_has_no_leader(brokers: Settings, topic_prefix: str) -> None:
    assert find_leader(brokers, topic_prefix + "none") is None


def test_next_leader_reads_what_was_written(brokers: Settings, job: str) -> None:
    journal, past = open_journal(brokers, job)
    assert past == {}
    journal.write({"term": {"term": 1}, "slot/0": {"session": 7}, "slot/1": {"session": 8}})
    journal.write({"slot/1": None, "slot/0": {"session": 9}})
    assert open_journal(brokers, job)[1] == {"term": {"term": 1}, "slot/0": {"session": 9}}


def test_leader_record_is_found(brokers: Settings, job: str) -> None:
    leader = Leader("tcp://127.0.0.1:1234", 3, "host", 42, "abc")
    open_journal(brokers, job)[0].write({"leader": leader})
    assert find_leader(brokers, job) == leader


def test_older_leader_is_deposed_by_the_newer(brokers: Settings, job: str) -> None:
    older, _ = open_journal(brokers, job)
    older.write({"term": {"term": 1}})
    younger, past = open_journal(brokers, job)
    assert past == {"term": {"term": 1}}
    with pytest.raises(DeposedError):
        older.write({"term": {"term": 99}})
    younger.write({"term": {"term": 2}})
    assert read_journal(brokers, job) == {"term": {"term": 2}}


def test_open_write_of_an_older_leader_is_aborted_before_the_newer_reads(brokers: Settings, job: str) -> None:
    producer = make_producer(brokers, f"{job}-coordinator")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(journal_topic(job), key=b"half", value=b"{}")
    producer.flush(10)
    started = time.monotonic()
    _, past = open_journal(brokers, job)
    assert past == {}
    assert within(time.monotonic() - started, 5)
    with pytest.raises(KafkaException):
        producer.commit_transaction(10)


def test_topic_with_other_records_is_refused_as_a_journal(brokers: Settings, kafka: str, job: str) -> None:
    producer = Producer({"bootstrap.servers": kafka})
    producer.produce(journal_topic(job), key=b"term", value=b"not JSON")
    producer.flush(10)
    with pytest.raises(IncompatibleState, match="not this job's journal"):
        find_leader(brokers, job)


def test_unreachable_brokers_are_named_within_the_time_limit() -> None:
    started = time.monotonic()
    with pytest.raises(KafkaUnavailable, match=r"127\.0\.0\.1:1"):
        find_leader(Settings(bootstrap_servers="127.0.0.1:1"), "job", timeout_s=1)
    assert within(time.monotonic() - started, 5)


def test_fence_aborts_both_ids_of_the_slot_and_its_zombie_cannot_commit(
    brokers: Settings, kafka: str, topic_prefix: str
) -> None:
    topic, job = topic_prefix + "out", topic_prefix + "job"
    create_topic(kafka, topic)
    zombies: list[Producer] = []
    for identity in transactional_ids(job, 3):
        zombie = make_producer(brokers, identity)
        zombie.list_topics(timeout=10)
        zombie.init_transactions(10)
        zombie.begin_transaction()
        zombie.produce(topic, value=b"never to be seen")
        zombie.flush(10)
        zombies.append(zombie)
    outcomes: queue.Queue[SlotFenced | SlotFenceFailed] = queue.Queue()
    fencer = Fencer(brokers, job, outcomes.put)
    started = time.monotonic()
    fencer.fence(3)
    assert outcomes.get(timeout=20) == SlotFenced(3)
    assert within(time.monotonic() - started, 2)
    fencer.close()
    for zombie in zombies:
        with pytest.raises(KafkaException) as failure:
            zombie.commit_transaction(10)
        assert failure.value.args[0].fatal()
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": topic, "enable.partition.eof": True})
    consumer.assign([TopicPartition(topic, 0, 0)])
    message = consumer.poll(10)
    assert message is not None
    assert message.error() is not None, "an aborted record, or the end held back by an open transaction"
    consumer.close()


def test_fence_that_fails_for_one_id_is_reported_as_failed() -> None:
    outcomes: queue.Queue[SlotFenced | SlotFenceFailed] = queue.Queue()

    def fence_id(_: Settings, identity: str, ready: list[Producer]) -> None:
        if identity.endswith("-1"):
            raise KafkaUnavailable("brokers are away")

    fencer = Fencer(Settings(), "job", outcomes.put, fence_id)
    fencer.fence(0)
    assert outcomes.get(timeout=5) == SlotFenceFailed(0, "brokers are away")
    fencer.close()


def test_at_least_once_has_nothing_to_fence() -> None:
    outcomes: queue.Queue[SlotFenced | SlotFenceFailed] = queue.Queue()

    def fence_id(_: Settings, identity: str, ready: list[Producer]) -> None:
        raise AssertionError(identity)

    fencer = Fencer(Settings(processing_guarantee="at-least-once"), "job", outcomes.put, fence_id)
    fencer.fence(5)
    assert outcomes.get_nowait() == SlotFenced(5)
    fencer.close()
