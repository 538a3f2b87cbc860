"""A cluster's snapshot store with real processes: a worker with another store can't join; state is
restored."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition

from fcluster.common.settings import resolve
from fcluster.kafka.clients import make_admin
from fcluster.kafka.offsets import begin_offsets
from tests.checker.check import check_totals, wait_until_committed
from tests.checker.generate import create_topic, write_records
from tests.checker.reading import READ_COMMITTED, end_offsets, topics_with_prefix
from tests.checker.records import generate_records
from tests.harness import COORDINATOR, Cluster, wait_until, worker_name
from tests.s3.server import S3Server

JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
PARTITIONS = 4
BATCH = 500

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def make(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Creates clusters of one job with its own topics. All of them end with the test."""
    clusters: list[Cluster] = []
    environment = {
        "FCLUSTER_TEST_JOB": f"{topic_prefix}job",
        "FCLUSTER_TEST_SOURCE": f"{topic_prefix}in",
        "FCLUSTER_TEST_OUTPUT": f"{topic_prefix}out",
    }
    for name in ("in", "out"):
        create_topic(kafka, f"{topic_prefix}{name}", PARTITIONS)

    def cluster(name: str, env: dict[str, str] | None = None, **settings: object) -> Cluster:
        chosen = {setting.replace("_", "."): value for setting, value in settings.items()}
        made = Cluster(
            JOB_FILE, kafka, tmp_path / name, workers=2, env=environment | (env or {}), settings=chosen
        )
        clusters.append(made)
        return made

    yield cluster
    for made in clusters:
        print(made.logs())
        made.close()


def test_worker_with_another_directory_is_refused_with_the_reason(
    make: Callable[..., Cluster], tmp_path: Path
) -> None:
    with make("one", snapshots=tmp_path / "shared") as here, make("two", snapshots=tmp_path / "own") as there:
        here.start_coordinator()
        stranger = there.start_worker(1)
        assert wait_until(lambda: stranger.poll() is not None, "the worker with another store ends", 60)
        assert stranger.poll() == 1
        assert "refused" in there.log(worker_name(1))
        assert "Set 'snapshots' to the same" in there.log(worker_name(1))
        assert "refused worker" in here.log(COORDINATOR)
        here.assert_alive()


def test_state_is_restored_from_s3_when_all_local_files_are_lost(
    make: Callable[..., Cluster], kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    """The changelog is truncated behind the snapshots first, so only the snapshots can restore the state."""
    job, source, output = f"{topic_prefix}job", f"{topic_prefix}in", f"{topic_prefix}out"
    last: dict[str, int] = {}
    batches = itertools.count()

    def feed() -> None:
        first_id = next(batches) * BATCH
        records = generate_records(BATCH, keys=200, seed=first_id, sequences=last, first_id=first_id)
        write_records(kafka, source, records)
        wait_until_committed(kafka, job, [source], 90)

    with S3Server(tmp_path / "s3") as server:
        server.make_bucket("snapshots")
        url = "s3://snapshots/here"
        with make("data", server.environment(), snapshots=url, snapshot_interval_ms=300) as cluster:
            cluster.start()
            # While the job runs, state is written, and then copied.
            wait_until(
                lambda: (feed(), changelog_is_cut(kafka, job))[1], "the changelog is truncated", 90, 0.5
            )
            cluster.kill_all()
            shutil.rmtree(tmp_path / "data" / "state")
            cluster.start()
            feed()
            cluster.assert_alive()
            cluster.close()
            verdict = check_totals(kafka, job, source, output)
            assert verdict.ok, verdict.report()
            assert sum(end_offsets(kafka, [output], READ_COMMITTED).values()) >= next(batches) * BATCH


def changelog_is_cut(brokers: str, job: str) -> bool:
    """Whether the beginning of each partition of the changelog is deleted."""
    (changelog,) = [topic for topic in topics_with_prefix(brokers, f"{job}-") if "changelog" in topic]
    partitions = [TopicPartition(changelog, partition) for partition in range(PARTITIONS)]
    begins = begin_offsets(make_admin(resolve({}, None, {}, {"bootstrap.servers": brokers})), partitions)
    return min(begins.values()) > 0
