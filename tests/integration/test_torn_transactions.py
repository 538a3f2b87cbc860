"""A transaction that Kafka has torn, written by hand to a real broker: the shard stops. Each way to continue.

One job is used for everything: partition 0 gets a delta beyond the committed epoch, partition 1 an offset
whose epoch has no delta, and the others stay whole. Outputs show with which state and offset a shard
continued.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, TopicPartition

from fcluster.common.ids import changelog_topic
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import resolve
from fcluster.engine.changelog import Delta, DeltaReader, encode_delta, parse_record
from fcluster.kafka.clients import make_admin, make_consumer, make_producer
from fcluster.kafka.offsets import begin_offsets, read_committed_positions, settled_end_offsets
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import Cluster, wait_until, wait_until_equal, worker_name
from tests.pauses import status_of

pytestmark = pytest.mark.timeout(300)
JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
PARTITIONS = 3
SETTINGS = {"snapshot.interval.ms": 3_600_000, "commit.interval.min.ms": 10}


@dataclass
class Work:
    """A job with one key in each partition, `k<partition>`."""

    brokers: str
    prefix: str
    directory: Path

    def __post_init__(self) -> None:
        self.settings = resolve({}, None, {}, {"bootstrap.servers": self.brokers})
        self.job, self.source, self.output = (f"{self.prefix}{name}" for name in ("job", "in", "out"))
        self.changelog = changelog_topic(self.job, self.source)
        for topic in (self.source, self.output):
            create_topic(self.brokers, topic, PARTITIONS)
        self.admin = make_admin(self.settings)
        self.offsets: Consumer = make_consumer(self.settings, "read-committed", **{"group.id": self.job})
        self.producer = make_producer(self.settings, f"{self.prefix}torn")
        self.producer.list_topics(timeout=10)
        self.producer.init_transactions(30)
        self.sequences = [0] * PARTITIONS

    def cluster(self, **settings: str) -> Cluster:
        env = {
            "FCLUSTER_TEST_JOB": self.job,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": self.output,
        }
        with_these = {**SETTINGS, **settings}
        cluster = Cluster(JOB_FILE, self.brokers, self.directory, workers=1, env=env, settings=with_these)
        return cluster.start()

    def put_in(self, partition: int, count: int) -> None:
        """Write records of value 1, so that the job's count and sum are equal."""
        self.producer.begin_transaction()
        for _ in range(count):
            self.sequences[partition] += 1
            number = self.sequences[partition]
            value = orjson.dumps({"id": f"{partition}-{number}", "seq": number, "value": 1, "at": 0})
            self.producer.produce(self.source, value, f"k{partition}", partition=partition)
        self.producer.commit_transaction(30)

    def positions(self) -> dict[int, CommittedPosition | None]:
        wanted = [TopicPartition(self.source, partition) for partition in range(PARTITIONS)]
        found = read_committed_positions(self.offsets, self.job, wanted)
        return {at.partition: position for at, position in found.items()}

    def position(self, partition: int) -> CommittedPosition:
        position = self.positions()[partition]
        assert position is not None
        return position

    def wait_done(self, *partitions: int) -> None:
        """Wait until all records of these partitions are committed."""
        where = [TopicPartition(self.source, partition) for partition in partitions]
        ends = {at.partition: end for at, end in settled_end_offsets(self.admin, where).items()}

        def done() -> bool:
            found = self.positions()
            return all((at := found[n]) is not None and at.offset >= ends[n] - 1 for n in partitions)

        wait_until(done, f"all of {partitions} is committed", 60)

    def outputs(self, partition: int) -> list[tuple[int, int]]:
        """The input's sequence number and the count, for each output in order."""
        records: dict[int, list[dict[str, Any]]] = read_topic(
            self.brokers, self.output, READ_COMMITTED, lambda message: orjson.loads(message.value() or b"")
        )
        return [
            (record["seq"], record["count"])
            for record in chain.from_iterable(records.values())
            if record["partition"] == partition
        ]

    # --- tearing --------------------------------------------------------------------------------------

    def tear_off_offset(self, partition: int, count: int) -> None:
        """Write records, and a committed delta that says that they were processed and that the count is
        1000."""
        at = self.position(partition)
        self.put_in(partition, count)
        end = settled_end_offsets(self.admin, [TopicPartition(self.source, partition)])
        records = read_topic(
            self.brokers, self.changelog, READ_COMMITTED, lambda message: (message.offset(), message.value())
        )[partition]
        # Everything before is in a snapshot.
        reader = DeltaReader("changelog", parse_record(records[0][1]).previous_epoch)
        [*_, last] = [reader.feed(offset or 0, value) for offset, value in records]
        assert last is not None
        changes = {key: orjson.dumps({"count": 1000, "sum": 1000}) for key in last.changes}
        delta = Delta(at.state_epoch + 1, at.state_epoch, changes, next(iter(end.values())))
        self.producer.begin_transaction()
        for record in encode_delta(delta):
            self.producer.produce(self.changelog, record, partition=partition)
        self.producer.commit_transaction(30)

    def tear_off_delta(self, partition: int, count: int) -> None:
        """Write records, and commit that they were processed, in an epoch without a delta."""
        at = self.position(partition)
        self.put_in(partition, count)
        end = settled_end_offsets(self.admin, [TopicPartition(self.source, partition)])
        ahead = replace(
            at, offset=next(iter(end.values())), epoch=at.epoch + 1, state_epoch=at.state_epoch + 1
        )
        wanted = TopicPartition(self.source, partition, ahead.offset, metadata=ahead.encode_metadata())
        self.offsets.commit(offsets=[wanted], asynchronous=False)


@pytest.fixture
def work(kafka: str, topic_prefix: str, tmp_path: Path) -> Work:
    return Work(kafka, topic_prefix, tmp_path)


def stopped_shards(work: Work) -> dict[int, str]:
    shards = status_of(work.brokers, work.job).get("shards", [])
    return {shard["partition"]: shard["stopped_reason"] for shard in shards if shard["phase"] == "stopped"}


def test_torn_transactions_stop_their_shards_and_each_way_to_continue_works(work: Work) -> None:
    with work.cluster() as cluster:
        for partition in range(PARTITIONS):
            work.put_in(partition, 3)
        work.wait_done(0, 1, 2)
        cluster.terminate()

    work.tear_off_offset(0, count=2)
    work.tear_off_delta(1, count=2)
    with work.cluster() as cluster:
        wait_until_equal(lambda: len(stopped_shards(work)), 2, "both shards are stopped", 60)
        work.put_in(2, 2)
        work.wait_done(2)  # the other shard continues
        stopped = stopped_shards(work)
        assert "it committed the delta of epoch" in stopped[0]
        assert "but not the delta of that epoch" in stopped[1]
        assert all("--set torn.transaction=offsets" in reason for reason in stopped.values())
        status = status_of(work.brokers, work.job)
        assert status["counters"]["torn_transactions"] == 2
        assert (status["phase"], status["workers"][0]["phase"]) == ("running", "running")
        assert "Kafka has torn a transaction of" in cluster.log(worker_name(0), 200)
        cluster.terminate()

    # Continue from the offsets: the delta is ignored, or the state becomes what the last delta says.
    with work.cluster(**{"torn.transaction": "offsets"}) as cluster:
        work.put_in(1, 1)
        work.wait_done(0, 1)
        assert status_of(work.brokers, work.job)["counters"]["torn_transactions"] == 2
        cluster.terminate()
    assert work.outputs(0) == [(number, number) for number in range(1, 6)]
    assert work.outputs(1) == [(1, 1), (2, 2), (3, 3), (6, 4)], "what is between is lost, as announced"
    begins = begin_offsets(work.admin, [TopicPartition(work.changelog, n) for n in range(PARTITIONS)])
    assert [begin > 0 for begin in begins.values()] == [True, True, False]

    # That is settled: nobody has to choose again, and only the snapshot leads to the state.
    for path in (work.directory / "state").rglob("db"):
        path.rename(path.with_name("gone"))
    with work.cluster() as cluster:
        for partition in (0, 1):
            work.put_in(partition, 1)
        work.wait_done(0, 1, 2)
        assert stopped_shards(work) == {}
        cluster.terminate()
    assert work.outputs(0)[-1] == (6, 6)
    assert work.outputs(1)[-1] == (7, 5)

    # Continue from the delta: with its state and offset, or with the last one that exists.
    work.tear_off_offset(0, count=2)
    work.tear_off_delta(1, count=2)
    with work.cluster(**{"torn.transaction": "delta"}) as cluster:
        work.wait_done(0)  # offset and delta agree again before any record comes
        work.put_in(0, 1)
        work.wait_done(0)
        wait_until_equal(lambda: len(work.outputs(1)), 7, "what the offset had skipped is processed")
        cluster.terminate()
    assert work.outputs(0)[-1] == (9, 1001), "records 7 and 8 were not processed again"
    assert work.outputs(1)[-2:] == [(8, 6), (9, 7)], "nothing is lost"
    with work.cluster() as cluster:
        work.put_in(0, 1)
        work.put_in(1, 1)
        work.wait_done(0, 1, 2)
        assert stopped_shards(work) == {}
        cluster.terminate()
    assert work.outputs(0)[-1] == (10, 1002)
    assert work.outputs(1)[-1] == (10, 8)
