"""A model of `storage/warm_copies.py`: warm copies of other workers' shards, which follow their
changelogs.

Responsible for: what the standby thread does to the local stores, and when: a base is put in place, committed
deltas are read and written in batches, and the copy is handed over when the shard is restored. The plan of
the base, the reader of deltas and the checks of a store's contents are the real ones.

Must not: decide which worker keeps a copy; the coordinator does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fcluster.common.errors import FclusterError, StateDamaged
from fcluster.common.ids import ShardId
from fcluster.engine.changelog import DeltaReader
from fcluster.storage.restore_plan import Base, plan_standby
from fcluster.storage.snapshots import usable_manifests
from fcluster.wire.messages import StandbyStatus
from tests.simulation.kafka_model import Partition
from tests.simulation.storage import SimStore
from tests.simulation.world import Call, KafkaFailure, Sleep, Thread

if TYPE_CHECKING:
    from tests.simulation.worker_shell import SimWorker

POLL_MS = 30
RETRY_MS = 100
PATIENCE_MS = 60
BATCH_SHARE = 0.5
"""How often records are written at once, and not later or when the copy is handed over."""
READ_MAX = 50


class SimCopy:
    """One copy. Until its base is in place there is no store."""

    def __init__(self, shard: ShardId, changelog: Partition) -> None:
        self.shard = shard
        self.changelog = changelog
        self.store: SimStore | None = None
        self.base: tuple[Base, int] = (Base.NOTHING, 0)
        self.opening = False
        self.failed: set[tuple[Base, int]] = set()
        self.retry_at_ms = 0
        self.position = 0
        self.end = -1
        self.changes: dict[bytes, bytes] = {}
        self._begin(0)

    def begin(self, store: SimStore, base: Base) -> None:
        """The base is in place."""
        meta = store.meta()
        self.store, self.meta, self.base = store, meta, (base, meta.state_epoch)
        self.position, self.end, self.changes = meta.changelog_offset, -1, {}
        self._begin(meta.state_epoch)

    def _begin(self, epoch: int) -> None:
        self.reader = DeltaReader(f"copy of {self.changelog[0]}/{self.changelog[1]}", epoch)

    @property
    def status(self) -> StandbyStatus:
        known = self.store is not None and self.end >= 0
        epoch = 0 if self.store is None else self.meta.state_epoch
        return StandbyStatus(self.shard, epoch, max(0, self.end - self.position) if known else -1)

    def write(self) -> None:
        """Bring the store to the copy's position."""
        if self.store is not None and not self.store.closed and self.store.meta() != self.meta:
            changes, self.changes = self.changes, {}
            self.store.apply(changes, self.meta)


class SimTail:
    """All copies of one worker, and the thread that follows changelogs for them."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._copies: dict[ShardId, SimCopy] = {}
        self._running = False

    @property
    def shards(self) -> set[ShardId]:
        """The shards that have copies, or should have some."""
        return set(self._copies)

    def statuses(self) -> list[StandbyStatus]:
        """The progress of each copy."""
        return [copy.status for _, copy in sorted(self._copies.items())]

    def keep(self, shards: set[ShardId]) -> None:
        """Keep copies of these shards, in addition to the present ones (restore thread)."""
        for shard in sorted(shards - self.shards):
            self._copies[shard] = SimCopy(shard, self._worker.cluster.job.changelog(shard))
        if self._copies and not self._running:
            self._running = True
            self._worker.start(self._run())

    def take(self, targets: Mapping[ShardId, int], patience_ms: int) -> Thread:
        """Hand over these shards. Their stores stay open and belong to the caller (restore thread)."""
        mine = [copy for shard in sorted(targets) if (copy := self._copies.get(shard)) is not None]
        deadline_ms = self._worker.world.now_ms + patience_ms
        while any(copy.opening for copy in mine) or (
            self._worker.world.now_ms < deadline_ms
            and any(
                copy.end >= 0 and copy.meta.state_epoch < targets[copy.shard] for copy in mine if copy.store
            )
        ):
            yield Sleep(5)
        for copy in mine:
            if self._copies.pop(copy.shard, None) is None:
                continue  # the directory was left in the meantime
            if copy.store is not None and copy.meta.state_epoch >= targets[copy.shard] > 0:
                self._worker.world.landed["shard taken over warm"] += 1
            self._write(copy)
            copy.store = None

    def leave(self) -> None:
        """Drop all copies, because their directory is left."""
        for copy in self._copies.values():
            self._write(copy)
            copy.store = None
        self._copies.clear()

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> Thread:
        while self._copies:
            for copy in list(self._copies.values()):
                try:
                    if copy.store is None:
                        yield from self._set_up(copy)
                    else:
                        yield from self._follow(copy)
                except KafkaFailure:
                    copy.retry_at_ms = self._worker.world.now_ms + RETRY_MS
                except FclusterError as error:
                    self._begin_anew(copy, error)
            yield Sleep(POLL_MS)
        self._running = False

    def _set_up(self, copy: SimCopy) -> Thread:
        worker, disk = self._worker, self._worker.disk
        if worker.world.now_ms < copy.retry_at_ms or self._copies.get(copy.shard) is not copy or disk is None:
            return
        copy.opening = True
        try:
            kafka = worker.kafka
            begin, end = yield Call(
                "ends of a copy",
                lambda: (kafka.begins.get(copy.changelog, 0), kafka.end_offset(copy.changelog)),
            )
            local = disk.open(copy.shard).meta()
            manifests = [
                manifest
                for manifest in usable_manifests(worker.cluster.snapshots, copy.shard)
                if (Base.SNAPSHOT, manifest.state_epoch) not in copy.failed
            ]
            usable = None if (Base.LOCAL, local.state_epoch) in copy.failed else local
            plan = plan_standby("changelog-id", usable, manifests, begin, end)
            if plan is None:
                copy.failed.clear()
                raise StateDamaged(f"there is nothing yet to start a copy of {copy.shard} from")
            copy.base = (plan.base, plan.meta.state_epoch)
            yield Sleep(worker.world.latency_ms(worker.cluster.restore_ms_max))
            if worker.disk is disk:
                store = worker.put_base(disk, plan, copy.shard)
                copy.begin(store, plan.base)
                worker.note("keeps a copy of %s, from %s", copy.shard, plan.base.value)
                worker.world.landed[f"copy from {plan.base.value}"] += 1
        finally:
            copy.opening = False

    def _follow(self, copy: SimCopy) -> Thread:
        kafka, shard = self._worker.kafka, copy.shard
        asked = copy.position

        def fetch() -> tuple[int, list[tuple[int, bytes]], int, int]:
            begin = kafka.begins.get(copy.changelog, 0)
            if asked < begin:
                return begin, [], asked, -1
            records, position = kafka.read_committed(copy.changelog, asked, READ_MAX)
            return begin, records, position, kafka.last_stable_offset(copy.changelog)

        begin, records, position, end = yield Call("follow", fetch)
        if self._copies.get(shard) is not copy or copy.store is None or copy.position != asked:
            return  # taken in the meantime
        if asked < begin:
            raise StateDamaged(f"the changelog has no offset {asked}")
        for offset, record in records:
            delta = copy.reader.feed(offset, record)
            if delta is not None:
                copy.changes.update(delta.changes)
                copy.meta = copy.meta._replace(
                    state_epoch=copy.reader.state_epoch,
                    changelog_offset=offset + 1,
                    changelog_id="changelog-id",
                )
        copy.position, copy.end = max(copy.position, position), max(position, end)
        if self._worker.world.chance(BATCH_SHARE):
            copy.write()

    def _begin_anew(self, copy: SimCopy, error: FclusterError) -> None:
        self._worker.note("the copy of %s begins anew: %s", copy.shard, error.message)
        copy.failed.add(copy.base)
        copy.store, copy.changes = None, {}
        copy.retry_at_ms = self._worker.world.now_ms + RETRY_MS

    def _write(self, copy: SimCopy) -> None:
        try:
            copy.write()
        except FclusterError as error:
            self._worker.note("writing the copy of %s: %s", copy.shard, error.message)
