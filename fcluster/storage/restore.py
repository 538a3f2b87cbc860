"""Brings the state of shards to exactly the epoch that Kafka committed.

Responsible for: carrying out restore plans: local files, otherwise a snapshot, then the changelog, which one
consumer reads for all shards. Invariant 1: a shard is handed over only at its committed epoch, which is
checked with each delta and at the end. Any mismatch raises StateDamaged; a shard in another state is never
returned. In exactly-once mode the end of every changelog is read, even if none of it is needed, because it
shows whether Kafka has torn the last transaction (see `torn`). Must not read committed offsets itself. Must
not run before the shard's previous owner was fenced or has released it.

Every wait is bounded: `stop` is checked several times a second, and a broker that is silent for too long is
an error. Threads: at most one at a time for each shard of a StoreDirectory. Several threads copy snapshots.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import FclusterError, KafkaUnavailable, StateDamaged, TornTransaction
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings, TornPolicy
from fcluster.engine.changelog import RESET_REMEDY, UNKNOWN_SOURCE_OFFSET, DeltaReader, parse_record
from fcluster.engine.state import StoreMeta
from fcluster.kafka.asking import ANSWER_TIMEOUT_S, ATTEMPT_TIMEOUT_S, ask_until_known, reason_of
from fcluster.kafka.clients import LASTING, make_admin, make_consumer
from fcluster.kafka.offsets import begin_offsets, settled_end_offsets
from fcluster.storage.manifest import Manifest, same_changelog
from fcluster.storage.restore_plan import (
    Base,
    RestorePlan,
    RestoreRequest,
    plan_restore,
    stands_exactly,
    uncommitted_state,
)
from fcluster.storage.snapshot_store import SnapshotStore
from fcluster.storage.snapshots import Unusable, restore_snapshot, usable_manifests
from fcluster.storage.store import RocksStore, StoreDirectory
from fcluster.storage.torn import UNKNOWN_EPOCH, GoOn, Tear, TornShard, go_on

__all__ = [
    "RestoreProgress",
    "RestoreRequest",
    "ShardRestored",
    "ShardStopped",
    "plan_restore",
    "restore_shards",
]

STALL_TIMEOUT_S: Final = 60.0
"""If a broker sends nothing for this long, the restore ends."""

_POLL_S: Final = 0.1
_BASES_AT_A_TIME: Final = max(4, min(16, os.cpu_count() or 1))
_POLL_RECORDS: Final = 500
_BATCH_BYTES: Final = 4 * 1024 * 1024
_CONSUMER: Final = {
    "enable.partition.eof": True,
    "fetch.wait.max.ms": 2,  # the end of a partition is reported only after such a wait
    "queued.max.messages.kbytes": 16 * 1024,
    "fetch.message.max.bytes": 4 * 1024 * 1024,
    # Otherwise it may know only a broker that is cut off from the others, and wait for that broker's end of a
    # changelog until the stall timeout.
    **LASTING,
}
_NO_TOPIC_ID: Final = "A" * 22
"""The answer of brokers without topic ids: 16 zero bytes in base 64."""
_BASE_IS_GONE: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})
_PARTITION_EOF: Final = KafkaError._PARTITION_EOF


@dataclass(frozen=True, slots=True)
class ShardRestored:
    """A shard's store is at its committed epoch.

    Attributes:
        changed: whether the store had to be changed. If not, its contents in memory are still valid.
        base: what the restore started from.
        reasons: why better bases were rejected.
        base_epoch: the epoch of the base.
        records: how many changelog records were read to get from the base to the committed epoch.
        go_on: how the shard continues after a torn transaction. None: Kafka has torn nothing.
    """

    shard: ShardId
    store: RocksStore
    changed: bool
    base: Base
    reasons: tuple[str, ...]
    base_epoch: int = 0
    records: int = 0
    go_on: GoOn | None = None

    def describe(self) -> str:
        """A line for the log."""
        epoch = self.store.meta().state_epoch
        return (
            f"{self.shard} is at epoch {epoch}: from {self.base.value} at epoch {self.base_epoch}, "
            f"{self.records} records of the changelog"
        )


@dataclass(frozen=True, slots=True)
class ShardStopped:
    """A shard whose transaction Kafka has torn. The user has to choose how it continues."""

    shard: ShardId
    error: TornTransaction


@dataclass(frozen=True, slots=True)
class RestoreProgress:
    """The progress of a restore.

    `offsets` of `offsets_total` offsets of the changelogs have been passed. `bytes` is how much was read of
    snapshots (`snapshot_bytes_left` are left) and of the changelog (`records`, with `record_bytes`).
    """

    shards_done: int
    shards_total: int
    records: int
    bytes: int
    offsets: int
    offsets_total: int
    record_bytes: int = 0
    snapshot_bytes_left: int = 0

    @property
    def bytes_left(self) -> int:
        """An estimate. It assumes that the rest of the changelog is like the part that was read. -1 if
        nothing was read yet.
        """
        offsets_left = max(0, self.offsets_total - self.offsets)
        if not offsets_left:
            return self.snapshot_bytes_left
        if not self.offsets:
            return -1
        return self.snapshot_bytes_left + round(self.record_bytes / self.offsets * offsets_left)


def restore_shards(
    requests: Sequence[RestoreRequest],
    *,
    directory: StoreDirectory,
    snapshots: SnapshotStore,
    settings: Settings,
    stop: threading.Event,
    admin: AdminClient | None = None,
    consumer: Consumer | None = None,
    progress: Callable[[RestoreProgress], None] | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> Iterator[ShardRestored | ShardStopped]:
    """Restore shards, and yield each one as soon as it is ready. Shards with usable local files come first.

    Args:
        requests: what Kafka committed for each shard, read after its previous owner was fenced or had
            released it.
        directory: this worker's state directory. Stores that are open in it stay open if they can be used.
        snapshots: only read from.
        settings: the cluster's settings.
        stop: when set, the iterator ends early.
        admin: for requests to the brokers. One is created if none is given.
        consumer: from `changelog_consumer`. It has no assignment before and after the call. If none is given,
            one is created, which has to connect first.
        progress: called after each batch of records, and around each snapshot, by any thread.
        stall_timeout_s: if the brokers send nothing for this many seconds, it is an error.

    Raises:
        StateDamaged: a shard can't be brought to its committed epoch.
        KafkaUnavailable: the brokers don't answer.
        FclusterError: the state directory can't be used.
    """
    if not requests:
        return
    if admin is None:  # the truth value of a client is the length of its queue
        admin = make_admin(settings)
    restore = _Restore(directory, snapshots, settings, stop, admin, consumer, progress, stall_timeout_s)
    try:
        yield from restore.run(requests)
    finally:
        restore.close()


def changelog_consumer(settings: Settings) -> Consumer:
    """A consumer for `restore_shards`.

    Raises:
        SettingsError: librdkafka rejects a setting.
    """
    # This also applies in at-least-once mode: the job may have run exactly-once before, and aborted.
    return make_consumer(settings, "read-committed", **_CONSUMER)


class _Shard:
    """A shard that is being restored: its base is in place, and its changelog is being read.

    In exactly-once mode, reading begins with the last record that the base contains, to check that it exists,
    and goes to the changelog's end, to check that there are no others.
    """

    def __init__(
        self,
        request: RestoreRequest,
        plan: RestorePlan,
        store: RocksStore,
        settings: Settings,
        changelog_begin: int,
        changelog_end: int,
    ) -> None:
        self.request = request
        self.plan = plan
        self.store = store
        self.records = 0
        self._exactly_once = settings.processing_guarantee == "exactly-once"
        self._policy: TornPolicy = settings.torn_transaction
        self._reader = DeltaReader(
            f"{request.changelog}/{request.shard.partition}",
            plan.meta.state_epoch,
            exactly_once=self._exactly_once,
        )
        self._meta = plan.meta._replace(changelog_id=request.changelog_id or plan.meta.changelog_id)
        self._changes: dict[bytes, bytes] = {}
        self._changes_bytes = 0
        behind_base = plan.meta.changelog_offset
        self.offset, self.read_to = behind_base, plan.read_to
        self._base_record = -1
        """The offset of the base's last record. Reset once that record was seen."""
        self._base_is_there = True
        self._beyond: list[int] = []
        """The epochs of deltas beyond the committed one."""
        self._source_offset = UNKNOWN_SOURCE_OFFSET
        self._further_offsets: Mapping[str, int] = {}
        """The inputs' offsets in the last delta that was seen."""
        if self._exactly_once and request.committed is not None:
            self.read_to = changelog_end
            # Records that a snapshot made superfluous may have been deleted.
            if plan.meta.state_epoch > 0 and changelog_begin < behind_base <= changelog_end:
                self._base_record = self.offset = behind_base - 1
            elif changelog_end <= behind_base + 1:
                self.read_to = self.offset  # there is only room for the mark of a commit

    def feed(self, offset: int, record: bytes | None) -> None:
        """Take the next record of the changelog."""
        self.offset = offset + 1
        if offset == self._base_record:
            self._look_at_base(record)
            return
        self._miss_base()
        delta = self._reader.feed(offset, record)
        self.records += 1
        if delta is None:
            return
        if self._exactly_once and delta.epoch > self.request.target_epoch:
            if self.request.committed is None:
                raise uncommitted_state(self.request, f"epoch {delta.epoch}")
            self._beyond.append(delta.epoch)
        self._source_offset, self._further_offsets = delta.source_offset, delta.further_offsets
        if self._beyond and self._policy != "delta":
            return  # the delta is not applied
        self._changes.update(delta.changes)
        self._changes_bytes += len(record or b"")
        self._meta = self._meta._replace(state_epoch=self._reader.state_epoch, changelog_offset=offset + 1)
        if self._changes_bytes >= _BATCH_BYTES:
            self._write()

    def _look_at_base(self, record: bytes | None) -> None:
        self._base_record = -1
        try:
            seen = parse_record(record)
        except ValueError as error:
            raise self._misplaced(str(error)) from error
        if seen.epoch != self.plan.meta.state_epoch or not seen.is_last:
            raise self._misplaced(f"it has part {seen.part} of epoch {seen.epoch} there")
        self._source_offset, self._further_offsets = seen.source_offset, seen.further_offsets

    def _misplaced(self, what: str) -> StateDamaged:
        return StateDamaged(
            f"the delta of epoch {self.plan.meta.state_epoch} isn't at the place in the changelog "
            f"{self.request.changelog} that the {self.plan.base.value} of {self.request.shard} recorded: "
            f"{what}",
            remedy=RESET_REMEDY,
        )

    def _miss_base(self) -> None:
        """The next record is after the base's last record. If that one wasn't seen, it isn't visible."""
        if self._base_record >= 0:
            self._base_record, self._base_is_there = -1, False

    def end(self) -> TornShard | None:
        """The end of the changelog. Returns what Kafka has torn, or None if delta and offset belong together.

        Raises:
            StateDamaged: it ends within a delta.
        """
        self._reader.finish()
        self._miss_base()
        return self._torn()

    def finish(self, torn: TornShard | None) -> ShardRestored:
        """Check that the state is the committed one, or the one that the user has chosen, and write it.

        Raises:
            TornTransaction: the user has to choose how the shard continues.
            StateDamaged: the state isn't that of the committed epoch.
        """
        chosen = None if torn is None else go_on(torn, self._policy)
        epoch, target = self._meta.state_epoch, self.request.target_epoch
        if chosen is not None:
            state_epoch = chosen.position.state_epoch
            self._meta = self._meta._replace(state_epoch=state_epoch)
            if chosen.rebase:
                self._meta = self._meta._replace(changelog_offset=self.read_to)
        elif epoch < target or (self._exactly_once and epoch != target):
            raise StateDamaged(
                f"the changelog {self.request.changelog} of {self.request.shard} ends at epoch {epoch}, but "
                f"Kafka committed state of epoch {target}",
                remedy=RESET_REMEDY,
            )
        changed = self.store.meta() != self._meta or self.plan.base is not Base.LOCAL
        if self._changes or self.store.meta() != self._meta:
            self._write()
        return ShardRestored(
            shard=self.request.shard,
            store=self.store,
            changed=changed,
            base=self.plan.base,
            reasons=self.plan.reasons,
            base_epoch=self.plan.meta.state_epoch,
            records=self.records,
            go_on=chosen,
        )

    def _torn(self) -> TornShard | None:
        """What Kafka has torn. None if delta and offset belong together."""
        committed, target = self.request.committed, self.request.target_epoch
        if not self._exactly_once or committed is None:
            return None
        visible = self._meta.state_epoch

        def torn(tear: Tear, epoch: int) -> TornShard:
            return TornShard(
                self.request.shard,
                self.request.changelog,
                tear,
                committed,
                epoch,
                self._source_offset,
                further_topics=self.request.further_topics,
                delta_further_offsets=self._further_offsets,
            )

        if self._beyond:
            return torn(Tear.DELTA_WITHOUT_OFFSET, self._beyond[-1])
        if visible < target:
            return torn(Tear.OFFSET_WITHOUT_DELTA, visible)
        if self.plan.meta.state_epoch == target and not self._base_is_there:
            return replace(
                torn(Tear.OFFSET_WITHOUT_DELTA, UNKNOWN_EPOCH),
                delta_source_offset=UNKNOWN_SOURCE_OFFSET,
                has_state=True,
            )
        return None

    def _write(self) -> None:
        self.store.apply(self._changes, self._meta)
        self._changes, self._changes_bytes = {}, 0


class _Restore:
    """One call of `restore_shards`."""

    def __init__(
        self,
        directory: StoreDirectory,
        snapshots: SnapshotStore,
        settings: Settings,
        stop: threading.Event,
        admin: AdminClient,
        consumer: Consumer | None,
        progress: Callable[[RestoreProgress], None] | None,
        stall_timeout_s: float,
    ) -> None:
        self._directory = directory
        self._snapshots = snapshots
        self._settings = settings
        self._stop = stop
        self._report = progress
        self._stall_timeout_s = stall_timeout_s
        self._exactly_once = settings.processing_guarantee == "exactly-once"
        self._admin = admin
        self._consumer = consumer
        self._consumer_is_ours = consumer is None
        self._reading: dict[tuple[str, int], _Shard] = {}
        # What turned out not to lead to the committed epoch, by shard: the epochs of bases, each with the
        # error.
        self._failed: dict[ShardId, dict[tuple[Base, int], StateDamaged]] = {}
        self._done = self._total = self._records = self._bytes = self._offsets_total = 0
        self._offsets_passed = 0
        self._snapshot_bytes = self._snapshot_bytes_left = 0
        self._counting = threading.Lock()

    def close(self) -> None:
        if self._consumer is None:
            return
        if self._consumer_is_ours:
            self._consumer.close()
        elif self._reading:
            self._consumer.incremental_unassign([TopicPartition(*at) for at in self._reading])

    def run(self, requests: Sequence[RestoreRequest]) -> Iterator[ShardRestored | ShardStopped]:
        self._total = len(requests)
        unidentified = sorted({request.changelog for request in requests if not request.changelog_id})
        ids = topic_ids(self._admin, unidentified)
        identified = [
            replace(request, changelog_id=request.changelog_id or ids.get(request.changelog, ""))
            for request in requests
        ]
        for request in identified:
            local = local_meta(self._directory, request.shard)
            if self._exactly_once and local is not None and stands_exactly(request, local):
                _remember_changelog(self._directory.open(request.shard), request)
        yield from self._begin(identified)
        while self._reading and not self._stop.is_set():
            yield from self._read()

    def _begin(self, requests: Sequence[RestoreRequest]) -> Iterator[ShardRestored | ShardStopped]:
        """Put the bases of these shards in place, and start to read their changelogs."""
        partitions = [TopicPartition(request.changelog, request.shard.partition) for request in requests]
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(begin_offsets, self._admin, partitions)
            ends = settled_end_offsets(self._admin, partitions)
            begins = asked.result()
        for request, shard in self._put_bases(
            [(request, begins[at], ends[at]) for request, at in zip(requests, partitions, strict=True)]
        ):
            if self._stop.is_set():
                return
            self._offsets_total += max(0, shard.read_to - shard.offset)
            if shard.read_to > shard.offset:
                self._reading[request.changelog, request.shard.partition] = shard
                self._reader().incremental_assign(
                    [TopicPartition(request.changelog, request.shard.partition, shard.offset)]
                )
            else:
                yield from self._finish(shard)

    def _put_bases(
        self, requests: Sequence[tuple[RestoreRequest, int, int]]
    ) -> Iterator[tuple[RestoreRequest, _Shard]]:
        """Several are put in parallel, because copying files means waiting for disks and networks."""
        if len(requests) == 1:
            yield requests[0][0], self._put_base(*requests[0])
            return
        pool = ThreadPoolExecutor(_BASES_AT_A_TIME, thread_name_prefix="restore-base")
        try:
            shards = [pool.submit(self._put_base, *request) for request in requests]
            for (request, _, _), shard in zip(requests, shards, strict=True):
                yield request, shard.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _put_base(self, request: RestoreRequest, begin: int, end: int) -> _Shard:
        """Plan, and turn the base into the shard's store. A damaged base is skipped."""
        shard = request.shard
        while True:
            meta = local_meta(self._directory, shard)
            failed = self._failed.setdefault(shard, {})
            if meta is not None and (Base.LOCAL, meta.state_epoch) in failed:
                meta = None
            unusable: list[Unusable] = []
            manifests = [
                manifest
                for manifest in usable_manifests(self._snapshots, shard, unusable)
                if (Base.SNAPSHOT, manifest.state_epoch) not in failed
            ]
            plan = plan_restore(request, meta, manifests, begin, end, exactly_once=self._exactly_once)
            if (plan.base, plan.meta.state_epoch) in failed:
                raise failed[plan.base, plan.meta.state_epoch]
            try:
                with self._counted(plan.snapshot) as copied:
                    store = place_base(plan, shard, self._directory, self._snapshots, copied)
            except StateDamaged as error:
                failed[plan.base, plan.meta.state_epoch] = error
                continue
            reasons = tuple(f"{base.value}: {error.message}" for (base, _), error in failed.items())
            reasons += tuple(f"snapshot {entry.name}: {entry.reason}" for entry in unusable)
            plan = replace(plan, reasons=plan.reasons + reasons)
            return _Shard(request, plan, store, self._settings, begin, end)

    @contextlib.contextmanager
    def _counted(self, snapshot: Manifest | None) -> Generator[Callable[[int], None]]:
        """Count a snapshot's bytes, first as pending and then as copied. Returns a function to call with the
        size of each piece.
        """
        size_bytes = 0 if snapshot is None else snapshot.size_bytes
        counted_bytes = 0

        def move(moved_bytes: int) -> None:
            nonlocal counted_bytes
            counted_bytes += moved_bytes
            with self._counting:
                self._snapshot_bytes_left -= moved_bytes
                self._snapshot_bytes += moved_bytes
            self._tell_progress()

        with self._counting:
            self._snapshot_bytes_left += size_bytes
        self._tell_progress()
        try:
            yield move
            move(size_bytes - counted_bytes)
        except BaseException:
            move(-counted_bytes)  # it has to be copied again, or another base has
            with self._counting:
                self._snapshot_bytes_left -= size_bytes
            raise

    def _read(self) -> Iterator[ShardRestored | ShardStopped]:
        """Take one batch of records, from any partition."""
        deadline_s = time.monotonic() + self._stall_timeout_s
        messages: list[Message] = []
        while not messages:
            if self._stop.is_set():
                return
            # consume() alone would wait for that many records, or for the whole time.
            first = self._reader().poll(_POLL_S)
            if first is not None:
                messages = [first, *self._reader().consume(_POLL_RECORDS, 0)]
            elif time.monotonic() > deadline_s:
                raise self._stalled()
        reading = dict(self._reading)
        for message in messages:
            at = (message.topic() or "", _number(message.partition()))
            shard = reading.get(at)
            if shard is None:
                self._check_error(message.error())
            elif self._reading.get(at) is shard:  # otherwise it is done, or has started again
                yield from self._take(shard, message)
        self._tell_progress()

    def _take(self, shard: _Shard, message: Message) -> Iterator[ShardRestored | ShardStopped]:
        error, offset = message.error(), _number(message.offset())
        try:
            if error is None:
                value: bytes | None = message.value()
                if offset < shard.read_to:
                    self._records += 1
                    self._bytes += len(value or b"")
                    self._offsets_passed += offset + 1 - shard.offset
                    shard.feed(offset, value)
                ended = offset + 1 >= shard.read_to
            elif error.code() in _BASE_IS_GONE:
                raise StateDamaged(f"the changelog of {shard.request.shard} has no offset {shard.offset}")
            else:
                self._check_error(error)
                # The mark of the commit comes after the last record, and isn't returned to us.
                ended = error.code() == _PARTITION_EOF and offset >= shard.read_to
            if ended:
                yield from self._finish(shard)
        except StateDamaged as damage:
            yield from self._begin_anew(shard, damage)

    def _finish(self, shard: _Shard) -> Iterator[ShardRestored | ShardStopped]:
        try:
            torn = shard.end()
            if torn is not None and self._another_base_fits(shard.request, torn):
                yield from self._begin_anew(shard, torn.error())
                return
            restored = shard.finish(torn)
        except TornTransaction as error:
            self._stop_reading(shard)
            self._done += 1
            yield ShardStopped(shard.request.shard, error)
            return
        except StateDamaged as damage:
            yield from self._begin_anew(shard, damage)
            return
        self._stop_reading(shard)
        self._offsets_passed += max(0, shard.read_to - shard.offset)
        self._done += 1
        yield restored

    def _another_base_fits(self, request: RestoreRequest, torn: TornShard) -> bool:
        """Whether another base is the one that the user wants to continue with, and not this one."""
        if torn.tear is not Tear.OFFSET_WITHOUT_DELTA:
            return False
        if self._settings.torn_transaction == "delta":  # the base holds changes of no existing delta
            return torn.has_state
        if self._settings.torn_transaction == "offsets" and not torn.has_state:  # a snapshot may hold them
            failed = self._failed.get(request.shard, {})
            return (Base.SNAPSHOT, request.target_epoch) not in failed and any(
                manifest.state_epoch == request.target_epoch
                and same_changelog(manifest.changelog_id, request.changelog_id)
                for manifest in usable_manifests(self._snapshots, request.shard)
            )
        return False

    def _begin_anew(self, shard: _Shard, damage: StateDamaged) -> Iterator[ShardRestored | ShardStopped]:
        """The base doesn't lead to the committed epoch. Try the next one, if there is one.

        Files of an earlier run of the job may seem to fit until the first delta is read.
        """
        self._stop_reading(shard)
        base = (shard.plan.base, shard.plan.meta.state_epoch)
        failed = self._failed.setdefault(shard.request.shard, {})
        if shard.plan.base is Base.NOTHING or base in failed:
            raise damage
        failed[base] = damage
        self._directory.destroy(shard.request.shard)
        try:
            yield from self._begin([shard.request])
        except StateDamaged as error:
            # The first error says more than that no other base was left.
            raise damage from error

    def _stop_reading(self, shard: _Shard) -> None:
        at = (shard.request.changelog, shard.request.shard.partition)
        if self._reading.pop(at, None) is not None:
            self._reader().incremental_unassign([TopicPartition(*at)])

    def _reader(self) -> Consumer:
        if self._consumer is None:
            self._consumer = changelog_consumer(self._settings)
        return self._consumer

    def _check_error(self, error: KafkaError | None) -> None:
        """Raise errors that aren't temporary. The stall timeout handles the others."""
        if error is None or error.code() == _PARTITION_EOF or error.retriable():
            return
        passing = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT}
        if error.code() not in passing:
            raise KafkaUnavailable(
                f"can't read a changelog: {error.str()}",
                remedy="Check the brokers, and that this user may read the job's topics.",
            )

    def _stalled(self) -> FclusterError:
        names = ", ".join(str(shard.request.shard) for shard in self._reading.values())
        return KafkaUnavailable(
            f"no records came from the changelogs of {names} for {self._stall_timeout_s:g} s",
            remedy="Check the brokers. The restore is repeated.",
        )

    def _tell_progress(self) -> None:
        if self._report is not None:
            self._report(
                RestoreProgress(
                    self._done,
                    self._total,
                    self._records,
                    self._bytes + self._snapshot_bytes,
                    self._offsets_passed,
                    self._offsets_total,
                    self._bytes,
                    self._snapshot_bytes_left,
                )
            )


def local_store(directory: StoreDirectory, shard: ShardId) -> RocksStore | None:
    """The store of `shard`, empty if it has none. None if its files can't be used."""
    try:
        return directory.open(shard)
    except StateDamaged:
        return None


def local_meta(directory: StoreDirectory, shard: ShardId) -> StoreMeta | None:
    """The position of the local files of `shard`. It has no epoch if there are no files. None if they can't
    be used.
    """
    if not directory.has_files(shard):
        return StoreMeta()
    store = local_store(directory, shard)
    return None if store is None else store.meta()


def place_base(
    plan: RestorePlan,
    shard: ShardId,
    directory: StoreDirectory,
    snapshots: SnapshotStore,
    copied: Callable[[int], None] = lambda _copied_bytes: None,
) -> RocksStore:
    """Turn the plan's base into the store of `shard`. `copied` is called with the size of each piece of a
    snapshot, in bytes.

    Raises:
        StateDamaged: the base is damaged.
        FclusterError: it can't be written here.
    """
    if plan.base is Base.LOCAL:
        return directory.open(shard)
    if plan.snapshot is not None:
        return restore_snapshot(snapshots, shard, plan.snapshot, directory, copied)
    local = local_store(directory, shard)
    if local is None or local.meta() != StoreMeta():
        directory.destroy(shard)
    return directory.open(shard)


def _remember_changelog(store: RocksStore, request: RestoreRequest) -> None:
    meta = store.meta()
    if request.changelog_id and not meta.changelog_id:
        store.apply({}, meta._replace(changelog_id=request.changelog_id))


def topic_ids(admin: AdminClient, topics: Sequence[str]) -> dict[str, str]:
    """The id of each topic. A topic that is deleted and created again has another id."""
    if not topics:
        return {}
    client: Any = admin  # the client's own types don't say what the futures return

    def ask() -> dict[str, str]:
        futures = client.describe_topics(TopicCollection(list(topics)), request_timeout=ATTEMPT_TIMEOUT_S)
        return {topic: str(future.result().topic_id) for topic, future in futures.items()}

    try:
        found = ask_until_known(ask, ANSWER_TIMEOUT_S)
    except KafkaException as error:
        raise KafkaUnavailable(
            f"can't describe the changelogs {', '.join(topics)}: {reason_of(error)}",
            remedy="Check that they exist, that the brokers are up, and that this user may describe topics.",
        ) from error
    return {topic: "" if topic_id == _NO_TOPIC_ID else topic_id for topic, topic_id in found.items()}


def _number(number: int | None) -> int:
    return -1 if number is None else number
