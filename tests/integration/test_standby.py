"""Warm copies follow what is committed, are handed over open, and shorten the pause after a worker's
death."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition

from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings, resolve
from fcluster.kafka.clients import make_admin
from fcluster.kafka.offsets import delete_records_before
from fcluster.storage.snapshot_store import DirectorySnapshotStore
from fcluster.storage.snapshots import take_snapshot
from fcluster.storage.store import RocksStore, StoreDirectory
from fcluster.storage.warm_copies import StandbyTail
from fcluster.wire.messages import StandbyStatus
from tests.checker.check import check_totals, wait_until_committed
from tests.checker.generate import Generator, create_topic
from tests.checker.live import LiveReader
from tests.checker.reading import READ_COMMITTED, read_input
from tests.checker.state import check_state
from tests.checker.verdict import state_by_key
from tests.harness import Cluster, wait_until, wait_until_equal, within
from tests.integration.test_restore import Changelog
from tests.pauses import Kill, kill_and_measure, status_of, wait_settled

pytestmark = pytest.mark.timeout(240)
JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
PATIENCE_S = 20.0


@pytest.fixture
def settings(kafka: str) -> Settings:
    return resolve({}, None, {}, {"bootstrap.servers": kafka})


@pytest.fixture
def changelog(settings: Settings, topic_prefix: str) -> Changelog:
    return Changelog(settings, f"{topic_prefix}changelog")


@pytest.fixture
def tail(settings: Settings, snapshots: DirectorySnapshotStore) -> Iterator[StandbyTail]:
    tail = StandbyTail(settings, snapshots, make_admin(settings))
    yield tail
    tail.close()


def wait_warm(tail: StandbyTail, shard: ShardId, epoch: int) -> None:
    """Wait until the copy has this epoch and knows that there are no more."""
    wait_until(lambda: StandbyStatus(shard, epoch, 0) in tail.statuses(), f"{shard} at epoch {epoch}", 30)


def opened(directory: StoreDirectory, shard: ShardId) -> RocksStore:
    store = directory.opened(shard)
    assert store is not None, "its store was closed"
    return store


def test_copy_follows_what_is_committed_and_is_handed_over_open(
    changelog: Changelog, directory: StoreDirectory, tail: StandbyTail
) -> None:
    shard = changelog.shard(1)
    changelog.write(1, 3, {b"aaaa-k": b"1", b"aaaa-l": b"1"})
    tail.keep(directory, {shard: changelog.topic})
    wait_warm(tail, shard, 3)
    changelog.abort(1, 4, {b"aaaa-k": b"aborted"})
    changelog.write(1, 5, {b"aaaa-k": b"2" * 500})  # several records
    changelog.write(1, 9, {b"aaaa-l": b""})
    assert tail.take({shard: 9}, PATIENCE_S) == 1
    store = opened(directory, shard)
    assert store.meta().state_epoch == 9
    assert store.items() == [(b"aaaa-k", b"2" * 500)]
    assert tail.shards == set()
    changelog.write(1, 10, {b"aaaa-k": b"not ours any more"})
    changelog.write(2, 10, {b"aaaa-k": b"3"})
    tail.keep(directory, {changelog.shard(2): changelog.topic})
    wait_warm(tail, changelog.shard(2), 10)
    assert store.meta().state_epoch == 9, "it was written to after it was handed over"


def test_copy_that_was_taken_can_be_kept_again(
    changelog: Changelog, directory: StoreDirectory, tail: StandbyTail
) -> None:
    shard = changelog.shard(0)
    for epoch in range(1, 6):
        changelog.write(0, epoch, {b"aaaa-k": b"%d" % epoch})
        tail.keep(directory, {shard: changelog.topic})
        assert tail.take({shard: epoch}, PATIENCE_S if epoch > 1 else 0) in (0, 1)
        tail.keep(directory, {shard: changelog.topic})
        wait_warm(tail, shard, epoch)
    tail.take({shard: 5}, 0)
    assert opened(directory, shard).items() == [(b"aaaa-k", b"5")]


def test_copy_starts_from_a_snapshot_if_the_changelog_is_truncated(
    changelog: Changelog,
    directory: StoreDirectory,
    tail: StandbyTail,
    snapshots: DirectorySnapshotStore,
    tmp_path: Path,
) -> None:
    shard = changelog.shard(0)
    changelog.write(0, 1, {b"aaaa-k": b"1"})
    offset = changelog.write(0, 2, {b"aaaa-l": b"2"})
    delete_records_before(changelog.admin, {TopicPartition(changelog.topic, 0): offset})
    tail.keep(directory, {shard: changelog.topic})
    wait_until_equal(lambda: tail.statuses(), [StandbyStatus(shard, 0, -1)], "no base", 10)
    owner = StoreDirectory(tmp_path / "owner")
    store = owner.open(shard)
    store.apply(
        {b"aaaa-k": b"1", b"aaaa-l": b"2"}, store.meta()._replace(state_epoch=2, changelog_offset=offset)
    )
    take_snapshot(store, shard, snapshots)
    owner.close_all()
    changelog.write(0, 3, {b"aaaa-m": b"3"})
    wait_warm(tail, shard, 3)
    tail.take({shard: 3}, 0)
    expected = [(b"aaaa-k", b"1"), (b"aaaa-l", b"2"), (b"aaaa-m", b"3")]
    assert sorted(opened(directory, shard).items()) == expected


def test_copy_with_files_of_another_changelog_starts_again(
    changelog: Changelog, directory: StoreDirectory, tail: StandbyTail
) -> None:
    shard = changelog.shard(0)
    store = directory.open(shard)
    store.apply({b"aaaa-old": b"1"}, store.meta()._replace(state_epoch=7, changelog_offset=0))
    changelog.write(0, 1, {b"aaaa-k": b"1"})
    tail.keep(directory, {shard: changelog.topic})
    wait_warm(tail, shard, 1)
    tail.take({shard: 1}, 0)
    assert opened(directory, shard).items() == [(b"aaaa-k", b"1")]


# --- real processes -------------------------------------------------------------------------------------


class Load:
    """Four workers of the checker's job, under a steady load."""

    def __init__(self, brokers: str, name: str, data_dir: Path, replicas: int) -> None:
        self.brokers = brokers
        self.job, self.source, self.output = name, f"{name}-in", f"{name}-out"
        self.replicas = replicas
        self.data_dir = data_dir
        create_topic(brokers, self.source, 8)
        create_topic(brokers, self.output, 8)
        env = {
            "FCLUSTER_TEST_JOB": self.job,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": self.output,
        }
        chosen = {"num.standby.replicas": replicas}
        self.cluster = Cluster(JOB_FILE, brokers, data_dir, workers=4, env=env, settings=chosen)

    def __enter__(self) -> Load:
        self.cluster.start()
        self.reader = LiveReader(self.brokers, self.output, READ_COMMITTED).start()
        self.generator = Generator(self.brokers, self.source, rate=1000, keys=5000).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(self.cluster.logs())
        self.cluster.close()

    def kill(self, slot: int) -> Kill:
        return kill_and_measure(self.cluster, self.job, slot, self.reader, self.replicas)

    def check(self) -> None:
        """End the cluster and judge everything."""
        wait_settled(self.cluster, self.job, self.replicas)
        self.generator.stop()
        wait_until_committed(self.brokers, self.job, [self.source], 60)
        verdict = check_totals(self.brokers, self.job, self.source, self.output, readers=[self.reader])
        self.cluster.close()
        self.reader.stop()
        expected = state_by_key(read_input(self.brokers, self.source))
        verdict.merge(
            check_state(self.brokers, self.job, self.source, self.source, "totals", expected, self.data_dir)
        )
        assert verdict.ok, verdict.report()


@pytest.fixture
def load(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Callable[[int], Load]]:
    made: list[Load] = []

    def make(replicas: int) -> Load:
        made.append(Load(kafka, f"{topic_prefix}job{len(made)}", tmp_path / f"data{len(made)}", replicas))
        return made[-1]

    yield make
    for one in made:
        shutil.rmtree(one.data_dir, ignore_errors=True)


def test_shards_of_a_killed_worker_continue_at_their_warm_copies(load: Callable[[int], Load]) -> None:
    pauses_ms: dict[int, float] = {}
    for replicas in (0, 1):
        with load(replicas) as running:
            pauses_ms[replicas] = running.kill(1).longest_ms
            counters = status_of(running.brokers, running.job)["counters"]
            assert counters["warm_takeovers"] == (2 if replicas else 0)
            running.check()
    print(f"pauses: {pauses_ms[0]:.0f} ms without a standby, {pauses_ms[1]:.0f} ms with one")
    assert within(pauses_ms[1] / 1000, 5)


def test_shards_move_warm_to_a_worker_that_joins(load: Callable[[int], Load]) -> None:
    with load(0) as running:
        running.kill(2)  # it is restarted, and gets its share back
        status = wait_settled(running.cluster, running.job, 0)
        assert status["counters"]["moves"] >= 2
        assert status["counters"]["cold_moves"] == 0
        began_s = time.monotonic()
        running.check()
        assert time.monotonic() - began_s < 100
