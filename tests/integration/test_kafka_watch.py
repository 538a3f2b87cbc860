"""Status and log name what of Kafka the job waits for, on three brokers of which one stands still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from fcluster.kafka.embedded_cluster import EmbeddedCluster
from tests import brokers
from tests.checker.generate import write_records
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.checker.records import InputRecord
from tests.harness import COORDINATOR, Cluster, wait_until, wait_until_equal
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


def test_partition_without_a_leader_is_named_while_the_job_waits_for_it(
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
        # The test's producer may have written a record twice when the leader that it waited for changed.
        given = records_in(SOURCE)
        assert given >= 200
        wait_until_equal(outputs, given, "the other outputs", 120)
        wait_until_equal(troubles, "", "nothing is waited for any more", 60)
        cluster.assert_alive()
        log = cluster.log(COORDINATOR, 1000)
        assert log.count(f"waiting for Kafka: partition {OUTPUT}/0 has no leader") == 1
        assert log.count("Kafka has recovered: no longer") >= 1
        cluster.terminate()
