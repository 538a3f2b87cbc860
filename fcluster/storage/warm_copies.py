"""Warm copies of other workers' shards: follows their changelogs, so that a takeover has next to nothing to
read.

Responsible for: one background thread with one consumer for all copies. It puts a base in place (local files,
otherwise a snapshot), then applies committed deltas in batches, each checked as in a restore. Rule: one owner
at a time. A copy's store belongs to this module until `take` returns, and from then on to the caller, still
open. Must not decide whether a copy is right: the restore checks it against the committed epoch. An error
that another attempt may fix is never fatal here.

Threads: only the restoring thread calls `keep`, `take` and `close`. Any thread may call `statuses`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import FclusterError, StateDamaged, failure_of
from fcluster.common.failures import Failure, FailureKind
from fcluster.common.ids import ShardId
from fcluster.common.offsets import offset_or_none
from fcluster.common.settings import Settings
from fcluster.engine.changelog import DeltaReader
from fcluster.engine.state import StoreMeta
from fcluster.kafka.clients import LASTING, make_consumer
from fcluster.kafka.offsets import begin_offsets, end_offsets
from fcluster.storage.restore import local_meta, place_base, topic_ids
from fcluster.storage.restore_plan import Base, RestorePlan, plan_standby
from fcluster.storage.snapshot_store import SnapshotStore
from fcluster.storage.snapshots import usable_manifests
from fcluster.storage.store import DISK_TROUBLE, RocksStore, StoreDirectory
from fcluster.wire.messages import StandbyStatus

_log = logging.getLogger("fcluster.worker")

BATCH_BYTES_MAX: Final = 1024 * 1024
BATCH_ENTRIES_MAX: Final = 20_000
BATCH_AGE_MAX_S: Final = 1.0
RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 30.0
_POLL_S: Final = 0.5
_POLL_RECORDS: Final = 100
_CONSUMER: Final = {"enable.partition.eof": True, "queued.max.messages.kbytes": 8 * 1024, **LASTING}
_BASE_IS_GONE: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})

_Place = tuple[str, int]


class _Copy:
    """A warm copy, from its request to its end.

    Attributes:
        store: None if there is none: the base isn't in place yet, or turned out to be useless.
        opening: whether the thread is putting the base in place. Then no other thread may touch the shard's
            files.
        position: the offset up to which the changelog was read. `end` is its end when it was last checked, -1
            if unknown.
        failed: bases that didn't work.
    """

    def __init__(
        self, shard: ShardId, changelog: str, directory: StoreDirectory, *, exactly_once: bool
    ) -> None:
        self.shard = shard
        self.place: _Place = (changelog, shard.partition)
        self.directory = directory
        self.store: RocksStore | None = None
        self.base: tuple[Base, int] = (Base.NOTHING, 0)
        self.opening = False
        self.position = 0
        self.end = -1
        self.meta = StoreMeta()
        self.failed: set[tuple[Base, int]] = set()
        self.failures = 0
        self.retry_at_s = 0.0
        self._exactly_once = exactly_once
        self._reader = DeltaReader("", 0)
        self._changes: dict[bytes, bytes] = {}
        self._changes_bytes = 0
        self._changed_s = 0.0

    @property
    def status(self) -> StandbyStatus:
        lag = -1 if self.store is None or self.end < 0 else max(0, self.end - self.position)
        return StandbyStatus(self.shard, self.meta.state_epoch, lag)

    def begin(self, store: RocksStore, plan: RestorePlan, changelog_id: str) -> None:
        """The base is in place; the changelog comes next."""
        self.store = store
        self.base = (plan.base, plan.meta.state_epoch)
        self.meta = plan.meta._replace(changelog_id=changelog_id or plan.meta.changelog_id)
        self.position, self.end = self.meta.changelog_offset, -1
        topic, partition = self.place
        name = f"{topic}/{partition}"
        self._reader = DeltaReader(name, self.meta.state_epoch, exactly_once=self._exactly_once)
        self._changes, self._changes_bytes = {}, 0

    def feed(self, offset: int, record: bytes | None) -> None:
        """Take the next record. Raises StateDamaged if it doesn't follow the previous one."""
        if offset < self.position:
            return  # the record was in flight when the copy started again
        delta = self._reader.feed(offset, record)
        self.position = offset + 1
        if delta is None:
            return
        if not self._changes:
            self._changed_s = time.monotonic()
        self._changes.update(delta.changes)
        self._changes_bytes += len(record or b"")
        self.meta = self.meta._replace(state_epoch=self._reader.state_epoch, changelog_offset=offset + 1)
        if self._changes_bytes >= BATCH_BYTES_MAX or len(self._changes) >= BATCH_ENTRIES_MAX:
            self.write()

    def write_if_old(self) -> None:
        if self._changes and time.monotonic() - self._changed_s >= BATCH_AGE_MAX_S:
            self.write()

    def write(self) -> None:
        """Bring the store to the copy's position. A failed write loses nothing of what it had to write."""
        if self.store is not None and self.store.meta() != self.meta:
            self.store.apply(self._changes, self.meta)
        self._changes, self._changes_bytes = {}, 0


class StandbyTail:
    """All warm copies of this worker.

    Args:
        settings: the resolved settings.
        snapshots: only read from.
        admin: for requests to the brokers.
        disk_failed: called from the thread with the reason when the disk is full or fails. The worker's own
            shards are on the same disk, and would fail next.
    """

    def __init__(
        self,
        settings: Settings,
        snapshots: SnapshotStore,
        admin: AdminClient,
        disk_failed: Callable[[Failure], None] | None = None,
    ) -> None:
        self._settings = settings
        self._snapshots = snapshots
        self._admin = admin
        self._disk_failed = disk_failed
        self._exactly_once = settings.processing_guarantee == "exactly-once"
        # Guards the copies and everything that belongs to them.
        self._changed = threading.Condition()
        self._copies: dict[ShardId, _Copy] = {}
        self._closed = False
        self._consumer: Consumer | None = None
        self._assigned: dict[_Place, _Copy] = {}
        self._thread = threading.Thread(target=self._run, name="standbys", daemon=True)

    # --- called by the restore thread -------------------------------------------------------------------

    @property
    def shards(self) -> set[ShardId]:
        """The shards with copies, or with requested ones."""
        with self._changed:
            return set(self._copies)

    def keep(self, directory: StoreDirectory, changelogs: Mapping[ShardId, str]) -> None:
        """Keep copies of these shards from now on, in addition to the present ones.

        Args:
            directory: of this worker.
            changelogs: the changelog topic of each shard. Nothing else may use the stores of these shards.
        """
        with self._changed:
            for shard, changelog in changelogs.items():
                if shard not in self._copies:
                    copy = _Copy(shard, changelog, directory, exactly_once=self._exactly_once)
                    self._copies[shard] = copy
            self._changed.notify_all()
        if changelogs and self._thread.ident is None:
            self._thread.start()

    def take(self, targets: Mapping[ShardId, int], patience_s: float) -> int:
        """Hand over these shards. Their stores, as far as they exist, stay open and belong to the caller.

        Args:
            targets: by shard, the state epoch that the caller needs. This consumer is faster than a new one,
                which would have to connect first, so copies that are set up get a moment to reach it.
            patience_s: how long that moment is.

        Returns:
            How many of them are at the epoch that the caller needs.
        """
        deadline_s = time.monotonic() + patience_s
        with self._changed:
            mine = [copy for shard in targets if (copy := self._copies.get(shard)) is not None]
            self._changed.wait_for(lambda: not any(copy.opening for copy in mine))
            behind = [copy for copy in mine if copy.store is not None and copy.end >= 0]
            self._changed.wait_for(
                lambda: all(
                    copy.store is None or copy.meta.state_epoch >= targets[copy.shard] for copy in behind
                ),
                max(0.0, deadline_s - time.monotonic()),
            )
            self._changed.wait_for(lambda: not any(copy.opening for copy in mine))
            warm = 0
            for copy in mine:
                del self._copies[copy.shard]
                warm += copy.store is not None and copy.meta.state_epoch >= targets[copy.shard]
                self._write(copy)
                copy.store = None
            return warm

    def statuses(self) -> list[StandbyStatus]:
        """The progress of each copy."""
        with self._changed:
            return [copy.status for _, copy in sorted(self._copies.items())]

    def close(self) -> None:
        """Write what hasn't been written yet, and stop the thread. The stores stay open."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        for copy in self._copies.values():
            self._write(copy)
        self._copies.clear()

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            try:
                self._set_up_copies()
                self._assign()
                self._read()
            except (FclusterError, KafkaException) as error:
                self._tell_if_disk_failed(error)
                _log.warning("following changelogs: %s", " ".join(str(error).split()))
                self._pause(RETRY_S)
            except Exception:  # noqa: BLE001  if the thread died, the copies would only seem warm
                _log.exception("following changelogs failed; continuing")
                self._pause(RETRY_S)
        if self._consumer is not None:
            self._consumer.close()

    def _pause(self, duration_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, duration_s)

    def _set_up_copies(self) -> None:
        """Put bases in place for copies that are due."""
        while not self._closed:
            with self._changed:
                now_s = time.monotonic()
                due = [
                    copy for copy in self._copies.values() if copy.store is None and copy.retry_at_s <= now_s
                ]
                if not due:
                    return
                copy = due[0]
                copy.opening = True
            try:
                self._set_up(copy)
            except StateDamaged as error:
                self._try_later(copy, error)
            except (FclusterError, KafkaException) as error:
                self._tell_if_disk_failed(error)
                self._try_later(copy, error)
            finally:
                with self._changed:
                    copy.opening = False
                    self._changed.notify_all()

    def _tell_if_disk_failed(self, error: Exception) -> None:
        if isinstance(error, DISK_TROUBLE) and self._disk_failed is not None:
            self._disk_failed(failure_of(error, FailureKind.HOST))

    def _set_up(self, copy: _Copy) -> None:
        topic, number = copy.place
        at = TopicPartition(topic, number)
        changelog_id = topic_ids(self._admin, [topic]).get(topic, "")
        begin, end = (
            begin_offsets(self._admin, [at])[at],
            end_offsets(self._admin, [at], "read-uncommitted")[at],
        )
        while True:
            meta = local_meta(copy.directory, copy.shard)
            if meta is not None and (Base.LOCAL, meta.state_epoch) in copy.failed:
                meta = None
            manifests = [
                manifest
                for manifest in usable_manifests(self._snapshots, copy.shard)
                if (Base.SNAPSHOT, manifest.state_epoch) not in copy.failed
            ]
            plan = plan_standby(changelog_id, meta, manifests, begin, end)
            if plan is None:
                copy.failed.clear()
                raise StateDamaged(f"there is nothing yet to start a copy of {copy.shard} from")
            try:
                store = place_base(plan, copy.shard, copy.directory, self._snapshots)
                break
            except StateDamaged as error:
                if plan.base is Base.NOTHING:
                    raise
                _log.info("copying %s: %s: %s", copy.shard, plan.base.value, error.message)
                copy.failed.add((plan.base, plan.meta.state_epoch))
        with self._changed:
            copy.begin(store, plan, changelog_id)
        _log.info(
            "keeping a copy of %s, from %s at epoch %d", copy.shard, plan.base.value, plan.meta.state_epoch
        )

    def _try_later(self, copy: _Copy, error: Exception) -> None:
        delay_s = min(RETRY_S_MAX, RETRY_S * 2 ** min(copy.failures, 10))
        copy.failures += 1
        copy.retry_at_s = time.monotonic() + delay_s
        text = " ".join(str(error).split())
        _log.info("no copy of %s yet: %s; again in %g s", copy.shard, text, delay_s)

    def _assign(self) -> None:
        """Assign the partitions that the copies need to the consumer, and no others."""
        with self._changed:
            wanted = {copy.place: copy for copy in self._copies.values() if copy.store is not None}
            positions = {place: copy.position for place, copy in wanted.items()}
        gone = [place for place, copy in self._assigned.items() if wanted.get(place) is not copy]
        new = [place for place, copy in wanted.items() if self._assigned.get(place) is not copy]
        if self._consumer is None:
            if not new:
                return
            # This also applies in at-least-once mode: the job may have run exactly-once before, and aborted.
            self._consumer = make_consumer(self._settings, "read-committed", **_CONSUMER)
        if gone:
            self._consumer.incremental_unassign([TopicPartition(*place) for place in gone])
        if new:
            self._consumer.incremental_assign([TopicPartition(*place, positions[place]) for place in new])
        self._assigned = wanted

    def _read(self) -> None:
        """Wait for records, and take those that are available."""
        if self._consumer is None or not self._assigned:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._something_is_due(), _POLL_S)
            return
        first = self._consumer.poll(_POLL_S)
        if first is not None:
            for message in [first, *self._consumer.consume(_POLL_RECORDS, 0)]:
                self._take_record(message)
            self._look_at_ends()
        with self._changed:
            for copy in self._copies.values():
                try:
                    if not copy.opening:
                        copy.write_if_old()
                except FclusterError as error:
                    self._begin_anew(copy, error)
            self._changed.notify_all()

    def _something_is_due(self) -> bool:
        now_s = time.monotonic()
        return any(copy.store is None and copy.retry_at_s <= now_s for copy in self._copies.values())

    def _take_record(self, message: Message) -> None:
        partition = message.partition()
        place = (message.topic() or "", -1 if partition is None else partition)
        copy = self._assigned.get(place)
        error, offset = message.error(), message.offset()
        if copy is None or offset is None:
            if error is not None and not error.retriable():
                _log.info("following changelogs: %s", error.str())
            return
        with self._changed:
            if self._copies.get(copy.shard) is not copy or copy.store is None:
                return  # taken in the meantime
            try:
                if error is None:
                    copy.feed(offset, message.value())
                elif error.code() == KafkaError._PARTITION_EOF:
                    copy.position = max(copy.position, offset)
                    copy.end = copy.position
                    copy.failures = 0
                elif error.code() in _BASE_IS_GONE:
                    raise StateDamaged(f"the changelog has no offset {copy.position}")
            except FclusterError as error:
                self._begin_anew(copy, error)

    def _begin_anew(self, copy: _Copy, error: FclusterError) -> None:
        """The copy's base leads nowhere, or can't be written at present (a full disk)."""
        if isinstance(error, StateDamaged):
            copy.failed.add(copy.base)
        copy.store = None
        with contextlib.suppress(FclusterError):
            copy.directory.close(
                copy.shard
            )  # after a failed write, RocksDB accepts no others until it is reopened
        self._try_later(copy, error)

    def _look_at_ends(self) -> None:
        """Note the ends of the changelogs as far as the consumer knows them, so that a copy with much to read
        reports how much.
        """
        assert self._consumer is not None
        for place, copy in self._assigned.items():
            if copy.end == copy.position:
                continue
            _, answer = self._consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
            end = offset_or_none(answer)
            with self._changed:
                if end is not None:
                    copy.end = max(copy.position, end)

    def _write(self, copy: _Copy) -> None:
        try:
            copy.write()
        except FclusterError as error:
            _log.warning("writing the copy of %s: %s", copy.shard, " ".join(str(error).split()))
