"""The shards of a worker: restores them, keeps their state open, takes their snapshots, and closes them; and
the warm copies of other workers' shards.

Responsible for: two background threads and what they share. The restore thread opens, restores and closes
stores, in the order of the requests. When copied shards become the worker's own, it takes them from
`standby`, which follows the changelogs. The snapshot thread copies stores to the snapshot store every
`snapshot.interval.ms`, and truncates the changelog as far as the snapshots make that safe.

It keeps these invariants: committed offsets are read only after the shard's previous owner was fenced or has
released it (the coordinator ensures that before it assigns), and after the worker's own previous session has
ended all its work; a shard runs only with exactly the state of its committed epoch.

Must not: process records, or decide which shards the worker owns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from confluent_kafka import KafkaException, TopicPartition

from fcluster.common import failpoints
from fcluster.common.errors import (
    FclusterError,
    IncompatibleState,
    KafkaUnavailable,
    SourceGap,
    StateDamaged,
    failure_of,
    one_line,
)
from fcluster.common.failures import Failure, FailureKind, describe_exception
from fcluster.common.ids import ShardId, journal_topic
from fcluster.common.offsets import NotKnownYetError, Offset
from fcluster.common.positions import CommittedPosition, SplitPositionError, joined_position
from fcluster.common.settings import Settings, TornPolicy
from fcluster.engine.memory import StateMemory
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.engine.watermarks import make_clock
from fcluster.graph.stages import Stage
from fcluster.graph.topology import Topology
from fcluster.kafka.asking import ask_until_known
from fcluster.kafka.brokers import largest_batch
from fcluster.kafka.clients import make_admin, make_consumer
from fcluster.kafka.offsets import begin_offsets, delete_records_before, end_offsets
from fcluster.kafka.topic_ids import Look, fits, reset_remedy, source_replaced
from fcluster.kafka.topic_looks import look_at_topics, settled_look
from fcluster.storage.replay_size import ReplaySize
from fcluster.storage.restore import (
    RestoreProgress,
    RestoreRequest,
    ShardRestored,
    ShardStopped,
    changelog_consumer,
    restore_shards,
    topic_ids,
)
from fcluster.storage.snapshot_store import SnapshotStoreUnavailable, open_snapshot_store
from fcluster.storage.snapshots import same_changelog, take_snapshot, truncation_offset, usable_manifests
from fcluster.storage.store import DISK_TROUBLE, RocksStore, StoreDirectory
from fcluster.storage.warm_copies import StandbyTail
from fcluster.wire.messages import CommittedOffset, StandbyStatus
from fcluster.worker.committed import CommittedOffsets
from fcluster.worker.core import events

_log = logging.getLogger("fcluster.worker")


class _OvertakenError(FclusterError):
    """Another worker has committed epochs of a shard that is being restored."""


_MENDABLE = (KafkaUnavailable, SnapshotStoreUnavailable, _OvertakenError)
"""Errors that keep this worker from restoring now, but not other workers, and not this one later."""

STORES_EIGHTHS = 3
"""How much of `state.memory.bytes` RocksDB gets. The rest is for values that are kept decoded: they take ten
times what they take in RocksDB, but no time to read.
"""
LOSS_CONFIRMED_S = 5.0
"""How long a partition has to end before the committed offset until that counts as a loss."""
CHAIN_RETRY_S = 1.0
"""The shortest time between two snapshots of a shard, however fast its chain of deltas grows. Committed
changes reach the store, and so a snapshot, within this time.
"""
CONNECT_TIMEOUT_S = 5.0
TORN_LOOK_AGAIN_S = 2.0
"""A torn transaction is checked again after this time, before anything is done about it."""
CATCH_UP_PATIENCE_S = 0.3
"""How long a warm copy may take for the last deltas before a restore reads them. This is longer than the
restore needs to connect.
"""


class ShardHost:
    """All shards that this worker has open.

    Args:
        topology: the job's topology.
        settings: the resolved settings.
        emit: called from background threads with events for the core.
    """

    def __init__(self, topology: Topology, settings: Settings, emit: Callable[[events.Event], None]) -> None:
        self._topology = topology
        self._settings = settings
        self._emit = emit
        self._snapshot_store = open_snapshot_store(settings.snapshots, topology.job)
        self.snapshot_store_identity = self._snapshot_store.identity()
        self._admin = make_admin(settings)
        self._stopping = threading.Event()
        self._offsets = CommittedOffsets(
            topology.job,
            lambda: make_consumer(settings, "read-committed", **{"group.id": topology.job}),
            self._stopping,
        )
        # It stays connected, because connecting usually takes longer than reading.
        self._changelogs = changelog_consumer(settings)
        self._asking = ThreadPoolExecutor(4, thread_name_prefix="asking")
        self._directory: StoreDirectory | None = None
        self._tail = StandbyTail(
            settings,
            self._snapshot_store,
            self._admin,
            disk_failed=lambda failure: emit(events.WorkerBroken(failure)),
        )
        self._progress: tuple[RestoreProgress, float] | None = None
        self._restore_began_s = 0.0
        self._memory = StateMemory(settings.state_memory_bytes * (8 - STORES_EIGHTHS) // 8)
        self._states: dict[ShardId, ShardState] = {}
        self._dropped: list[ShardState] = []
        self._restoring: set[ShardId] = set()
        self._restore_stop = threading.Event()
        self._restore_thread = ThreadPoolExecutor(1, thread_name_prefix="restore")
        self._snapshot_epochs: dict[ShardId, int] = {}
        self._chains: dict[ShardId, ReplaySize] = {}
        self._chain_grew = threading.Event()
        self._snapshot_thread = threading.Thread(target=self._run_snapshots, name="snapshots", daemon=True)

    # --- called by the main thread ----------------------------------------------------------------------

    def name_topics(self, topology: Topology) -> None:
        """Use the topic names of this topology. Call it before the first `open`."""
        self._topology = topology

    def open(self, slot: int) -> None:
        """Lock the slot's part of the state directory. Has no effect if it is already locked.

        Raises:
            DirectoryInUse: another process has it.
        """
        root = Path(self._settings.state_dir) / "state" / self._topology.job / f"slot-{slot}"
        if self._directory is not None and self._directory.root == root:
            return
        if self._directory is not None:
            self._restore_thread.submit(self._leave_directory, self._directory).result()
        self._directory = StoreDirectory(root, self._settings.state_memory_bytes * STORES_EIGHTHS // 8)
        self._asking.submit(self._connect)
        if not self._snapshot_thread.is_alive():
            self._snapshot_thread.start()

    @property
    def restoring(self) -> int:
        """How many shards are being restored."""
        return len(self._restoring)

    @property
    def snapshot_epoch_min(self) -> int:
        """The oldest state epoch among the newest snapshots of all shards. -1 if a shard with state has
        no snapshot.
        """
        epochs = [self._snapshot_epochs.get(shard, -1) for shard in list(self._states)]
        return min(epochs, default=-1)

    def restore_progress(self) -> tuple[int, int, int]:
        """The progress of the current restore: bytes read, bytes left, milliseconds left. -1: unknown."""
        progress = self._progress
        if progress is None or not self._restoring:
            return 0, -1, -1
        told, elapsed_s = progress
        left = told.bytes_left
        if left < 0 or not told.bytes:
            return told.bytes, left, -1
        return told.bytes, left, round(1000 * elapsed_s * left / told.bytes)

    def standby_statuses(self) -> list[StandbyStatus]:
        """The progress of the warm copies. May be called by any thread."""
        return self._tail.statuses()

    def keep_standbys(self, shards: Sequence[ShardId], before: Iterable[Executor]) -> None:
        """Keep warm copies of these shards, and of no others, once earlier requests are done.

        Args:
            shards: shards of other workers.
            before: commit threads of previous sessions, which may still write to these shards' stores.
        """
        self._restore_thread.submit(self._keep_standbys, tuple(shards), tuple(before))

    def state(self, shard: ShardId) -> ShardState:
        """The memory layers of a restored shard."""
        return self._states[shard]

    def states(self) -> list[ShardState]:
        """Those of all restored shards."""
        return list(self._states.values())

    def rewind(self, shards: Iterable[ShardId]) -> None:
        """Drop what isn't committed of these shards. Everything committed is in their stores."""
        for shard in shards:
            self._states[shard] = self._states[shard].of_the_store()

    def restore(
        self,
        session: int,
        shards: Sequence[ShardId],
        committed: Sequence[CommittedOffset],
        before: Sequence[Executor],
    ) -> None:
        """Restore these shards in the background. Each one answers with an event.

        Args:
            session: the worker's session. The events carry it.
            shards: to restore.
            committed: offsets of their inputs that are known to be committed.
            before: threads of previous sessions that have to end first, because they may be about to write to
                the same stores.
        """
        self._restoring.update(shards)
        self._restore_thread.submit(
            self._restore, session, tuple(shards), tuple(committed), tuple(before), self._restore_stop
        )

    def drop_states(self) -> None:
        """Drop all shards from memory, and stop restoring. The stores stay open."""
        self._restore_stop.set()
        self._restore_stop = threading.Event()
        self._restoring.clear()
        # Their committed changes are written to the stores once no commit thread uses them any more.
        self._dropped = [*self._dropped, *self._states.values()]
        self._states = {}

    def note_delta(self, shard: ShardId, next_offset: int, delta_bytes: int) -> None:
        """A delta of the shard was committed. Called in the commit thread."""
        chain = self._chains.get(shard)
        if chain is not None:
            chain.grown(next_offset, delta_bytes)
            if self._is_due(chain):
                self._chain_grew.set()

    def _is_due(self, chain: ReplaySize) -> bool:
        bytes_max = self._settings.snapshot_changelog_bytes_max
        return 0 < bytes_max < chain.bytes and time.monotonic() >= chain.not_before_s

    def release(self, shards: Iterable[ShardId], written: Callable[[], None]) -> None:
        """Close the stores of these shards in the background, before anything that is requested later.

        A shard may come back at once. Its restore must then find the store closed; the store must not be
        closed during the restore.

        Args:
            shards: to close.
            written: waits until the commit thread no longer writes to them.
        """
        states = {shard: self._states.pop(shard, None) for shard in shards}
        self._restoring.difference_update(states)
        self._restore_thread.submit(self._close, states, written)

    def close(self) -> None:
        """Write committed state that is still in memory, and close everything. No commit may be under way."""
        self._stopping.set()
        self._chain_grew.set()
        self._restore_stop.set()
        for shard, state in list(self._states.items()):
            self._restore_thread.submit(self._close_one, shard, state)
        self._restore_thread.shutdown(wait=True)
        if self._snapshot_thread.is_alive():
            self._snapshot_thread.join()
        self._tail.close()
        if self._directory is not None:
            try:
                self._directory.close_all()
            except FclusterError as error:  # changes that aren't written are restored at the next start
                _log.warning("closing the local state: %s", one_line(error))
        self._asking.shutdown(wait=True)
        self._offsets.close()
        self._changelogs.close()

    def _connect(self) -> None:
        """Connect the consumers before there is anything to restore. Runs in its own thread."""
        with contextlib.suppress(FclusterError, KafkaException):  # the restore will say what is wrong
            for changelog in self._changelogs_of(self._topology.stages):
                self._changelogs.list_topics(changelog, timeout=CONNECT_TIMEOUT_S)
            # This finds the group's coordinator. Offsets of the journal are never committed, so the
            # answer waits for no transaction.
            nowhere = TopicPartition(journal_topic(self._topology.job), 0)
            self._offsets.connect(nowhere, CONNECT_TIMEOUT_S)

    def largest_batch(self, topic: str) -> int | None:
        """The largest batch of records that a topic accepts, in bytes. None if we lack the permission to see
        it.
        """
        return largest_batch(self._admin, topic)

    def look(self, topics: Iterable[str]) -> Future[Look]:
        """Begin a check of the topics as they are now."""
        return self._asking.submit(look_at_topics, self._admin, list(topics))

    def settled_look(self, expected: Mapping[str, str]) -> Look:
        """A check that is repeated for a while if it contradicts these ids."""
        return settled_look(functools.partial(look_at_topics, self._admin), expected)

    # --- the restore thread -------------------------------------------------------------------------------

    def _restore(
        self,
        session: int,
        shards: tuple[ShardId, ...],
        committed: tuple[CommittedOffset, ...],
        before: tuple[Executor, ...],
        stop: threading.Event,
    ) -> None:
        for known in committed:
            topics = self._topology.stage(known.shard.stage).topics
            if known.input < len(topics):
                self._offsets.reported(topics[known.input], known.shard.partition, known.offset)
        try:
            for executor in before:
                executor.shutdown(wait=True)
            if stop.is_set():
                return
            self._write_dropped()
            began_s = time.monotonic()
            stages = [self._topology.stage(shard.stage) for shard in shards]
            ids = self._asking.submit(topic_ids, self._admin, self._changelogs_of(stages))
            positions = self._positions(shards)
            read_s = time.monotonic()
            needed = {shard: position.state_epoch for shard, position in positions.items()}
            warm = self._tail.take(needed, CATCH_UP_PATIENCE_S)
            taken_s = time.monotonic()
            try:
                self._restore_states(session, positions, ids.result(), stop)
                _log.info(
                    "restored %d shards, %d of them warm: "
                    "positions %.0f ms, copies %.0f ms, the rest %.0f ms",
                    len(shards),
                    warm,
                    1000 * (read_s - began_s),
                    1000 * (taken_s - read_s),
                    1000 * (time.monotonic() - taken_s),
                )
            except StateDamaged as damage:
                self._check_positions(positions, damage)
                raise
        except DISK_TROUBLE as error:
            self._emit(events.WorkerBroken(failure_of(error)))
        except (FclusterError, KafkaException) as error:
            fatal = isinstance(error, FclusterError) and not isinstance(error, _MENDABLE)
            if not stop.is_set():
                self._emit(events.RestoreFailed(session, failure_of(error, FailureKind.KAFKA), fatal))
        except Exception as error:  # noqa: BLE001  a thread that dies silently would block its shards
            _log.exception("restoring failed")
            bug = Failure(FailureKind.BUG, describe_exception(error))
            self._emit(events.RestoreFailed(session, bug, fatal=True))

    def _check_positions(self, positions: Mapping[ShardId, CommittedPosition], damage: StateDamaged) -> None:
        """Distinguish damage from the deltas of a successor: our session may be over, and we don't know it
        yet.

        Raises:
            _OvertakenError: another worker commits epochs of these shards.
        """
        waiting = {shard: position for shard, position in positions.items() if shard in self._restoring}
        if self._positions(tuple(waiting)) != waiting:
            raise _OvertakenError(f"the shards have a new owner meanwhile ({damage.message})") from damage

    def _changelogs_of(self, stages: Sequence[Stage]) -> list[str]:
        return sorted({stage.changelog for stage in stages if stage.changelog is not None})

    def _restore_states(
        self,
        session: int,
        positions: Mapping[ShardId, CommittedPosition],
        changelog_ids: Mapping[str, str],
        stop: threading.Event,
    ) -> None:
        assert self._directory is not None
        stateless = [shard for shard in positions if self._topology.stage(shard.stage).changelog is None]
        for shard in stateless:
            self._finish(session, shard, positions[shard], ShardState(NoStore(), (), self._memory))
        requests = [
            RestoreRequest(
                shard,
                stage.changelog,
                position if position.epoch else None,
                changelog_ids.get(stage.changelog, ""),
                stage.topics[1:],
            )
            for shard, position in positions.items()
            if (stage := self._topology.stage(shard.stage)).changelog is not None
        ]
        self._progress, self._restore_began_s = None, time.monotonic()
        stopped: list[ShardStopped] = []
        # Nothing is done about a tear that was seen only once.
        looks: list[TornPolicy] = ["stop", self._settings.torn_transaction]
        while looks:
            settings = dataclasses.replace(self._settings, torn_transaction=looks.pop(0))
            stopped = []
            for restored in restore_shards(
                requests,
                directory=self._directory,
                snapshots=self._snapshot_store,
                settings=settings,
                stop=stop,
                admin=self._admin,
                consumer=self._changelogs,
                progress=self._note_progress,
            ):
                if isinstance(restored, ShardStopped):
                    stopped.append(restored)
                else:
                    self._run_restored(session, restored, positions[restored.shard])
                    failpoints.reach("worker.mid-restore", restored.shard)
            if not stopped or stop.is_set():
                return
            torn = {one.shard for one in stopped}
            self._check_positions({shard: positions[shard] for shard in torn}, stopped[0].error)
            if looks and stop.wait(TORN_LOOK_AGAIN_S):
                return
            requests = [request for request in requests if request.shard in torn]
        for one in stopped:
            self._restoring.discard(one.shard)
            self._emit(events.TransactionTorn(session, one.shard, failure_of(one.error), stopped=True))

    def _run_restored(self, session: int, restored: ShardRestored, position: CommittedPosition) -> None:
        for reason in restored.reasons:
            _log.info("restoring %s from %s: %s", restored.shard, restored.base.value, reason)
        _log.info("%s", restored.describe())
        shard, go_on = restored.shard, restored.go_on
        if go_on is not None:
            if go_on.rebase:
                self._rebase(shard, restored.store)
            position = go_on.position
            chosen = Failure(FailureKind.STATE, go_on.text, where=str(shard)).fitted()
            self._emit(events.TransactionTorn(session, shard, chosen, stopped=False))
        stores = self._topology.stage(shard.stage).all_stores
        state = ShardState(restored.store, stores, self._memory)
        self._chains[shard] = ReplaySize(restored.store.meta().changelog_offset)
        self._chain_grew.set()
        self._finish(session, shard, position, state)

    def _rebase(self, shard: ShardId, store: RocksStore) -> None:
        """Let the changelog start again after its present end, because it doesn't lead to the state in
        `store`.

        Raises:
            FclusterError: it failed; the next restore retries it.
        """
        changelog = self._topology.stage(shard.stage).changelog
        assert changelog is not None
        meta = store.meta()
        take_snapshot(store, shard, self._snapshot_store)
        if not any(manifest.meta == meta for manifest in usable_manifests(self._snapshot_store, shard)):
            raise FclusterError(
                f"the snapshot of {shard} at epoch {meta.state_epoch} was replaced by newer ones at once",
                remedy="Move snapshots of later epochs out of the snapshot store.",
            )
        delete_records_before(
            self._admin, {TopicPartition(changelog, shard.partition): meta.changelog_offset}
        )

    def _note_progress(self, progress: RestoreProgress) -> None:
        self._progress = (progress, time.monotonic() - self._restore_began_s)

    def _keep_standbys(self, shards: tuple[ShardId, ...], before: tuple[Executor, ...]) -> None:
        assert self._directory is not None
        try:
            # A copy may start from the files of a shard that this worker owned in a previous
            # session. Late writes of that session are older than what the copy will contain, and
            # must not come after it.
            for executor in before:
                executor.shutdown(wait=True)
            self._write_dropped()
            dropped = self._tail.shards - set(shards)
            self._tail.take(dict.fromkeys(dropped, 0), 0)
            for shard in dropped:
                self._close_one(shard, None)
            changelogs = {shard: self._topology.stage(shard.stage).changelog for shard in shards}
            self._tail.keep(
                self._directory,
                {shard: changelog for shard, changelog in changelogs.items() if changelog is not None},
            )
        except Exception:  # noqa: BLE001  copies are optional: a restore works without them
            _log.exception("keeping warm copies failed")

    def _finish(self, session: int, shard: ShardId, position: CommittedPosition, state: ShardState) -> None:
        self._states[shard] = state
        self._restoring.discard(shard)
        self._emit(events.ShardRestored(session, shard, position))

    def _positions(self, shards: Sequence[ShardId]) -> dict[ShardId, CommittedPosition]:
        """The committed positions of the shards. For new shards, the beginning of their inputs."""
        inputs = {
            shard: [
                TopicPartition(topic, shard.partition) for topic in self._topology.stage(shard.stage).topics
            ]
            for shard in shards
        }
        wanted = [at for sources in inputs.values() for at in sources]
        asked = (
            self._asking.submit(begin_offsets, self._admin, wanted),
            self._asking.submit(end_offsets, self._admin, wanted, "read-uncommitted"),
        )
        look = self._asking.submit(look_at_topics, self._admin, {source.topic for source in wanted})
        committed = self._offsets.read(wanted)
        begins, ends = (answer.result() for answer in asked)
        ids = self._source_ids(committed, look.result())
        ends = self._ends_once_caught_up(ends, committed)
        positions: dict[ShardId, CommittedPosition] = {}
        for shard, sources in inputs.items():
            readable = [
                self._readable(source, committed[source], begins[source], ends[source]) for source in sources
            ]
            position = self._joined(shard, readable, [begins[source] for source in sources])
            make_clock(self._topology.stage(shard.stage), position)  # this raises if it can't be read
            named = zip(sources, position.inputs, strict=True)
            positions[shard] = position.at(
                [at._replace(topic_id=ids.get(source.topic, "")) for source, at in named]
            )
        return positions

    def _readable(
        self, source: TopicPartition, position: CommittedPosition | None, begin: int, end: int
    ) -> CommittedPosition | None:
        """The committed offset of one input, if its next record exists or is yet to come."""
        if position is None:
            return None
        if position.offset < begin:
            return self._behind_gap(source, position, begin)
        if position.offset > end:
            raise SourceGap(
                f"The next record of {source.topic}/{source.partition} is at offset {position.offset}, "
                f"but the partition ends at {end}: records were lost, or this is another topic of the same "
                "name.",
                remedy="Bring the old topic back, or choose where to begin: "
                f"{reset_remedy(self._topology.job)}",
            )
        return position

    def _joined(
        self, shard: ShardId, committed: Sequence[CommittedPosition | None], begins: Sequence[int]
    ) -> CommittedPosition:
        try:
            return joined_position(committed, begins, self._topology.fingerprint)
        except SplitPositionError as error:
            topics = self._topology.stage(shard.stage).topics
            raise IncompatibleState(
                f"The committed offsets of {shard} don't go together, though the job commits them in one "
                f"transaction: {error} (the inputs are {', '.join(topics)}). Offsets were deleted, or "
                "committed by something else.",
                remedy=f"Find out what commits in the group {self._topology.job!r}, then decide anew: "
                f"{reset_remedy(self._topology.job)}",
            ) from error

    def _source_ids(
        self, committed: Mapping[TopicPartition, CommittedPosition | None], look: Look
    ) -> dict[str, str]:
        """For each source: the topic id that its offsets were committed with. If there is none, its present
        id.

        Raises:
            TopicReplaced: a source has another id now.
        """
        known = {
            source.topic: position.topic_id
            for source, position in committed.items()
            if position is not None and position.topic_id
        }
        doubtful = {
            topic: topic_id
            for topic, topic_id in known.items()
            if topic in look and not fits(look[topic], topic_id)
        }
        if doubtful:
            settled = self.settled_look(doubtful)
            for topic, topic_id in doubtful.items():
                seen = settled.get(topic)
                if seen is not None and not fits(seen, topic_id):
                    raise source_replaced(self._topology.job, topic, topic_id, seen.topic_id)
        return {topic: seen.topic_id for topic, seen in look.items() if seen is not None} | known

    def _ends_once_caught_up(
        self,
        ends: Mapping[TopicPartition, Offset],
        committed: Mapping[TopicPartition, CommittedPosition | None],
    ) -> Mapping[TopicPartition, Offset]:
        """The end offsets, read again where one is before the committed offset. A loss of records is accepted
        only if the partition's leader reports it for a while, because a leader that has just started may not
        know all its records yet.
        """

        def ask() -> dict[TopicPartition, Offset]:
            answer = end_offsets(self._admin, short, "read-uncommitted")
            if any(_ends_before(answer[at], committed[at]) for at in short):
                raise NotKnownYetError("a partition seems to end before the committed offset")
            return answer

        short = [at for at, end in ends.items() if _ends_before(end, committed[at])]
        if not short:
            return ends
        try:
            return {**ends, **ask_until_known(ask, LOSS_CONFIRMED_S)}
        except KafkaException:
            # The final answer: the same answer again, or KafkaUnavailable.
            return {**ends, **end_offsets(self._admin, short, "read-uncommitted")}

    def _behind_gap(
        self, source: TopicPartition, position: CommittedPosition, begin: int
    ) -> CommittedPosition:
        gap = (
            f"The records {position.offset} to {begin - 1} of {source.topic}/{source.partition} were deleted "
            f"before they were processed ({begin - position.offset} records)."
        )
        if self._settings.source_gap != "continue":
            raise SourceGap(
                gap,
                remedy="To go on without them, start with --set source.gap=continue. To prevent this, raise "
                "the topic's retention.",
            )
        _log.warning("%s Continuing without them, because of source.gap.", gap)
        return dataclasses.replace(position, offset=begin)

    def _write_dropped(self) -> None:
        dropped, self._dropped = self._dropped, []
        for state in dropped:
            try:
                state.flush()
            except FclusterError as error:
                # The changelog has it too.
                _log.warning("writing committed state to the local store: %s", one_line(error))

    def _leave_directory(self, directory: StoreDirectory) -> None:
        self._write_dropped()
        self._tail.take(dict.fromkeys(self._tail.shards, 0), 0)
        directory.close_all()

    def _close(self, states: Mapping[ShardId, ShardState | None], written: Callable[[], None]) -> None:
        written()
        failpoints.reach("worker.shards-released")
        for shard, state in states.items():
            self._close_one(shard, state)

    def _close_one(self, shard: ShardId, state: ShardState | None) -> None:
        assert self._directory is not None
        try:
            if state is not None:
                state.flush()
            self._directory.close(shard)
        except FclusterError as error:
            _log.warning("closing the state of %s: %s", shard, one_line(error))

    # --- the snapshot thread ------------------------------------------------------------------------------

    def _run_snapshots(self) -> None:
        """Take snapshots of all shards once an interval, and in between of those whose chain of deltas has
        become too long.
        """
        interval_s = self._settings.snapshot_interval_ms / 1000
        next_s = time.monotonic() + interval_s
        while not self._stopping.is_set():
            self._chain_grew.wait(max(0.0, next_s - time.monotonic()))
            self._chain_grew.clear()
            is_time = time.monotonic() >= next_s
            for shard in list(self._states):
                if not self._stopping.is_set() and (is_time or self._has_long_chain(shard)):
                    self._snapshot(shard)
            if is_time:
                next_s = time.monotonic() + interval_s

    def _has_long_chain(self, shard: ShardId) -> bool:
        chain = self._chains.get(shard)
        if chain is None or not self._settings.snapshot_changelog_bytes_max:
            return False
        if chain.snapshot_offset is None:
            chain.snapshotted(self._newest_snapshot_offset(shard))
        if not self._is_due(chain):
            return False
        # Whatever the result, don't try again at the next commit.
        chain.not_before_s = time.monotonic() + CHAIN_RETRY_S
        return True

    def _newest_snapshot_offset(self, shard: ShardId) -> int:
        """The changelog position of the shard's newest snapshot, whichever worker took it. 0 if there is
        none.
        """
        store = self._directory.opened(shard) if self._directory is not None else None
        try:
            for manifest in usable_manifests(self._snapshot_store, shard):
                if store is not None and same_changelog(manifest.changelog_id, store.meta().changelog_id):
                    return manifest.changelog_offset
        except (FclusterError, OSError) as error:
            _log.info("can't list the snapshots of %s: %s", shard, error)
        return 0

    def _snapshot(self, shard: ShardId) -> None:
        store = self._directory.opened(shard) if self._directory is not None else None
        changelog = self._topology.stage(shard.stage).changelog
        if store is None or changelog is None:
            return
        try:
            meta = store.meta()
            if meta.state_epoch == self._snapshot_epochs.get(shard, 0):
                return  # nothing has changed since
            taken = take_snapshot(store, shard, self._snapshot_store)
            failpoints.reach("worker.snapshot-taken", shard)
            self._snapshot_epochs[shard] = taken.manifest.state_epoch
            chain = self._chains.get(shard)
            if chain is not None:
                chain.snapshotted(taken.manifest.changelog_offset)
            offset = truncation_offset(self._snapshot_store, shard, meta.changelog_id)
            if offset:
                delete_records_before(self._admin, {TopicPartition(changelog, shard.partition): offset})
        except FclusterError as error:
            # The last good snapshot is kept, and the changelog from there on. So only time is lost.
            _log.warning("no snapshot of %s: %s", shard, one_line(error))
        except Exception:  # noqa: BLE001  the next one may succeed
            _log.exception("no snapshot of %s", shard)


def _ends_before(end: Offset, position: CommittedPosition | None) -> bool:
    return position is not None and end < position.offset


class NoStore:
    """The store of a shard whose stage keeps no state."""

    def meta(self) -> StoreMeta:
        """Nothing, at no epoch."""
        return StoreMeta()

    def get(self, key: bytes) -> bytes | None:  # noqa: ARG002  required by the protocol
        """Nothing."""
        return None

    def scan(
        self,
        start: bytes,  # noqa: ARG002
        stop: bytes,  # noqa: ARG002
        limit: int,  # noqa: ARG002
        *,
        reverse: bool,  # noqa: ARG002
    ) -> list[tuple[bytes, bytes]]:
        """Nothing."""
        return []

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """Nothing."""
        return [None] * len(keys)

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:  # noqa: ARG002  required by the protocol
        """Never called: there are no changes without tables."""
        raise AssertionError("a shard without state was written")
