"""A shard with many deltas gets a snapshot before the interval is over, so a restore never replays much more.

With a real broker and real workers. The interval is an hour, so only the size of the chain can be the reason.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, TopicPartition

from fcluster.common.ids import ShardId, changelog_topic
from fcluster.common.settings import Settings
from fcluster.kafka.clients import make_consumer
from fcluster.storage.snapshot_store import DirectorySnapshotStore
from fcluster.storage.snapshots import latest_valid
from tests.checker.check import check_totals, wait_until_committed
from tests.checker.generate import Generator, create_topic
from tests.harness import Cluster, wait_until, wait_until_equal, worker_name

pytestmark = pytest.mark.timeout(240)
JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
PARTITIONS = 2
BYTES_MAX = 1024 * 1024
SLACK_BYTES = 3 * BYTES_MAX
"""What is committed in a second or two: a snapshot takes that long, and begins a little earlier."""


def chain_bytes(settings: Settings, topic: str, partition: int, offset: int) -> int:
    """How many bytes a restore from this offset reads from the changelog."""
    consumer = make_consumer(settings, "read-committed", **{"enable.partition.eof": True})
    try:
        consumer.assign([TopicPartition(topic, partition, offset)])
        total = 0
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            message = consumer.poll(1)
            if message is None:
                continue
            error = message.error()
            if error is None:
                total += len(message.value() or b"")
            elif error.code() == KafkaError._PARTITION_EOF:
                return total
        raise AssertionError("the changelog's end was not reached")
    finally:
        consumer.close()


def test_long_chain_of_deltas_gets_a_snapshot_before_the_interval_is_over(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    job, source, output = (f"{topic_prefix}{name}" for name in ("job", "in", "out"))
    for topic in (source, output):
        create_topic(kafka, topic, PARTITIONS)
    env = {"FCLUSTER_TEST_JOB": job, "FCLUSTER_TEST_SOURCE": source, "FCLUSTER_TEST_OUTPUT": output}
    limits: dict[str, object] = {
        "snapshot.interval.ms": 3_600_000,
        "snapshot.changelog.bytes.max": BYTES_MAX,
    }
    data = tmp_path / "data"
    settings = Settings(bootstrap_servers=kafka)
    with Cluster(JOB_FILE, kafka, data, workers=1, env=env, settings=limits) as cluster:
        cluster.start()
        generator = Generator(kafka, source, rate=20_000, keys=20_000, seed=1).start()
        snapshots = DirectorySnapshotStore(data / "snapshots", job)
        shards = [ShardId(source, partition) for partition in range(PARTITIONS)]
        seen: dict[ShardId, set[str]] = {shard: set() for shard in shards}

        def all_snapshotted_three_times() -> bool:
            for shard in shards:
                seen[shard].update(snapshots.manifest_names(shard))
            return all(len(names) >= 3 for names in seen.values())

        try:
            wait_until(all_snapshotted_three_times, "three snapshots of each shard", 120, 0.2)
        finally:
            generator.stop()
        wait_until_committed(kafka, job, [source], 60)

        def left_bytes(shard: ShardId) -> int:
            newest = latest_valid(snapshots, shard)
            assert newest is not None
            return chain_bytes(
                settings, changelog_topic(job, source), shard.partition, newest.changelog_offset
            )

        lengths = [left_bytes(shard) for shard in shards]
        print(f"snapshots {[len(names) for names in seen.values()]}, left to replay {lengths} bytes")
        assert max(lengths) <= BYTES_MAX + SLACK_BYTES, lengths
        # A worker without local files does restore from a snapshot.
        cluster.kill(worker_name(0))
        shutil.rmtree(data / "state")
        cluster.start_worker(0)
        restored = "from snapshot at epoch"
        wait_until_equal(
            lambda: cluster.log(worker_name(0), 10_000).count(restored), PARTITIONS, "restored", 60
        )
        verdict = check_totals(kafka, job, source, output)
        assert verdict.ok, verdict.report()
