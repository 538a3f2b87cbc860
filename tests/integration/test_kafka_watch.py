"""Status and log name what of Kafka the job waits for, on three brokers of which one stands still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from fcluster.kafka.embedded_cluster import EmbeddedCluster
from tests import brokers
from tests.checker.generate import write_records
from tests.checker.reading import READ_COMMITTED, committed_offsets, end_offsets, read_topic
from tests.checker.records import InputRecord
from tests.harness import COORDINATOR, Cluster, held_back, wait_until, wait_until_equal
from tests.pauses import status_of

pytestmark = pytest.mark.timeout(300)
JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
JOB, SOURCE, OUTPUT = "watched", "numbers", "totals"


@pytest.fixture
def kafka_cluster(tmp_path: Path) -> Iterator[EmbeddedCluster]:
    settings = {"broker.session.timeout.ms": "5000"}
    with EmbeddedCluster(tmp_path / "kafka", 3, settings=settings) as cluster:
        cluster.start()
        yield cluster


def put_in(servers: str, begin: int, count: int) -> None:
    records = [
        InputRecord(number, f"k{number % 20}", number // 20 + 1, 1) for number in range(begin, begin + count)
    ]
    write_records(servers, SOURCE, records)


def open_transaction(servers: str, topic: str, partition: int) -> tuple[Producer, int]:
    """A producer that has written a record in a transaction, and the record's offset."""
    written: list[int] = []

    def note(error: object, message: Message) -> None:
        assert error is None, error
        written.append(message.offset() or 0)

    producer = Producer(
        {"bootstrap.servers": servers, "transactional.id": "stranger", "transaction.timeout.ms": 280_000}
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(topic, b"{}", partition=partition, on_delivery=note)
    assert producer.flush(30) == 0
    return producer, written[0]


def commit_until_all_is_seen(servers: str, begin: int) -> None:
    """Have the job commit to its output again and again, until nothing in it is hidden.

    If the job's commit falls into the moment in which a partition has no leader, or the controller hasn't
    heard yet that it has one again, Kafka 4.3 never writes the commit marker there (KAFKA-20734). Then those
    outputs are hidden until the same producer commits there again. The job's two producers take turns.
    """

    def all_is_committed() -> bool:
        ends = end_offsets(servers, [SOURCE], READ_COMMITTED)
        committed = committed_offsets(servers, JOB)
        return all(committed.get(at) == end for at, end in ends.items())

    for number in range(begin, begin + 10 * 40, 40):
        put_in(servers, number, 40)
        wait_until(all_is_committed, "all is committed", 120)
        try:
            # Markers come a little after a commit.
            wait_until(lambda: not held_back(servers, [OUTPUT]), "all outputs to be seen", 5)
        except TimeoutError:
            continue
        return
    raise AssertionError(f"hidden after ten more commits: {held_back(servers, [OUTPUT])}")


def test_partition_without_a_leader_is_named_while_the_job_waits_for_it_and_what_it_hides_then(
    kafka_cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    servers = kafka_cluster.bootstrap_servers
    admin = AdminClient({"bootstrap.servers": servers})
    # One replica: nobody takes the place of the broker that stands still.
    for future in admin.create_topics([NewTopic(SOURCE, 2), NewTopic(OUTPUT, 3, 1)]).values():
        future.result(30)
    brokers.wait_whole(servers)
    env = {"FCLUSTER_TEST_JOB": JOB, "FCLUSTER_TEST_SOURCE": SOURCE, "FCLUSTER_TEST_OUTPUT": OUTPUT}

    def records_in(topic: str) -> int:
        return sum(
            map(len, read_topic(servers, topic, READ_COMMITTED, lambda message: message.offset()).values())
        )

    def outputs() -> int:
        return records_in(OUTPUT)

    def troubles() -> str:
        return " ".join(status_of(servers, JOB).get("kafka_troubles", []))

    with Cluster(JOB_FILE, servers, tmp_path / "data", workers=1, env=env).start() as cluster:
        put_in(servers, 0, 100)
        wait_until_equal(outputs, 100, "the first outputs", 60)
        assert troubles() == ""
        stranger, first_hidden = open_transaction(servers, OUTPUT, 0)
        victim = brokers.leader_of(servers, OUTPUT, 0)
        kafka_cluster.pause_node(victim)
        try:
            put_in(servers, 100, 100)
            wait_until(
                lambda: f"partition {OUTPUT}/0 has no leader" in troubles(), "the partition is named", 60
            )
            wait_until(lambda: f"broker {victim} is down" in troubles(), "so is the broker", 60)
        finally:
            kafka_cluster.resume_node(victim)
        brokers.wait_whole(servers)  # else it is this test's own reader that finds no leader
        hidden = f"partition {OUTPUT}/0 hides offsets {first_hidden} and later"
        wait_until(lambda: hidden in troubles(), "what the open transaction hides is named", 60)
        stranger.commit_transaction(30)
        commit_until_all_is_seen(servers, 200)
        # The test's producer may have written a record twice when the leader that it waited for changed.
        given = records_in(SOURCE)
        assert given > 200
        assert outputs() == given + 1, "one output for each input, and the stranger's record"
        wait_until_equal(troubles, "", "nothing is waited for any more", 60)
        cluster.assert_alive()
        log = cluster.log(COORDINATOR, 1000)
        assert log.count(f"waiting for Kafka: partition {OUTPUT}/0 has no leader") == 1
        assert log.count(f"waiting for Kafka: {hidden}") == 1
        assert log.count(f"Kafka has recovered: no longer {hidden}") == 1
        assert log.count("Kafka has recovered: no longer") >= 2
        cluster.terminate()
