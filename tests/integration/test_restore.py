"""Restores on a real broker: exactly the committed state comes back, or an error."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import NewTopic

from fcluster.common.errors import KafkaUnavailable, StateDamaged, TornTransaction
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings, resolve
from fcluster.engine.changelog import Delta, encode_delta
from fcluster.engine.state import FlushLimits, ShardState, StoreMeta
from fcluster.kafka.clients import make_admin, make_producer
from fcluster.kafka.offsets import delete_records_before
from fcluster.storage.restore import (
    RestoreProgress,
    RestoreRequest,
    ShardRestored,
    ShardStopped,
    restore_shards,
)
from fcluster.storage.restore_plan import Base
from fcluster.storage.snapshot_store import DirectorySnapshotStore
from fcluster.storage.snapshots import latest_valid, take_snapshot
from fcluster.storage.store import RocksStore, StoreDirectory
from tests.state_memory import EntriesMax

PARTITIONS = 4
Changes = Mapping[bytes, bytes]


@pytest.fixture
def settings(kafka: str) -> Settings:
    return resolve({}, None, {}, {"bootstrap.servers": kafka})


class Changelog:
    """The changelog topic of a stage, and a transactional producer that writes deltas to it."""

    def __init__(self, settings: Settings, topic: str) -> None:
        self.settings = settings
        self.topic = topic
        self.admin = make_admin(settings)
        self.create()
        self.producer = make_producer(settings, topic)
        self.producer.list_topics(timeout=10)
        self.producer.init_transactions(30)
        self.epochs: dict[int, int] = {}

    def create(self) -> None:
        self.admin.create_topics([NewTopic(self.topic, PARTITIONS, 1)])[self.topic].result(30)
        self.wait_until(lambda: self.topic in self.admin.list_topics(timeout=5).topics)

    def create_anew(self) -> None:
        self.admin.delete_topics([self.topic])[self.topic].result(30)
        self.wait_until(lambda: self.topic not in self.admin.list_topics(timeout=5).topics)
        self.create()
        self.epochs.clear()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it didn't happen in time"

    def shard(self, partition: int) -> ShardId:
        return ShardId("flights", partition)

    def begin(
        self, partition: int, epoch: int, changes: Changes, *, previous: int | None = None
    ) -> list[int]:
        """Write a delta in an open transaction. Its next offset is appended to the list that is returned."""
        self.producer.begin_transaction()
        before = self.epochs.get(partition, 0) if previous is None else previous
        return self.produce(self.producer, partition, Delta(epoch, before, changes))

    def produce(
        self, producer: Producer, partition: int, delta: Delta, record_bytes_max: int = 200
    ) -> list[int]:
        offsets: list[int] = []
        for record in encode_delta(delta, record_bytes_max):
            producer.produce(
                self.topic,
                record,
                partition=partition,
                on_delivery=lambda error, message: offsets.append(message.offset() + 1),
            )
        producer.flush(30)
        return offsets

    def write(self, partition: int, epoch: int, changes: Changes, *, previous: int | None = None) -> int:
        """Commit a delta. Returns the offset after it."""
        offsets = self.begin(partition, epoch, changes, previous=previous)
        self.producer.commit_transaction(30)
        self.epochs[partition] = epoch
        return offsets[-1]

    def abort(self, partition: int, epoch: int, changes: Changes) -> None:
        self.begin(partition, epoch, changes)
        self.producer.abort_transaction(30)

    def request(self, partition: int, state_epoch: int | None) -> RestoreRequest:
        committed = (
            None if state_epoch is None else CommittedPosition(1000, state_epoch + 1, state_epoch, "f")
        )
        return RestoreRequest(self.shard(partition), self.topic, committed)


@pytest.fixture
def changelog(settings: Settings, topic_prefix: str) -> Changelog:
    return Changelog(settings, f"{topic_prefix}changelog")


@pytest.fixture
def restore(changelog: Changelog, directory: StoreDirectory, snapshots: DirectorySnapshotStore):
    """Restores some shards. Returns the answers by partition."""

    def run(*requests: RestoreRequest, **options: Any) -> dict[int, ShardRestored]:
        options = {"settings": changelog.settings, "stop": threading.Event(), **options}
        answers: dict[int, ShardRestored] = {}
        for answer in restore_shards(requests, directory=directory, snapshots=snapshots, **options):
            if isinstance(answer, ShardStopped):
                raise answer.error
            answers[answer.shard.partition] = answer
        return answers

    return run


Restore = Callable[..., dict[int, ShardRestored]]


def key(n: int) -> bytes:
    return b"key-%d" % n


def contents(store: RocksStore) -> dict[bytes, bytes]:
    return dict(store.items())


def apply(store: RocksStore, epoch: int, offset: int, changes: Changes) -> None:
    store.apply(changes, store.meta()._replace(state_epoch=epoch, changelog_offset=offset))


# --- what comes back --------------------------------------------------------------------------------------


def test_shards_are_restored_from_their_changelogs_by_one_consumer(
    changelog: Changelog, restore: Restore
) -> None:
    expected: dict[int, dict[bytes, bytes]] = {}
    offsets: dict[int, int] = {}
    for partition in range(PARTITIONS - 1):
        for epoch in range(1, 6):
            changes = {key(n): b"%d-%d" % (partition, epoch) for n in range(epoch, epoch + 20)}
            changes[key(epoch - 1)] = b""
            offsets[partition] = changelog.write(partition, epoch * 2, changes)
            expected.setdefault(partition, {}).update(changes)
    progress: list[RestoreProgress] = []
    requests = [changelog.request(partition, 10) for partition in range(PARTITIONS - 1)]
    answers = restore(*requests, changelog.request(PARTITIONS - 1, None), progress=progress.append)
    assert sorted(answers) == list(range(PARTITIONS))
    for partition, entries in expected.items():
        store = answers[partition].store
        assert contents(store) == {k: v for k, v in entries.items() if v}
        assert store.meta()[:2] == (10, offsets[partition])
        assert answers[partition].changed
    assert contents(answers[PARTITIONS - 1].store) == {}
    assert progress[-1].shards_done == progress[-1].shards_total == PARTITIONS
    assert progress[-1].offsets == progress[-1].offsets_total > progress[-1].records > 15


def test_state_committed_by_layers_is_restored_into_new_layers(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    state = ShardState(directory.open(changelog.shard(0)), ["s", "t"], EntriesMax(100), FlushLimits())
    for epoch in range(1, 8):
        for n in range(epoch):
            state.tables["s"].get(key(n))["epochs"] = [
                *state.tables["s"].get(key(n)).get("epochs", []),
                epoch,
            ]
            state.tables["t"].get(key(n)).update(text="é\n", half=epoch / 2)
        state.tables["t"].get(key(epoch - 2)).clear()
        delta = state.freeze(epoch)
        assert delta is not None
        if epoch % 3 == 0:
            changelog.abort(0, epoch, delta.changes)
            state.discard()
        else:
            state.commit(epoch, changelog.write(0, epoch, delta.changes), epoch)
    expected = {name: {key(n): table.peek(key(n)) for n in range(9)} for name, table in state.tables.items()}
    directory.destroy(changelog.shard(0))
    answer = restore(changelog.request(0, state.committed_epoch))[0]
    state = ShardState(answer.store, ["s", "t"], EntriesMax(100))
    assert state.committed_epoch == 7
    for name, table in state.tables.items():
        assert {key(n): table.peek(key(n)) for n in range(9)} == expected[name]
    assert expected["s"][key(0)] == {"epochs": [1, 2, 4, 5, 7]}


def test_aborted_deltas_are_not_applied_and_the_end_after_them_is_found(
    changelog: Changelog, restore: Restore
) -> None:
    changelog.abort(0, 1, {key(1): b"aborted"})
    offset = changelog.write(0, 2, {key(2): b"committed"})
    changelog.abort(0, 3, {key(3): b"aborted" * 100})
    answer = restore(changelog.request(0, 2))[0]
    assert contents(answer.store) == {key(2): b"committed"}
    assert answer.store.meta()[:2] == (2, offset)


def test_local_files_that_are_behind_read_only_what_they_lack(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    first = changelog.write(0, 1, {key(1): b"1", key(2): b"1"})
    changelog.write(0, 2, {key(2): b"2"})
    store = directory.open(changelog.shard(0))
    apply(store, 1, first, {key(1): b"local", key(2): b"1"})
    progress: list[RestoreProgress] = []
    answer = restore(changelog.request(0, 2), progress=progress.append)[0]
    assert (answer.store, answer.base, answer.changed) == (store, Base.LOCAL, True)
    assert contents(store) == {key(1): b"local", key(2): b"2"}
    assert progress[-1].records == 2  # and the last one that they have, to check that the changelog has it


def test_local_files_at_the_committed_epoch_are_left_alone(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    offset = changelog.write(0, 1, {key(1): b"1"})
    store = restore(changelog.request(0, 1))[0].store
    progress: list[RestoreProgress] = []
    answer = restore(changelog.request(0, 1), progress=progress.append)[0]
    assert (answer.store, answer.base, answer.changed) == (store, Base.LOCAL, False)
    assert progress[-1].records == 1  # the last one, to check that the changelog has it
    assert store.meta()[:2] == (1, offset)
    assert directory.opened(changelog.shard(0)) is store


def test_local_files_ahead_of_the_committed_epoch_are_rebuilt(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    offset = changelog.write(0, 1, {key(1): b"1"})
    apply(directory.open(changelog.shard(0)), 2, offset, {key(2): b"never committed"})
    answer = restore(changelog.request(0, 1))[0]
    assert answer.base is Base.NOTHING
    assert contents(answer.store) == {key(1): b"1"}
    assert "ahead of the committed epoch 1" in answer.reasons[0]


def test_damaged_local_files_are_rebuilt(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    apply(directory.open(changelog.shard(0)), 1, 1, {key(1): b"1"})
    directory.close(changelog.shard(0))
    for file in (directory.shard_path(changelog.shard(0)) / "db").glob("*.sst"):
        file.unlink()
    answer = restore(changelog.request(0, 1))[0]
    assert contents(answer.store) == {key(1): b"1"}
    assert "the local files can't be read" in answer.reasons


# --- snapshots --------------------------------------------------------------------------------------------


def with_two_snapshots(
    changelog: Changelog, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> dict[bytes, bytes]:
    """Epochs 1 to 4, snapshots after epochs 1 and 2. The changelog begins after epoch 1. No local files."""
    shard, expected, offsets = changelog.shard(0), dict[bytes, bytes](), list[int]()
    for epoch in range(1, 5):
        changes = {key(epoch): b"%d" % epoch, key(0): b"%d" % epoch}
        offsets.append(changelog.write(0, epoch, changes))
        expected.update(changes)
        apply(directory.open(shard), epoch, offsets[-1], changes)
        if epoch <= 2:
            take_snapshot(directory.open(shard), shard, snapshots)
    directory.destroy(shard)
    delete_records_before(changelog.admin, {TopicPartition(changelog.topic, 0): offsets[0]})
    return expected


def test_truncated_changelog_is_replayed_from_the_newest_snapshot(
    changelog: Changelog, restore: Restore, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> None:
    expected = with_two_snapshots(changelog, directory, snapshots)
    answer = restore(changelog.request(0, 4))[0]
    assert (answer.base, contents(answer.store)) == (Base.SNAPSHOT, expected)


def test_older_snapshot_is_used_if_the_newer_is_damaged(
    changelog: Changelog, restore: Restore, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> None:
    expected = with_two_snapshots(changelog, directory, snapshots)
    newest = latest_valid(snapshots, changelog.shard(0))
    assert newest is not None
    [unshared] = [file.hash for file in newest.files if file.name.startswith("MANIFEST")]
    (snapshots.root / "job" / "flights" / "0" / "files" / unshared).write_bytes(b"x")
    answer = restore(changelog.request(0, 4))[0]
    assert (answer.base, contents(answer.store)) == (Base.SNAPSHOT, expected)
    assert any("snapshot: the snapshot of flights/0 at epoch 2 is damaged" in r for r in answer.reasons)


def test_truncated_changelog_without_a_snapshot_is_an_error(
    changelog: Changelog, restore: Restore, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> None:
    with_two_snapshots(changelog, directory, snapshots)
    shutil.rmtree(snapshots.root / "job")
    with pytest.raises(StateDamaged, match="flights/0 at epoch 4 can't be restored"):
        restore(changelog.request(0, 4))


# --- what must not come back ------------------------------------------------------------------------------


def test_state_without_a_committed_offset_is_an_error_that_names_the_shard(
    changelog: Changelog, restore: Restore
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    with pytest.raises(StateDamaged, match=r"no committed offset for flights/0.*epoch 1") as error:
        restore(changelog.request(0, None))
    assert error.value.remedy


def test_shard_whose_first_epoch_was_aborted_is_fresh(changelog: Changelog, restore: Restore) -> None:
    changelog.abort(0, 1, {key(1): b"aborted"})
    answer = restore(changelog.request(0, None))[0]
    assert (answer.base, contents(answer.store)) == (Base.NOTHING, {})


def test_changelog_that_ends_before_the_committed_epoch_stops_that_shard_alone(
    changelog: Changelog, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    changelog.write(1, 1, {key(1): b"1"})
    stopped, restored = both(changelog, directory, snapshots, changelog.request(0, 3))
    assert "committed the offset 1000 with state of epoch 3, but not the delta" in str(stopped.error)
    assert "ends with epoch 1" in str(stopped.error)
    assert contents(restored.store) == {key(1): b"1"}


def test_changelog_that_goes_beyond_the_committed_epoch_stops_that_shard_alone(
    changelog: Changelog, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    changelog.write(0, 2, {key(1): b"2"})
    changelog.write(1, 1, {key(1): b"1"})
    stopped, restored = both(changelog, directory, snapshots, changelog.request(0, 1))
    assert "committed the delta of epoch 2" in str(stopped.error)
    assert "--set torn.transaction=offsets" in str(stopped.error)
    assert contents(restored.store) == {key(1): b"1"}


def both(
    changelog: Changelog,
    directory: StoreDirectory,
    snapshots: DirectorySnapshotStore,
    torn: RestoreRequest,
) -> tuple[ShardStopped, ShardRestored]:
    """Restore that shard and an undamaged one. Returns both results."""
    answers = list(
        restore_shards(
            [torn, changelog.request(1, 1)],
            directory=directory,
            snapshots=snapshots,
            settings=changelog.settings,
            stop=threading.Event(),
        )
    )
    [stopped] = [answer for answer in answers if isinstance(answer, ShardStopped)]
    [restored] = [answer for answer in answers if isinstance(answer, ShardRestored)]
    assert (stopped.shard, restored.shard) == (changelog.shard(0), changelog.shard(1))
    return stopped, restored


def test_local_files_at_the_committed_epoch_do_not_hide_a_later_delta(
    changelog: Changelog, restore: Restore
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    restore(changelog.request(0, 1))
    changelog.abort(0, 2, {key(1): b"aborted"})
    assert not restore(changelog.request(0, 1))[0].changed  # an aborted delta isn't a sign of damage
    changelog.write(0, 3, {key(1): b"3"})
    with pytest.raises(TornTransaction, match="committed the delta of epoch 3"):
        restore(changelog.request(0, 1))


def test_local_files_at_the_committed_epoch_do_not_hide_that_its_delta_was_aborted(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    restore(changelog.request(0, 1))
    offsets = changelog.begin(0, 2, {key(1): b"2"})
    changelog.producer.abort_transaction(30)
    apply(directory.open(changelog.shard(0)), 2, offsets[-1], {key(1): b"2"})  # as if it were committed
    with pytest.raises(TornTransaction, match="but not the delta of that epoch"):
        restore(changelog.request(0, 2))


def test_missing_delta_is_an_error_with_its_offset(changelog: Changelog, restore: Restore) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    changelog.write(0, 3, {key(1): b"3"}, previous=2)
    with pytest.raises(StateDamaged, match=f"{changelog.topic}/0 at offset .* epoch 3 follows epoch 2"):
        restore(changelog.request(0, 3))


def test_files_of_another_changelog_are_discarded_when_the_first_delta_shows_it(
    changelog: Changelog, restore: Restore, directory: StoreDirectory
) -> None:
    """Epoch and offset of the files look right. Only the first delta shows that they belong to another
    changelog."""
    changelog.write(0, 2, {key(1): b"2"})
    changelog.write(0, 5, {key(2): b"5"})
    directory.open(changelog.shard(0)).apply({key(9): b"of another life"}, StoreMeta(3, 0, ""))
    answer = restore(changelog.request(0, 5))[0]
    assert contents(answer.store) == {key(1): b"2", key(2): b"5"}
    assert answer.base is Base.NOTHING
    assert "epoch 2 follows epoch 0, but the state is at epoch 3" in "; ".join(answer.reasons)


def test_files_and_snapshots_of_a_deleted_changelog_are_not_used(
    changelog: Changelog, restore: Restore, directory: StoreDirectory, snapshots: DirectorySnapshotStore
) -> None:
    changelog.write(0, 1, {key(1): b"old"})
    store = restore(changelog.request(0, 1))[0].store
    assert store.meta().changelog_id
    take_snapshot(store, changelog.shard(0), snapshots)
    changelog.create_anew()
    changelog.write(0, 1, {key(2): b"new"})
    answer = restore(changelog.request(0, 1))[0]
    assert (answer.base, contents(answer.store)) == (Base.NOTHING, {key(2): b"new"})


# --- waiting ----------------------------------------------------------------------------------------------


def test_commit_whose_markers_are_still_missing_is_waited_for(changelog: Changelog, restore: Restore) -> None:
    """A former owner's commit may have returned before its markers reached the changelog."""
    changelog.write(0, 1, {key(1): b"1"})
    changelog.begin(0, 2, {key(1): b"2"})
    answers: dict[int, ShardRestored] = {}
    thread = threading.Thread(target=lambda: answers.update(restore(changelog.request(0, 2))))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    changelog.producer.commit_transaction(30)
    thread.join(30)
    assert contents(answers[0].store) == {key(1): b"2"}


def test_stopped_restore_ends_without_an_answer(changelog: Changelog, restore: Restore) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    stop = threading.Event()
    stop.set()
    assert restore(changelog.request(0, 1), stop=stop) == {}
    assert list(restore(changelog.request(0, 1))) == [0]


def test_unreachable_brokers_are_an_error_in_bounded_time(
    changelog: Changelog, restore: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcluster.storage.restore.ANSWER_TIMEOUT_S", 1.0)
    nowhere = resolve({}, None, {}, {"bootstrap.servers": "127.0.0.1:1"})
    with pytest.raises(KafkaUnavailable):
        restore(changelog.request(0, 1), settings=nowhere)


def test_broker_that_answers_but_sends_nothing_is_an_error_in_bounded_time(
    changelog: Changelog, restore: Restore
) -> None:
    changelog.write(0, 1, {key(1): b"1"})
    nowhere = resolve({}, None, {}, {"bootstrap.servers": "127.0.0.1:1"})
    with pytest.raises(KafkaUnavailable, match="no records came from the changelogs of flights/0"):
        restore(changelog.request(0, 1), settings=nowhere, admin=changelog.admin, stall_timeout_s=0.5)


# --- at least once ----------------------------------------------------------------------------------------


def test_at_least_once_deltas_that_are_too_new_incomplete_or_repeated_are_accepted(
    settings: Settings, changelog: Changelog, restore: Restore
) -> None:
    plain = make_producer(settings)
    first, second = Delta(1, 0, {key(1): b"1"}), Delta(2, 1, {key(1): b"2", key(2): b"x" * 300})
    changelog.produce(plain, 0, first)
    records = encode_delta(second, 200)
    plain.produce(changelog.topic, records[0], partition=0)  # the worker crashed here
    plain.flush(30)
    changelog.produce(plain, 0, second)
    changelog.produce(plain, 0, second)
    changelog.produce(plain, 0, Delta(3, 2, {key(3): b"3"}))  # and it crashed again here, before the offsets
    relaxed = replace(settings, processing_guarantee="at-least-once")
    answer = restore(changelog.request(0, 2), settings=relaxed)[0]
    assert contents(answer.store) == {key(1): b"2", key(2): b"x" * 300, key(3): b"3"}
    assert answer.store.meta().state_epoch == 3
    again = restore(changelog.request(0, 2), settings=relaxed)[0]
    assert (again.base, again.changed) == (Base.LOCAL, False)
    fresh = restore(changelog.request(1, None), settings=relaxed)[1]
    assert contents(fresh.store) == {}
