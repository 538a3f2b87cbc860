"""Planted bugs: the protocol and the engine without one of their rules. Some seed has to catch each of them.

Responsible for: the mutations, which are subclasses of cores, their parts and shells, and never hooks in the
product; and the table of seeds that catch them. The test plays only those seeds. To find another one, use
`python -m tests.simulation --find NAME`.

Sometimes a second rule prevents the harm of a planted bug. Then the checks still find the breach of the first
rule, if they can see it ("after slot 0 was fenced"). A combined mutation breaks the second rule as well, and
shows the harm. `covered_by` names the second rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from fcluster.common.ids import ShardId, transactional_ids
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.coordinator.core import events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import Session, Shard, Terms
from fcluster.coordinator.core.outbox import HeldKind, Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.progress import Progress
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.engine.clock import END_MS, EventClock, _Source
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.interval_gathered import OpenGatheredAtIntervals, Part
from fcluster.engine.interval_parts import OpenPartsAtIntervals
from fcluster.engine.interval_sessions import _TOLD, OpenSessionsAtIntervals
from fcluster.engine.interval_windows import OpenWindowsAtIntervals
from fcluster.engine.processing_time import ProcessingTime
from fcluster.engine.rows import FollowedTable, RowTable
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.engine.timers import NEVER_MS
from fcluster.engine.watermarks import make_clock
from fcluster.engine.windows import OpenInTime
from fcluster.graph.operators import Window
from fcluster.graph.stages import Stage
from fcluster.graph.timers import TimerStore
from fcluster.storage.manifest import Manifest
from fcluster.storage.restore_plan import RestoreRequest
from fcluster.storage.snapshots import usable_manifests
from fcluster.wire import messages
from fcluster.wire.messages import SlowestInput
from fcluster.worker.core import events as worker_events
from fcluster.worker.core import model
from fcluster.worker.core import worker as core
from fcluster.worker.core.epochs import Epochs
from fcluster.worker.core.owned_shards import OwnedShards
from fcluster.worker.drift import Drift, Turn
from fcluster.worker.idle_inputs import IdleInputs
from fcluster.worker.processing import ShardRunner
from fcluster.worker.timers import DueTimers
from tests.simulation.cluster import Cluster
from tests.simulation.coordinator_shell import SimCoordinator
from tests.simulation.job_mix import (
    BOUNDED_SEEDS_FROM,
    CLOCK_SEEDS_FROM,
    DRIFT_SEEDS_FROM,
    INTERVALS_SEEDS_FROM,
    KINDS_SEEDS_FROM,
    MERGED_SEEDS_FROM,
    RUNNING_SEEDS_FROM,
    SLIDING_SEEDS_FROM,
    TABLES_SEEDS_FROM,
    TIMED_SEEDS_FROM,
    TIMERS_SEEDS_FROM,
    WINDOWS_SEEDS_FROM,
)
from tests.simulation.jobs import IDLE_MS, JOB, MAX_DELAY_MS
from tests.simulation.kafka_model import Partition
from tests.simulation.storage import SimStore
from tests.simulation.worker_shell import (
    NOT_KNOWN,
    Fetched,
    FrozenEpoch,
    FrozenShard,
    Runner,
    SimWorker,
    Writer,
    positions_of,
)
from tests.simulation.world import BROKER_GONE, Call, KafkaFailure, Thread


@dataclass(frozen=True)
class Mutation:
    """A planted bug.

    Attributes:
        name: what is wrong, in a few words.
        seed: a seed that catches it.
        finding: a part of the violation.
        covered_by: the other rule that prevents the harm, if there is one.
        parts: the mutations that it combines. In the same seed, none of them is found alone.
        harm_only: whether only the recount judges, and not who may commit.
    """

    name: str
    seed: int
    finding: str
    worker_class: type[SimWorker] = SimWorker
    coordinator_class: type[SimCoordinator] = SimCoordinator
    covered_by: str = ""
    parts: tuple[Mutation, ...] = ()
    harm_only: bool = False


_Object = TypeVar("_Object")


def plant(part: object, broken: type[_Object]) -> _Object:
    """Break a part of a core: from now on, it belongs to this subclass of its class."""
    assert issubclass(broken, type(part))
    part.__class__ = broken
    return part  # type: ignore[return-value]


# --- fences -------------------------------------------------------------------------------------------


class NoFence(SimCoordinator):
    """Says that a slot is fenced, but does nothing."""

    def fence_ids(self, slot: int) -> Thread:
        yield from ()


class OneIdFenced(SimCoordinator):
    """Fences one of a slot's two ids."""

    def fence_ids(self, slot: int) -> Thread:
        name = transactional_ids(JOB, slot)[0]
        yield Call("fence", lambda: self.kafka.init_producer(name))


class _EndsBeforeFence(Membership):
    def end(self, session: Session, reason: str, *, clean: bool, rejoins: bool = False) -> None:
        super().end(session, reason, clean=clean, rejoins=True)
        slot = self._cluster.slots[session.slot]
        slot.fenced, slot.fencing = True, False
        if not rejoins:
            self.pursue(slot)
            self._ownership.balance()


class _AssignsBeforeFence(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._membership, _EndsBeforeFence)


class AssignsBeforeFence(SimCoordinator):
    """Gives shards to the next owner, which reads their offsets, before the fence is done."""

    core_class = _AssignsBeforeFence


class _FencedWhenFailed(Membership):
    def fence_failed(self, number: int, reason: str) -> None:
        self.fenced(number)


class _FailedFenceCounts(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._membership, _FencedWhenFailed)


class FailedFenceCounts(SimCoordinator):
    """Counts a fence that failed as done."""

    core_class = _FailedFenceCounts


class _CleanIfItRejoins(Membership):
    def end(
        self, session: Session, reason: str, *, clean: bool, rejoins: bool = False, lost: bool = True
    ) -> None:
        super().end(session, reason, clean=clean or rejoins, rejoins=rejoins, lost=lost)


class _NoFenceForReturning(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._membership, _CleanIfItRejoins)


class NoFenceForReturning(SimCoordinator):
    """Doesn't fence the slot of a worker that rejoins, because its new producers will do that."""

    core_class = _NoFenceForReturning


class OldPositionTaken(SimWorker):
    """Believes a group coordinator that is cut off, although more was reported as committed."""

    def is_old(self, found: dict[Partition, tuple[int, str] | None]) -> bool:
        return False


class UnsettledOffsets(OldPositionTaken):
    """Reads committed offsets without waiting for pending ones. In most cases, the workers' reports would
    reveal that. So it doesn't look at them, either.
    """

    def settled_offsets(self, sources: list[Partition]) -> dict[Partition, tuple[int, str] | None] | None:
        return {source: self.kafka.committed(source) for source in sources}


class UnsettledChangelog(SimWorker):
    """Restores up to the offset to which the changelog can be read at the moment."""

    def settled_end(self, changelog: Partition) -> Thread:
        return (yield Call("ends", lambda: self.kafka.last_stable_offset(changelog)))


# --- sessions, terms and the journal ------------------------------------------------------------------


class _HoldsNoWelcome(Outbox):
    welcome: Callable[[int], None]

    def hold(self, kind: HeldKind, sequence: int, number: int) -> None:
        if kind == "welcome":
            self.welcome(number)
        else:
            super().hold(kind, sequence, number)


class _JournalLast(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._outbox, _HoldsNoWelcome).welcome = self._joining.welcome


class JournalLast(SimCoordinator):
    """Opens a session before it is in the journal."""

    core_class = _JournalLast


class JournalUnfenced(SimCoordinator):
    """Writes the journal although another coordinator has taken it over."""

    def _write(self, writes: list[events.WriteJournal]) -> Thread:
        self._writer = self.kafka.journal._writer
        yield from super()._write(writes)


class _EpochsFromCommitted(Coordinator):
    @classmethod
    def recover(cls, journal: Any, terms: Terms, now_ms: float) -> Coordinator:
        return super().recover({**journal, "epoch": {}}, terms, now_ms)


class EpochsFromCommitted(SimCoordinator):
    """A new leader continues numbering epochs after the last committed one that it finds."""

    core_class = _EpochsFromCommitted


class _ForgetsSessions(Coordinator):
    @classmethod
    def recover(cls, journal: Any, terms: Terms, now_ms: float) -> Coordinator:
        kept = {
            key: {**value, "session": 0, "fenced": True} if key.startswith("slot/") else value
            for key, value in journal.items()
        }
        return super().recover(kept, terms, now_ms)


class ForgetsSessions(SimCoordinator):
    """A new leader treats the slots of the old one's sessions as free."""

    core_class = _ForgetsSessions


class _ObeysAnyTerm(core.WorkerCore):
    def _on_message(self, message: messages.FromCoordinator) -> None:
        self.state.term = min(self.state.term, message.term)
        super()._on_message(message)


class ObeysAnyTerm(SimWorker):
    """Obeys a deposed coordinator."""

    core_class = _ObeysAnyTerm


class _ObjectsToNothing(Ownership):
    def objection(self, session: Session, owned: Collection[ShardId]) -> str:
        return ""


class _NoObjection(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._ownership, _ObjectsToNothing)


class NoObjection(SimCoordinator):
    """Takes a worker back, whatever shards it holds."""

    core_class = _NoObjection


class _RevokesAndFrees(Ownership):
    def _revoke(self, session: Session, shards: list[ShardId]) -> None:
        super()._revoke(session, shards)
        for identity in shards:
            self._free(self._cluster.shards[identity])

    def released(self, session: Session, shards: Sequence[ShardId]) -> str:
        self.balance()
        return ""


class _FreesWhenRevoked(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._ownership, _RevokesAndFrees)


class FreesWhenRevoked(SimCoordinator):
    """Gives a shard to its next owner when the former one is asked to release it, and not when it has."""

    core_class = _FreesWhenRevoked


# --- transactions -------------------------------------------------------------------------------------


class _GoesOnAfterAbort(core.WorkerCore):
    def _on_transaction_failed(self, event: worker_events.TransactionFailed) -> None:
        now, flight = self.state, self.state.in_flight
        if event.session == now.session != 0 and flight is not None:
            now.in_flight = None
            now.send(messages.Committed(now.session, flight.epoch, 0.0, now.open.dirty, []))
        else:
            super()._on_transaction_failed(event)


class GoesOnAfterAbort(SimWorker):
    """Commits epoch e+1 although e was aborted."""

    core_class = _GoesOnAfterAbort


class _CommitsWhenFlushed(Epochs):
    def flushed(self, event: worker_events.EpochFlushed) -> None:
        super().flushed(event)
        flight = self._flight(event.session, event.epoch, model.EpochPhase.PREPARED)
        if flight is not None:
            flight.phase = model.EpochPhase.COMMITTING
            self._now.add(worker_events.CommitEpoch(self._now.session, event.epoch))


class _CommitsUndeclared(core.WorkerCore):
    def __init__(self, identity: model.Identity, bounds: model.Bounds, now_ms: int) -> None:
        super().__init__(identity, bounds, now_ms)
        plant(self._epochs, _CommitsWhenFlushed)


class CommitsUndeclared(SimWorker):
    """Commits when it has prepared, without waiting for the others."""

    core_class = _CommitsUndeclared


class GuessesCommitted(SimWorker):
    """Counts a commit of unknown outcome as done."""

    def commit_failed(
        self, effect: worker_events.CommitEpoch, sealed: FrozenEpoch, failure: KafkaFailure
    ) -> Thread:
        self.post(worker_events.EpochCommitted(effect.session, effect.epoch, 1.0, positions_of(sealed)))
        self.apply(effect.session, sealed)
        yield from ()


class GuessesAborted(SimWorker):
    """Counts a commit of unknown outcome as aborted, and returns to the former position."""

    guessed: dict[ShardId, CommittedPosition]

    def commit_failed(
        self, effect: worker_events.CommitEpoch, sealed: FrozenEpoch, failure: KafkaFailure
    ) -> Thread:
        shards = self.core.state.shards
        self.guessed = {
            frozen.shard: position
            for frozen in sealed.shards
            if frozen.shard in shards and (position := shards[frozen.shard].position)
        }
        yield from super().commit_failed(effect, sealed, failure)

    def read_positions(
        self, shards: tuple[ShardId, ...], positions: dict[ShardId, CommittedPosition | None]
    ) -> Thread:
        yield from super().read_positions(shards, positions)
        for shard, position in getattr(self, "guessed", {}).items():
            if shard in positions:
                positions[shard] = position if position.epoch else None
        self.guessed = {}


class RevivesItself(SimWorker):
    """Initialises its producer again within the session, and repeats the epoch whose commit failed."""

    def commit_failed(
        self, effect: worker_events.CommitEpoch, sealed: FrozenEpoch, failure: KafkaFailure
    ) -> Thread:
        try:
            name, session = sealed.producer.transactional_id, sealed.producer.session
            sealed.producer = yield Call("init", lambda: self.kafka.init_producer(name, session))
            yield Call(
                "produce",
                lambda: self.kafka.append(sealed.producer, sealed.outputs, self.world.now_ms),
                sealed.lane,
            )
            yield from self.write_deltas(sealed)
            yield from self.write_offsets(sealed)
            yield Call("commit", lambda: self.kafka.commit(sealed.producer), sealed.lane)
        except KafkaFailure as again:
            yield from super().commit_failed(effect, sealed, again)
            return
        if self.writer is not None and self.writer.session == session:
            self.writer.producers[self.writer.ids.index(name)] = sealed.producer
        self.post(worker_events.EpochCommitted(effect.session, effect.epoch, 1.0, positions_of(sealed)))
        self.apply(effect.session, sealed)


class DoesNotWaitForOutputs(SimWorker):
    """Begins epoch e+1 before the outputs of e are acknowledged."""

    def _prepare_epoch(self, effect: worker_events.PrepareEpoch) -> None:
        assert self.writer is not None
        frozen = [self._freeze(shard, effect.epoch) for shard in sorted(effect.shards)]
        self._outputs_flushed(self.writer, effect, self._seal(self.writer, effect, frozen))


class ForgetsRewind(SimWorker):
    """Processes records that were fetched before their shard was rewound."""

    def _process(self, runner: Runner, fetched: Fetched) -> None:
        super()._process(self.runners.get(runner.shard, runner), fetched)


class LeavesInputOut(SimWorker):
    """Commits only the offset of the first input of shards with several."""

    def offsets_of(self, frozen: FrozenShard) -> dict[Partition, tuple[int, str]]:
        return dict(list(super().offsets_of(frozen).items())[:1])


# --- state --------------------------------------------------------------------------------------------


class AppliesBeforeCommit(SimWorker):
    """Applies the layers of an epoch when it is flushed."""

    def write_offsets(self, sealed: FrozenEpoch) -> Thread:
        yield from super().write_offsets(sealed)
        super().apply(sealed.producer.session, sealed)

    def apply(self, session: int, sealed: FrozenEpoch) -> None:
        pass


class TrustsLocalFiles(SimWorker):
    """Runs a shard on local files that are ahead of the committed epoch, too."""

    def stands_exactly(self, request: RestoreRequest, store: SimStore) -> bool:
        return request.committed is not None and store.meta().state_epoch >= request.target_epoch


class AppliesBeforeCommitAndTrusts(AppliesBeforeCommit, TrustsLocalFiles):
    """Both: it runs a shard on what was applied too early."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        return super().new_state(shard, store)


class _CutShort(SimStore):
    def _damage(self, _changes: Mapping[bytes, bytes], _meta: StoreMeta) -> None:
        changed = self.data | _changes
        self.data, self._meta = {key: value for key, value in changed.items() if value}, _meta


class TrustsCutShortStores(SimWorker):
    """Writes no mark, and a store's new position with the first of several batches."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        plant(store, _CutShort)
        return super().new_state(shard, store)


class KeepsLayers(SimWorker):
    """Keeps the memory layers through a reset."""

    kept: dict[ShardId, ShardState]

    def _drop_states(self) -> None:
        self.kept = self.states
        self.states = {}

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        kept = getattr(self, "kept", {}).pop(shard, None)
        return kept if kept is not None and not store.closed else super().new_state(shard, store)


class KeepsUncommitted(SimWorker):
    """Keeps the memory layers through an abort."""

    def rewound(self, state: ShardState) -> ShardState:
        return state


class _AbortsNewest(Writer):
    def to_abort(self) -> list[int]:
        return [self.turn]


class AbortsNewest(SimWorker):
    """Aborts the open epoch, but not the prepared one before it."""

    writer_class = _AbortsNewest


class _ExpiresInMemory(EntryTable):
    __slots__ = ()

    def settle(self) -> None:
        gone = {key for key, value in self._open.items() if value is ABSENT}
        super().settle()
        for key in [key for key, value in self._open.items() if value is ABSENT and key not in gone]:
            self._clean[key] = self._open.pop(key)


class ExpiresInMemory(SimWorker):
    """Removes expired entries from memory, but not in the delta."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for table in state.tables.values():
            if isinstance(table, EntryTable):
                plant(table, _ExpiresInMemory)
        return state


class ForgetsTime(SimWorker):
    """Event time begins again with each restore."""

    def position_of(self, effect: worker_events.StartReading) -> CommittedPosition:
        at = effect.position
        return at.at([InputOffset(one.offset, one.topic_id) for one in at.inputs])


# --- timers and idle inputs ---------------------------------------------------------------------------


class LosesLateTimers(SimWorker):
    """Drops the timers that are already due when a shard is restored."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        timers = runner.timers
        while timers is not None and (found := timers._first_event()) is not None:
            handler, timer = found
            handler.timers.take("event", timer)
        return runner


class _RemovesInMemory(EntryTable):
    __slots__ = ()

    def settle(self) -> None:
        super().settle()
        for key in [key for key, value in self._open.items() if value is ABSENT]:
            self._clean[key] = self._open.pop(key)


class FiresAgain(SimWorker):
    """Removes timers that have fired from memory, but not in the delta."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for process in self.cluster.topology.stage(shard.stage).timed_processes:
            for name in TimerStore(process.name).store_names:
                plant(state.tables[name], _RemovesInMemory)
        return state


class _NamesNoShards(DueTimers):
    def take_fired(self) -> tuple[frozenset[ShardId], int]:
        _, fired = super().take_fired()
        for runner in self._timed.values():
            runner._fired_after = -1
        return frozenset(), fired


class LeavesFiredOut(SimWorker):
    """Leaves out of an epoch the shards in which only timers have fired."""

    def __init__(self, cluster: Cluster, name: str, host: str, wanted_slot: int) -> None:
        super().__init__(cluster, name, host, wanted_slot)
        plant(self._timers, _NamesNoShards)


class ForgetsIdle(SimWorker):
    """Reports that an input is idle, but commits that it isn't."""

    def _freeze(self, shard: ShardId, epoch: int) -> FrozenShard:
        frozen = super()._freeze(shard, epoch)
        stage, at = self.cluster.topology.stage(shard.stage), frozen.position
        clock = make_clock(stage, at)
        if clock is not None and not stage.inputs[0].internal:
            clock.set_idle(0, False)
            frozen.position = at.at([InputOffset(at.offset, at.topic_id, clock.encode(0))])
        return frozen


class _IdleAtOnce(IdleInputs):
    def look(
        self, runners: Iterable[ShardRunner], now_ms: float, held: Collection[ShardId] = ()
    ) -> frozenset[ShardId]:
        looked = list(runners)
        return super().look(looked, now_ms, held) | super().look(looked, now_ms + IDLE_MS, held)


class IdleAtOnce(SimWorker):
    """An input is idle as soon as it is at its end."""

    def __init__(self, cluster: Cluster, name: str, host: str, wanted_slot: int) -> None:
        super().__init__(cluster, name, host, wanted_slot)
        plant(self._idle_inputs, _IdleAtOnce)


# --- partitions that wait for each other ----------------------------------------------------------------


class _WaitsForIdle(Drift):
    def _waited_for(self, runner: ShardRunner) -> list[SlowestInput]:
        clock, step = runner.clock, self._stages[runner.stage.name]
        assert clock is not None
        return [
            SlowestInput(step.group, clock.source(number).watermark(), f"{one.topic}/{one.partition}")
            for number in step.inputs
            for one in [runner.inputs[number]]
        ]


class WaitsForIdle(SimWorker):
    """Partitions wait for others that are idle, or have no records at all."""

    def __init__(self, cluster: Cluster, name: str, host: str, wanted_slot: int) -> None:
        super().__init__(cluster, name, host, wanted_slot)
        if self._drift is not None:
            plant(self._drift, _WaitsForIdle)


class _ForgetsToRelease(Drift):
    def look(self, runners: Iterable[ShardRunner], elsewhere: Sequence[SlowestInput], now_ms: float) -> Turn:
        turn = super().look(runners, elsewhere, now_ms)
        return Turn(turn.hold)


class ForgetsToRelease(SimWorker):
    """Shards that were held are never read on."""

    def __init__(self, cluster: Cluster, name: str, host: str, wanted_slot: int) -> None:
        super().__init__(cluster, name, host, wanted_slot)
        if self._drift is not None:
            plant(self._drift, _ForgetsToRelease)


# --- windows ------------------------------------------------------------------------------------------


class ClosesAgain(SimWorker):
    """Removes windows and sessions that have closed from memory, but not in the delta."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for window in self.cluster.topology.stage(shard.stage).windows:
            for name in window.store.store_names:
                plant(state.tables[name], _RemovesInMemory)
        return state


class _Unwritten(EntryTable):
    __slots__ = ()

    def encode_touched(self) -> dict[bytes, bytes]:
        return {}


class LosesNotes(SimWorker):
    """Notes in memory, but not in the delta, when sessions and sliding windows are due."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for window in self.cluster.topology.stage(shard.stage).windows:
            if window.store.has_notes:
                plant(state.tables[window.store.due_name], _Unwritten)
        return state


class LosesMembers(SimWorker):
    """Remembers in memory, but not in the delta, what rows contribute to groups."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for regroup in self.cluster.topology.stage(shard.stage).regroups:
            plant(state.tables[regroup.store.name], _Unwritten)
        return state


class _UnwrittenRows(RowTable):
    __slots__ = ()

    def encode_touched(self) -> dict[bytes, bytes]:
        return {}


class _UnwrittenGroups(FollowedTable):
    __slots__ = ()

    def encode_touched(self) -> dict[bytes, bytes]:
        return {}


class LosesRunning(SimWorker):
    """Remembers in memory, but not in the delta, what it has computed of all records of a key."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for table in self.cluster.topology.stage(shard.stage).tables:
            kept = state.tables[table.store.name]
            plant(kept, _UnwrittenRows if isinstance(kept, RowTable) else _UnwrittenGroups)
        return state


class ForgetsStamps(SimWorker):
    """After a restore, records have Kafka's timestamps, and not the times in their values."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        if position.epoch:
            stage = replace(stage, inputs=tuple(replace(one, timestamp=None) for one in stage.inputs))
        return super().new_runner(stage, partition, state, position, idle_ms)


class DropsDueWindows(SimWorker):
    """Drops the windows that are already due when a shard is restored."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        timers = runner.timers
        while timers is not None and stage.windows and (found := timers._first_event()) is not None:
            handler, timer = found
            handler.timers.skipped(timer)
        return runner


class _ChangesWindows(SimWorker):
    """Declares the windows in another way than the job does."""

    def changed(self, window: Window, position: CommittedPosition) -> Window:
        """The window, as it is run by a shard that begins at this position."""
        raise NotImplementedError

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        chains = tuple(
            replace(
                chain,
                operators=tuple(
                    self.changed(one, position) if isinstance(one, Window) else one for one in chain.operators
                ),
            )
            for chain in stage.chains
        )
        return super().new_runner(replace(stage, chains=chains), partition, state, position, idle_ms)


class LosesOneSide(_ChangesWindows):
    """After a restore, when two sessions become one, the records of the later one are lost."""

    def changed(self, window: Window, position: CommittedPosition) -> Window:
        if not position.epoch:
            return window
        fields = tuple((name, replace(one, merge=lambda kept, _later: kept)) for name, one in window.fields)
        return replace(window, fields=fields)


def _late_by_worker(windows: Any, newest_ms: list[int]) -> Any:
    """Windows that are closed when any shard of the worker has come that far."""
    ends_of, grace_ms = windows.ends_of(), windows.grace_ms

    def ends(timestamp_ms: int) -> list[int]:
        newest_ms[0] = max(newest_ms[0], timestamp_ms)
        reached_ms = newest_ms[0] - MAX_DELAY_MS
        return [end for end in ends_of(timestamp_ms) if reached_ms < end + grace_ms]

    class LateByWorkerWindows(type(windows)):  # the engine looks at the kind of windows
        def ends_of(self) -> Callable[[int], list[int]]:
            return ends

    return LateByWorkerWindows(*(getattr(windows, field.name) for field in fields(windows)))


class LateByWorker(_ChangesWindows):
    """Decides what is late by what the worker has read of any shard, and not by the shard's clock."""

    newest_ms: list[int]

    def changed(self, window: Window, position: CommittedPosition) -> Window:
        if window.store.kind == "sessions":
            return window
        if not hasattr(self, "newest_ms"):
            self.newest_ms = [0]
        windows: Any = _late_by_worker(window.windows, self.newest_ms)
        return replace(window, windows=windows)


class ForgetsClosed(SimWorker):
    """After a restore, windows in processing time go by the clock of the host alone, although some have
    closed.
    """

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        for step in () if runner.timers is None else runner.timers.steps.values():
            if isinstance(step, OpenInTime) and isinstance(step.clock, ProcessingTime):
                step.clock.now_ms = -1
        return runner


class ForgetsWindowsOfTheClock(SimWorker):
    """After a restore, windows in processing time wait for the next record of their step."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        if runner.timers is not None:
            runner.timers._next_ms["processing"] = NEVER_MS
        return runner


# --- results at intervals -------------------------------------------------------------------------------


class _BreaksSteps(SimWorker):
    """Runs shards with another class for some of their steps."""

    broken: ClassVar[type]

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        for step in () if runner.timers is None else runner.timers.steps.values():
            if type(step) in self.broken.__bases__:
                plant(step, self.broken)
        return runner


class _TakesRecordsMeanwhile(OpenSessionsAtIntervals):
    def changing(self, session: list[Any]) -> None:
        pass


class TakesRecordsMeanwhile(_BreaksSteps):
    """Records get into the results of sessions that are already due."""

    broken = _TakesRecordsMeanwhile


class _ForgetsWhatWasTold(OpenSessionsAtIntervals):
    def merged(self, key: bytes, session: list[Any], later: list[Any]) -> None:
        told = list(session[_TOLD])
        super().merged(key, session, later)
        session[_TOLD] = told


class ForgetsWhatWasTold(_BreaksSteps):
    """When two sessions become one, it forgets what was told of the later one, and doesn't withdraw it."""

    broken = _ForgetsWhatWasTold


class _TakesAllParts(OpenGatheredAtIntervals):
    def _take_parts(self, window: list[Any], until_ms: int) -> tuple[list[Any], list[Part]]:
        return super()._take_parts(window, END_MS)


class TakesAllParts(_BreaksSteps):
    """The result of an interval has parts of later times, of shards that are ahead."""

    broken = _TakesAllParts


class _TellsFirstByRecord(OpenPartsAtIntervals):
    def changed(self, key: bytes, end_ms: int, kept: list[Any], timestamp_ms: int) -> None:
        OpenWindowsAtIntervals.changed(self, key, end_ms, kept, timestamp_ms)


class TellsFirstByRecord(_BreaksSteps):
    """While event time isn't known, a part is told after the time of its first record."""

    broken = _TellsFirstByRecord


class LosesResults(SimWorker):
    """Notes in memory, but not in the delta, when results are due."""

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        state = super().new_state(shard, store)
        for window in self.cluster.topology.stage(shard.stage).windows:
            plant(state.tables[window.store.notes_name], _Unwritten)
        return state


# --- event time of stages behind ------------------------------------------------------------------------


class ReportsTooMuch(SimWorker):
    """Reports event time to the stages behind, although results of earlier windows are still to come."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        if runner.clock is not None:
            runner.clock.tell_with(lambda now_ms: now_ms)
        return runner


# --- bounded runs --------------------------------------------------------------------------------------


class ReadsOn(SimWorker):
    """Processes all that was fetched together with the last record of a bounded run."""

    def _up_to_end(self, runner: Runner, fetched: Fetched) -> Fetched:
        cut = super()._up_to_end(runner, fetched)
        return fetched if cut.records and len(cut.records) < len(fetched.records) else cut


class TellsEndAtOnce(SimWorker):
    """Tells the stages behind that event time has ended before the last windows have closed."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        if runner.clock is not None and runner.timers is not None:
            told_of = runner.timers.told_ms
            runner.clock.tell_with(lambda due_ms: due_ms if due_ms == END_MS else told_of(due_ms))
        return runner


class EndsEarly(SimWorker):
    """Ends event time when a shard runs again, and not at the end of the run."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        if runner.clock is not None and not stage.inputs[0].internal and position.offset:
            runner.clock.end()
        return runner


class _KeepsNoEnd(_Source):
    __slots__ = ()

    def encode(self) -> tuple[str, list[int]]:
        kind, numbers = super().encode()
        return kind, [*numbers[:-1], numbers[-1] & 1]


class ForgetsEnd(SimWorker):
    """Doesn't commit that event time has ended."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        if runner.clock is not None and not stage.inputs[0].internal:
            plant(runner.clock.source(0), _KeepsNoEnd)
        return runner


class FixesEndAnew(SimCoordinator):
    """Each leader finds the ends for itself."""

    def run_end(self, found: Mapping[str, Any]) -> RunEnd | None:
        former = super().run_end(found)
        if former is None or not found.get(RUN_END_KEY):
            return former
        return RunEnd(
            former.text,
            {topic: {at: end + 2 for at, end in ends.items()} for topic, ends in former.offsets.items()},
        )


class _JudgesByOffsets(Progress):
    def judges_by_offsets(self) -> _JudgesByOffsets:
        self._ends_time_of = set()
        return self


class JudgesByOffsets(SimCoordinator):
    """Takes a stage for done when its last record is committed, though windows are still open."""

    class core_class(Coordinator):  # noqa: N801  what the shell calls it
        def __init__(self, terms: Terms, now_ms: float) -> None:
            super().__init__(terms, now_ms)
            plant(self.progress, _JudgesByOffsets).judges_by_offsets()  # type: ignore[attr-defined]


class _FollowsFirst(EventClock):
    __slots__ = ()

    def _move(self) -> bool:
        self._counted = self._inputs[:1]
        return super()._move()


class FollowsFirst(SimWorker):
    """The event time of a stage that merges follows its first input alone."""

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        runner = super().new_runner(stage, partition, state, position, idle_ms)
        if runner.clock is not None:
            plant(runner.clock, _FollowsFirst)
        return runner


# --- snapshots ----------------------------------------------------------------------------------------


class TruncatesUnverified(SimWorker):
    """Truncates the changelog up to a snapshot that wasn't verified."""

    def is_verified(self, shard: ShardId, manifest: Manifest) -> bool:
        return True

    def truncation_offset(self, shard: ShardId, changelog_id: str) -> int | None:
        newest = next(usable_manifests(self.cluster.snapshots, shard), None)
        return newest.changelog_offset if newest is not None else None


# --- several brokers ----------------------------------------------------------------------------------


class UnknownEndTaken(SimWorker):
    """Uses as an offset what a client answers when it doesn't know the end."""

    def known(self, answer: int, partition: Partition) -> int:
        return answer


class UnknownPositionTaken(SimWorker):
    """Treats a committed offset that the client doesn't know like one that was never committed."""

    def are_known(self, found: dict[Partition, tuple[int, str] | None]) -> bool:
        for partition, position in found.items():
            if position == NOT_KNOWN:
                found[partition] = None
        return True


class GuessesCommittedWhenMoved(GuessesCommitted):
    """Counts a commit as done if its coordinator has moved, because the next coordinator will know it."""

    def commit_failed(
        self, effect: worker_events.CommitEpoch, sealed: FrozenEpoch, failure: KafkaFailure
    ) -> Thread:
        moved = BROKER_GONE in str(failure)
        guess = super() if moved else super(GuessesCommitted, self)
        yield from guess.commit_failed(effect, sealed, failure)


# --- bugs that the simulation has found in the product ------------------------------------------------


class _WaitsForNoRestore(OwnedShards):
    def release(self, foreign: Any = ()) -> None:
        for owned in self._now.shards.values():
            if owned.phase is model.ShardPhase.RELEASING:
                owned.restoring = False
                owned.position = owned.position or CommittedPosition(0, 0, 0, "")
        super().release(foreign)


class _ReleasesInRestore(core.WorkerCore):
    def __init__(self, identity: model.Identity, bounds: model.Bounds, now_ms: int) -> None:
        super().__init__(identity, bounds, now_ms)
        plant(self._owned_shards, _WaitsForNoRestore)


class ReleasesInRestore(SimWorker):
    """Releases a shard during its restore."""

    core_class = _ReleasesInRestore


class _WarmsNothing(Ownership):
    def _begin_move(self, shard: Shard, slot: int, leaving: list[Shard]) -> None:
        shard.target = slot
        leaving.append(shard)


class _MovesAtOnce(Coordinator):
    def __init__(self, terms: Terms, now_ms: float) -> None:
        super().__init__(terms, now_ms)
        plant(self._ownership, _WarmsNothing)


class MovesAtOnce(SimCoordinator):
    """Moves shards without a warm copy, even during their restore. Workers can deal with that."""

    core_class = _MovesAtOnce


class _TakesAllForNew(OwnedShards):
    def is_new(self, order: Any) -> bool:
        return True


class _ObeysTwice(core.WorkerCore):
    def __init__(self, identity: model.Identity, bounds: model.Bounds, now_ms: int) -> None:
        super().__init__(identity, bounds, now_ms)
        plant(self._owned_shards, _TakesAllForNew)


class ObeysTwice(SimWorker):
    """Obeys an order that is delivered again."""

    core_class = _ObeysTwice


class CopiesBeforeWriting(SimWorker):
    """Begins copies before the late writes of a former session are in the stores."""

    def write_dropped_before_copies(self) -> None:
        pass


_PENDING_OFFSETS = "a stable reader waits for pending offsets, and no zombie gets a Complete"
_RESTORE_COMPARES = (
    "a restore compares the local epoch with the committed one, and each delta with the one before it"
)
_ONLY_COMMITTED = "nothing is applied that isn't committed"
_OBJECTION = (
    "a deposed leader can neither begin an epoch nor admit anybody, since the journal refuses it; and the "
    "next leader objects to what its worker brings back"
)


def _both(
    one: Mutation, other: Mutation, seed: int, finding: str, worker_class: type[SimWorker] | None = None
) -> Mutation:
    """Two rules are broken at once. Only the harm counts."""
    worker = other.worker_class if one.worker_class is SimWorker else one.worker_class
    coordinator = (
        other.coordinator_class if one.coordinator_class is SimCoordinator else one.coordinator_class
    )
    name = f"{one.name}, and {other.name}"
    parts = (replace(one, harm_only=True), replace(other, harm_only=True))
    return Mutation(name, seed, finding, worker_class or worker, coordinator, "", parts, harm_only=True)


NO_FENCE = Mutation(
    "no fence", 22, "after slot 0 was fenced", coordinator_class=NoFence, covered_by=_PENDING_OFFSETS
)
ONE_ID_FENCED = Mutation(
    "one id fenced", 274, "was fenced", coordinator_class=OneIdFenced, covered_by=_PENDING_OFFSETS
)
BEFORE_FENCE = Mutation(
    "offsets read before the fence",
    173,
    "which was given back",
    coordinator_class=AssignsBeforeFence,
    covered_by=_PENDING_OFFSETS,
)
UNSETTLED = Mutation("offsets unsettled", 112, "the outputs should be []", UnsettledOffsets)
APPLIED_EARLY = Mutation(
    "layers applied before the commit",
    4,
    "isn't committed",
    AppliesBeforeCommit,
    covered_by=_RESTORE_COMPARES,
)
LOCAL_TRUSTED = Mutation("local files trusted", 0, "", TrustsLocalFiles, covered_by=_ONLY_COMMITTED)
STALE_TERM = Mutation(
    "a stale term obeyed", 7236, "obeys a Evicted of term", ObeysAnyTerm, covered_by=_OBJECTION
)
RETURNING = Mutation("a returning worker keeps what it holds", 372, "owns", coordinator_class=NoObjection)

MUTATIONS = [
    NO_FENCE,
    ONE_ID_FENCED,
    BEFORE_FENCE,
    UNSETTLED,
    Mutation(
        "a failed fence taken as done", 712, "which was given back", coordinator_class=FailedFenceCounts
    ),
    Mutation("no fence for who begins anew", 892, "has its slot", coordinator_class=NoFenceForReturning),
    Mutation("end of the changelog unsettled", 175, "ends at epoch", UnsettledChangelog),
    Mutation(
        "welcome before the journal",
        1,
        "is welcomed before the journal holds it",
        coordinator_class=JournalLast,
    ),
    STALE_TERM,
    Mutation("journal unfenced", 1, "has its slot", coordinator_class=JournalUnfenced),
    Mutation(
        "epoch numbers not reserved",
        61,
        "was begun in term 1 and again in term 2",
        coordinator_class=EpochsFromCommitted,
    ),
    Mutation("sessions forgotten by a new leader", 1, "was fenced", coordinator_class=ForgetsSessions),
    RETURNING,
    Mutation(
        "a shard given away when revoked", 0, "which was given back", coordinator_class=FreesWhenRevoked
    ),
    Mutation("e+1 committed after e aborted", 29, "the outputs should be", GoesOnAfterAbort),
    Mutation("commit before complete", 1, "which was never declared complete to it", CommitsUndeclared),
    Mutation("an unknown commit taken as committed", 79, "the outputs should be", GuessesCommitted),
    Mutation("an unknown commit taken as aborted", 2, "the outputs should be []", GuessesAborted),
    Mutation("producers initialised twice in one session", 20, "owns", RevivesItself),
    Mutation(
        "e+1 begun before the outputs of e are acknowledged", 1, "a recount gives", DoesNotWaitForOutputs
    ),
    Mutation(
        "a merged input's offset left out",
        MERGED_SEEDS_FROM + 1,
        "the outputs should be",
        LeavesInputOut,
        harm_only=True,
    ),
    Mutation(
        "a merged input's offset left out, by the rule",
        MERGED_SEEDS_FROM + 1,
        "without the offset of",
        LeavesInputOut,
    ),
    Mutation("a TTL that isn't in the delta", KINDS_SEEDS_FROM + 1, "the deltas make", ExpiresInMemory),
    Mutation("a watermark that goes back", TIMED_SEEDS_FROM + 4, "but the records tell", ForgetsTime),
    Mutation("a late timer lost at a move", TIMERS_SEEDS_FROM + 27, "the outputs should be", LosesLateTimers),
    Mutation(
        "a timer that has fired is not removed in the delta", TIMERS_SEEDS_FROM, "the deltas make", FiresAgain
    ),
    Mutation(
        "a timer fired twice after a restore",
        TIMERS_SEEDS_FROM + 1,
        "the outputs should be",
        FiresAgain,
        harm_only=True,
    ),
    Mutation(
        "a shard left out in which only timers fired",
        TIMERS_SEEDS_FROM,
        "without its offset",
        LeavesFiredOut,
    ),
    Mutation(
        "an idle flag that isn't committed", TIMERS_SEEDS_FROM, "but is committed as False", ForgetsIdle
    ),
    Mutation(
        "partitions wait for an idle one",
        DRIFT_SEEDS_FROM + 5,
        "not everything is committed in time",
        WaitsForIdle,
    ),
    Mutation(
        "a shard that waited is not read on",
        DRIFT_SEEDS_FROM + 2,
        "not everything is committed in time",
        ForgetsToRelease,
    ),
    Mutation("an input idle at once", TIMERS_SEEDS_FROM, "ms ago", IdleAtOnce),
    Mutation(
        "a window's removal that isn't in the delta", WINDOWS_SEEDS_FROM + 26, "the deltas make", ClosesAgain
    ),
    Mutation(
        "a closed window emitted again after a restore",
        WINDOWS_SEEDS_FROM + 2,
        "the outputs should be",
        ClosesAgain,
        harm_only=True,
    ),
    Mutation(
        "a watermark that goes back, so a late record gets in",
        WINDOWS_SEEDS_FROM + 3,
        "the outputs should be",
        ForgetsTime,
        harm_only=True,
    ),
    Mutation(
        "sessions that become one after a move lose one side",
        WINDOWS_SEEDS_FROM + 3,
        "the deltas make",
        LosesOneSide,
    ),
    Mutation(
        "late by the worker's order, not by the shard's clock",
        WINDOWS_SEEDS_FROM + 9,
        "the outputs should be",
        LateByWorker,
    ),
    Mutation(
        "a session that isn't found after a restore",
        WINDOWS_SEEDS_FROM + 6,
        "is due in event time, but hasn't fired",
        LosesNotes,
        harm_only=True,
    ),
    Mutation(
        "due windows dropped at a restore", WINDOWS_SEEDS_FROM + 57, "the outputs should be", DropsDueWindows
    ),
    Mutation("event time reported too early", WINDOWS_SEEDS_FROM + 24, "is said to be at", ReportsTooMuch),
    Mutation(
        "results too late for the next windows",
        WINDOWS_SEEDS_FROM + 27,
        "is too late for its window",
        ReportsTooMuch,
        harm_only=True,
    ),
    Mutation(
        "a merged input left out of event time", WINDOWS_SEEDS_FROM, "but the records tell", FollowsFirst
    ),
    Mutation(
        "a sliding window that isn't found after a restore",
        SLIDING_SEEDS_FROM + 4,
        "the outputs should be",
        LosesNotes,
        harm_only=True,
    ),
    Mutation(
        "results at intervals that aren't found after a restore",
        INTERVALS_SEEDS_FROM + 7,
        "the outputs should be",
        LosesResults,
        harm_only=True,
    ),
    Mutation(
        "records in results that were due",
        INTERVALS_SEEDS_FROM + 2,
        "the outputs should be",
        TakesRecordsMeanwhile,
    ),
    Mutation(
        "what was told of a session forgotten",
        INTERVALS_SEEDS_FROM + 2,
        "the outputs should be",
        ForgetsWhatWasTold,
        harm_only=True,
    ),
    Mutation(
        "parts of later times in a result", INTERVALS_SEEDS_FROM + 1, "the outputs should be", TakesAllParts
    ),
    Mutation(
        "first parts told too late", INTERVALS_SEEDS_FROM + 7, "the outputs should be", TellsFirstByRecord
    ),
    Mutation("closed windows opened again", CLOCK_SEEDS_FROM + 44, "has two results", ForgetsClosed),
    Mutation(
        "windows that wait for a record",
        CLOCK_SEEDS_FROM + 1,
        "is due in processing time, but hasn't fired",
        ForgetsWindowsOfTheClock,
    ),
    Mutation("times in values forgotten", SLIDING_SEEDS_FROM + 6, "the outputs should be", ForgetsStamps),
    Mutation("contributions that aren't in the delta", TABLES_SEEDS_FROM, "the deltas make", LosesMembers),
    Mutation(
        "groups that lose nothing after a restore",
        TABLES_SEEDS_FROM + 2,
        "the outputs should be",
        LosesMembers,
        harm_only=True,
    ),
    Mutation("aggregates that aren't in the delta", RUNNING_SEEDS_FROM, "the deltas make", LosesRunning),
    Mutation(
        "aggregates that begin anew after a restore",
        RUNNING_SEEDS_FROM + 2,
        "the outputs should be",
        LosesRunning,
        harm_only=True,
    ),
    Mutation("records behind the end", BOUNDED_SEEDS_FROM, "but the run ends at", ReadsOn),
    Mutation(
        "the end told before the last windows", BOUNDED_SEEDS_FROM + 20, "is said to be at", TellsEndAtOnce
    ),
    Mutation(
        "event time ended too early", BOUNDED_SEEDS_FROM + 3, "ends before all inputs are read", EndsEarly
    ),
    Mutation("the end not committed", BOUNDED_SEEDS_FROM, "is said to be at", ForgetsEnd),
    Mutation(
        "ends fixed anew by each leader",
        BOUNDED_SEEDS_FROM,
        "but the run ends at",
        coordinator_class=FixesEndAnew,
    ),
    Mutation(
        "a run over before its windows have closed",
        BOUNDED_SEEDS_FROM + 5,
        "the run is said to be over",
        coordinator_class=JudgesByOffsets,
    ),
    Mutation("records fetched before a rewind", 507, "the outputs should be []", ForgetsRewind),
    APPLIED_EARLY,
    Mutation("layers kept over an abort", 37, "the outputs should be", KeepsUncommitted),
    Mutation("one of two transactions aborted", 58, "the outputs should be", AbortsNewest),
    Mutation("layers kept over a reset", 2, "the outputs should be", KeepsLayers),
    Mutation("a store that was cut short is trusted", 217, "was restored at", TrustsCutShortStores),
    Mutation("changelog truncated past an unverified snapshot", 36, "can't be restored", TruncatesUnverified),
    # The coordinator waits for the end of a restore. A new one doesn't know of it, but that is rare.
    Mutation(
        "a shard given back in its restore",
        352,
        "is closed",
        ReleasesInRestore,
        MovesAtOnce,
        parts=(Mutation("moves at once", 0, "", coordinator_class=MovesAtOnce),),
    ),
    Mutation("an order obeyed twice", 395, "owns", ObeysTwice),
    Mutation("copies begun before a former session's writes", 8, "a store of", CopiesBeforeWriting),
    # On several brokers.
    Mutation("an unknown end taken for a value", 117, "ends at epoch ", UnknownEndTaken),
    Mutation("an old position taken", 197, ", committed is ", OldPositionTaken),
    Mutation("an unknown position taken for none", 1467, "committed is ", UnknownPositionTaken),
    Mutation(
        "a commit taken as done when its coordinator moved",
        127,
        "which isn't committed",
        GuessesCommittedWhenMoved,
    ),
    # Combined, where one rule prevents the harm that the breach of the other does.
    _both(NO_FENCE, UNSETTLED, 132, "the outputs should be []"),
    _both(ONE_ID_FENCED, UNSETTLED, 13, "the outputs should be"),
    _both(BEFORE_FENCE, UNSETTLED, 522, "the outputs should be []"),
    _both(APPLIED_EARLY, LOCAL_TRUSTED, 44, "was restored at", AppliesBeforeCommitAndTrusts),
]
BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
