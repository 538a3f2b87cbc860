"""A model of the worker's shell: what `worker/server.py`, its parts and `shards.py` do around the real core.

Responsible for: the threads of a worker and what can happen between them. The main thread owns the core, the
runners and the open epoch. It waits while outputs are flushed. The commit thread runs the steps of an epoch,
one after another. The restore thread opens and closes stores. Snapshots and heartbeats run in threads of
their own. The core, the state layers, the changelog's codec and the restore plan are the product's code.

Must not: decide questions of the protocol. If it does something that the real shell doesn't do, its results
prove nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from fcluster.common.errors import FclusterError, StateDamaged, failure_of
from fcluster.common.ids import ShardId, transactional_ids
from fcluster.common.offsets import NotKnownYetError, known_offset
from fcluster.common.positions import (
    CommittedPosition,
    InputOffset,
    SplitPositionError,
    decode_position,
    joined_position,
)
from fcluster.coordinator.core.events import ProcessEnded
from fcluster.engine.changelog import Delta, DeltaReader, encode_delta
from fcluster.engine.merging import InputMerge
from fcluster.engine.records import OutputPort
from fcluster.engine.stamps import orders_of
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.engine.watermarks import OwnRecord, Telling
from fcluster.graph.drift import keep_step
from fcluster.graph.stages import Stage
from fcluster.storage.restore_plan import Base, RestorePlan, RestoreRequest, plan_restore, stands_exactly
from fcluster.storage.snapshots import Manifest, prune, truncation_offset, usable_manifests
from fcluster.wire import messages
from fcluster.wire.messages import WorkerStats
from fcluster.worker.core import events, model
from fcluster.worker.core import worker as core
from fcluster.worker.core.reported_offsets import ReportedOffsets
from fcluster.worker.drift import Drift
from fcluster.worker.ending_inputs import end_times
from fcluster.worker.idle_inputs import IdleInputs
from fcluster.worker.inbox import Inbox
from fcluster.worker.processing import ShardRunner
from fcluster.worker.record_watch import RecordWatch
from fcluster.worker.reporting import statuses_of_runner
from fcluster.worker.timers import DueTimers
from fcluster.worker.transactions import AwaitedOutputs
from tests.simulation.brokers import GROUP, GroupReader
from tests.simulation.copies import PATIENCE_MS, SimTail
from tests.simulation.jobs import BEGIN_MS, Origin, Read, Step, Written
from tests.simulation.kafka_model import Partition, Producer
from tests.simulation.storage import Disk, SimStore
from tests.simulation.world import Call, Dealer, KafkaFailure, Lane, Process, Sleep, Thread
from tests.state_memory import EntriesMax

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

DELTA_RECORD_BYTES_MAX = 120
"""Small, so that some deltas are cut into several records."""
NO_OFFSET = -1001
NOT_KNOWN = (NO_OFFSET, "not known yet")
REST_POLL_MS = 5
UNSETTLED_RETRY_MS = 20
TELL_INTERVAL_MS = 30
"""The interval at which event time is told to stages that don't need it. Shorter than in the product, so that
more happens."""


class Runner(ShardRunner):
    """A shard that is being read: the real runner, and how far its inputs are fetched. It is dropped together
    with its position."""

    def __init__(
        self,
        stage: Stage,
        partition: int,
        state: ShardState,
        position: CommittedPosition,
        port: OutputPort,
        idle_ms: int,
        wall_ms: Callable[[], int],
        job_start: int,
    ) -> None:
        super().__init__(stage, partition, state, position, port, wall_ms, job_start)
        self.sources: list[Partition] = [(topic, partition) for topic in stage.topics]
        self.fetched_up_to = [at.offset for at in position.inputs]
        several = len(self.sources) > 1
        orders = orders_of(stage)
        self.merge = (
            InputMerge(len(self.sources), idle_ms, stage.precedence, orders, self.unloaded)
            if several
            else None
        )
        self.read_up_to = list(self.fetched_up_to)
        self.taken: list[Read] = []
        """Records that have left the merge, but have to wait until timers have fired."""
        self.steps: list[Step] = []
        """What the checks can't see of the open epoch, if there are several inputs and event time."""
        self.reading = True
        self.held = False
        self.parked: list[int] = []
        """The inputs to fetch from once the shard is no longer held back."""
        self.may_be_idle = any(
            source.watermark is not None and source.watermark.idle_ms is not None for source in stage.inputs
        )
        self.needs_ends = self.merge is not None or self.may_be_idle or bool(stage.broadcasts)


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of one fetch for a runner: records of one input, or none.

    Attributes:
        number: which input. -1: no input was read, but time has passed.
        records: offset and record of each.
        position: the next offset to fetch.
        end: the partition's end. None: unknown.
    """

    number: int
    records: list[tuple[int, Written]]
    position: int
    end: int | None = None


@dataclass(slots=True)
class FrozenShard:
    """One shard in a frozen epoch."""

    shard: ShardId
    state: ShardState
    position: CommittedPosition
    delta: Delta | None
    changelog_next: int = 0


@dataclass(slots=True)
class FrozenEpoch:
    """What one worker commits in an epoch. Mutations use `outputs` to write them a second time."""

    epoch: int
    records: int
    producer: Producer
    lane: Lane
    shards: list[FrozenShard]
    outputs: list[tuple[Partition, Any]] = field(default_factory=list[tuple[Partition, Any]])
    awaited: AwaitedOutputs = field(default_factory=AwaitedOutputs)
    delta_lane: Lane = field(default_factory=Lane)
    offsets_lane: Lane = field(default_factory=Lane)
    """Other partitions, and other brokers than those of the outputs: neither waits for the other."""


class CommitThread:
    """The thread of one session. It runs one task after another. After a shutdown it only ends the running
    one."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._tasks: deque[Thread | Callable[[], None]] = deque()
        self.running = False

    def submit(self, task: Thread | Callable[[], None]) -> None:
        """Add a task behind those submitted before."""
        self._tasks.append(task)
        if not self.running:
            self.running = True
            self._worker.later(0, self._next)

    def shut_down(self) -> None:
        """Drop the tasks that haven't started."""
        self._tasks.clear()

    def marker(self) -> Callable[[], bool]:
        """Returns a function that tells whether all tasks submitted before are done or dropped."""
        passed: list[bool] = []
        if not self.running:
            return lambda: True
        self._tasks.append(lambda: passed.append(True))
        return lambda: bool(passed) or not self.running

    def _next(self) -> None:
        if not self._tasks:
            self.running = False
            return
        task = self._tasks.popleft()
        if callable(task):
            task()
            self._worker.later(0, self._next)
        else:
            self._worker.start(task, self._next)


class Writer:
    """The two producers of a session."""

    def __init__(self, worker: SimWorker, session: int, slot: int) -> None:
        self.worker = worker
        self.session = session
        self.ids = transactional_ids(worker.cluster.topology.job, slot)
        self.producers: list[Producer] = []
        self.lanes = [Lane(), Lane()]
        self.turn = 0
        self.unacknowledged = 0
        self.failure: KafkaFailure | None = None
        self.life = 0
        """Counts aborts. What was produced before one no longer counts."""
        self.destroyed = False
        self.outputs: list[tuple[Partition, Any]] = []
        self.on_flushed: Callable[[], None] | None = None

    def open(self) -> Thread:
        """Initialise both producers (commit thread)."""
        kafka, worker = self.worker.kafka, self.worker
        self.producers = []
        try:
            for transactional_id in self.ids:
                producer = yield Call(
                    "init",
                    lambda name=transactional_id: kafka.init_producer(name, self.session),
                    place=transactional_id,
                )
                self.producers.append(producer)
        except KafkaFailure as failure:
            worker.post(events.TransactionFailed(self.session, f"initialising the producers: {failure}"))
            return
        worker.step("producers opened")
        worker.post(events.ProducersOpened(self.session))

    def produce(self, records: list[tuple[Partition, Any]]) -> None:
        """Write outputs, without waiting for them (main thread)."""
        self.unacknowledged += 1
        self.outputs += records
        producer, world = self.producers[self.turn], self.worker.world
        call = Call(
            "produce",
            lambda: self.worker.kafka.append(producer, records, world.now_ms),
            self.lanes[self.turn],
            place=records[0][0],
            may_be_refused=True,
        )
        world.call(self.worker, call, partial(self._acknowledged, self.life))

    def _acknowledged(self, life: int, _result: Any, failure: KafkaFailure | None) -> None:
        if life != self.life:
            return
        self.unacknowledged -= 1
        if failure is not None and self.failure is None:
            self.failure = failure
        if self.on_flushed is not None and (self.failure or not self.unacknowledged):
            on_flushed, self.on_flushed = self.on_flushed, None
            on_flushed()

    def flush_outputs(self, then: Callable[[], None]) -> None:
        """Call `then` when all outputs are acknowledged or one has failed."""
        if self.failure or not self.unacknowledged:
            then()
        else:
            self.on_flushed = then

    def stop_waiting(self) -> None:
        """The epoch has failed elsewhere: let the main thread go on."""
        if self.on_flushed is not None:
            on_flushed, self.on_flushed = self.on_flushed, None
            on_flushed()

    def begin_abort(self) -> None:
        """Forget what was produced (main thread)."""
        self.life += 1
        self.unacknowledged, self.failure, self.outputs = 0, None, []

    def to_abort(self) -> list[int]:
        """Which producers abort."""
        return [0, 1]

    def abort(self) -> Thread:
        """Abort their transactions (commit thread)."""
        kafka = self.worker.kafka
        for number in self.to_abort():
            producer = self.producers[number]
            self.producers[number] = yield Call(
                "abort",
                lambda producer=producer: kafka.abort_and_go_on(producer),
                self.lanes[number],
                place=producer.transactional_id,
            )

    def seal(self, epoch: int, records: int, shards: list[FrozenShard]) -> FrozenEpoch:
        """Hand the open epoch to the commit thread. The other producer takes the next epoch."""
        producer, lane = self.producers[self.turn], self.lanes[self.turn]
        self.turn = 1 - self.turn
        outputs, self.outputs = self.outputs, []
        return FrozenEpoch(epoch, records, producer, lane, shards, outputs)


class SimWorker(Process):
    """One worker process."""

    core_class: type[core.WorkerCore] = core.WorkerCore
    writer_class: type[Writer] = Writer

    def __init__(self, cluster: Cluster, name: str, host: str, wanted_slot: int) -> None:
        super().__init__(cluster.world, name)
        self.cluster = cluster
        self.kafka = cluster.kafka
        self.host = host
        self.wanted_slot = wanted_slot
        self.exit_code: int | None = None
        self.returns = False
        """Whether its supervisor starts a new worker after this one has left (rolling restart)."""
        self.is_drained = False
        """Whether an operator has asked for it to leave. It may not know yet."""
        self._terminated = False
        self.disk: Disk | None = None
        self.slot = -1
        identity = model.Identity(
            name, host, cluster.next_pid(), wanted_slot, cluster.topology.fingerprint, "snapshots", "1"
        )
        settings = cluster.settings
        bounds = model.Bounds(
            cluster.epoch_records_max,
            settings.coordinator_loss_bound_ms,
            settings.offset_refresh_interval_ms,
            hello_retry_ms=400,
            leave_timeout_ms=settings.worker_leave_timeout_ms,
            last_commit_timeout_ms=settings.checkpoint_timeout_ms,
            leader_patience_ms=2 * settings.session_timeout_ms,
        )
        self.core = self.core_class(identity, bounds, self.world.now_ms)
        self.dealer = Dealer(self, name.encode(), self._on_frame, lambda: self.post(events.Connected()))
        self.inbox: deque[Any] = deque()
        self._effects: deque[events.Effect] = deque()
        self._busy = False
        self._hanging = False
        self._reading_paused = False
        self._held_batches: list[tuple[Runner, Fetched]] = []
        self.writer: Writer | None = None
        self.commit_thread: CommitThread | None = None
        self._retired: list[CommitThread] = []
        self.restore_thread = CommitThread(self)
        self._restore_stop = [False]
        self.tail = SimTail(self)
        self.reported = ReportedOffsets()
        self._reader = GroupReader(self.world)
        self.states: dict[ShardId, ShardState] = {}
        self._dropped: list[ShardState] = []
        self.runners: dict[ShardId, Runner] = {}
        self._telling = Telling(self.cluster.topology, TELL_INTERVAL_MS)
        self._port = OutputPort()
        self._port.produce = self._hold_output
        self._port.stage_sizes = self.core.state.stage_sizes
        self._port.letters.most = cluster.settings.dead_letters_max
        self._outputs: list[tuple[Partition, Written]] = []
        self._interrupting = Inbox()  # holds only what interrupts a batch; everything else waits in `inbox`
        self._record_watch = RecordWatch()
        self._timed: dict[ShardId, ShardRunner] = {}
        self._timers = DueTimers(self._timed, self._interrupting, self._record_watch, self.wall_ms)
        self._wakes_at_ms = 0
        self._has_fired = False
        self._idle_inputs = IdleInputs()
        keeping_step = keep_step(self.cluster.topology)
        self._drift = Drift(keeping_step) if keeping_step else None
        self._epoch_records = 0
        self.pending: FrozenEpoch | None = None
        self._snapshot_epochs: dict[ShardId, int] = {}
        self._searched_ms = -(10**9)
        self._highest_term = 0
        self._misled = False
        error_ms_max = cluster.job.clock_error_ms_max
        self._clock_error_ms = Random(f"{self.world.seed} {host}").randint(-error_ms_max, error_ms_max)
        self.later(self.world.up_to(20), self._pulse)
        self.later(settings.snapshot_interval_ms, self._begin_snapshots)

    # --- life -----------------------------------------------------------------------------------------

    def step(self, name: str) -> None:
        """A point at which faults are likely to happen."""
        self.cluster.step(self, f"worker: {name}")

    def wall_ms(self) -> int:
        """The clock of its host, in milliseconds."""
        return BEGIN_MS + self.world.now_ms + self._clock_error_ms

    def terminate(self) -> None:
        """SIGTERM."""
        self._terminated = True
        self.post(events.TerminationRequested())

    @property
    def leaving(self) -> bool:
        """Whether it was asked to leave."""
        return self._terminated or self.core.state.leaving

    def died(self) -> None:
        world = self.world
        if self.disk is not None and self.disk.owner is self:
            self.disk.crash(world.random)
        flush_ms = world.up_to(8) if world.chance(0.5) else None
        self.dealer.close(world.up_to(5), flush_ms=flush_ms)
        # A generator of its own, so that the other choices of a seed don't depend on how the end is noticed.
        chance = Random(f"{world.seed} {self.name}")
        for coordinator in self.cluster.living_coordinators:
            if chance.random() < 0.5:  # the coordinator runs on the same host
                coordinator.later(chance.randint(0, 6), coordinator.feed, ProcessEnded(self.name))
        self.cluster.worker_ended(self)

    def _exit(self, effect: events.Exit) -> None:
        """End the process. Whatever the core chose not to do is left undone."""
        self.note("exits with code %d: %s", effect.code, effect.reason)
        self.exit_code = effect.code
        if self.disk is not None and self.disk.owner is self:
            resting = self.commit_thread is None or not self.commit_thread.running
            for shard, state in self.states.items():
                if resting and not self.disk.full:
                    state.flush()
                self.disk.close(shard)
            self.disk.crash(self.world.random)
        self.alive = False
        self.dealer.close(1, flush_ms=self.world.timing.network_ms_max * 4 + 1)
        self.cluster.worker_ended(self)

    # --- the main thread ------------------------------------------------------------------------------

    def post(self, item: Any) -> None:
        """Put something in the inbox of the main thread."""
        if not self.alive:
            return
        self.inbox.append(item)
        self._drain()

    def hang(self, duration_ms: int) -> None:
        """Keep the main thread busy for this time. The other threads continue."""
        if not self._hanging:
            self.note("## main thread hangs for %d ms", duration_ms)
            self._hanging = True
            self.later(duration_ms, self._unhang)

    def _unhang(self) -> None:
        self._hanging = False
        self._drain()

    def _drain(self) -> None:
        while self.alive and not self._busy and not self._hanging:
            if self._effects:
                self._carry_out(self._effects.popleft())
            elif self._timers_come_next():
                self._fire()
            elif self.inbox:
                item = self.inbox.popleft()
                if isinstance(item, tuple):
                    self._process(*item)
                elif callable(item):
                    item()
                else:
                    self._feed(item)
            else:
                self._wake_for_timers()
                return

    def _feed(self, event: events.Event) -> None:
        if self.world.transcript is not None:
            self._note_event(event)
        effects = self.core.handle(event, self.world.now_ms)
        self.core.invariants()
        self._effects.extend(effects)
        if isinstance(event, events.MessageReceived):
            self._check_term(event.message, effects)
            self.step(f"{type(event.message).__name__} received")

    def _check_term(self, message: messages.FromCoordinator, effects: list[events.Effect]) -> None:
        """Check that the core doesn't act on a leader's message after it has heard from a later leader."""
        obeyed = any(not isinstance(effect, events.Log) for effect in effects)
        if message.term < self._highest_term and obeyed and not self.cluster.checks.harm_only:
            name = type(message).__name__
            self.cluster.checks.fail(
                f"{self.name} obeys a {name} of term {message.term}, but knows of term {self._highest_term}"
            )
        self._highest_term = max(self._highest_term, message.term)

    def _note_event(self, event: events.Event) -> None:
        match event:
            case events.Tick():
                pass
            case events.MessageReceived(message):
                if not isinstance(message, messages.HeartbeatAck):
                    self.note("<- %s", shown(message))
            case _:
                self.note("%s", shown(event))

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.Send():
                if self.world.transcript is not None:
                    self.note("-> %s", shown(effect.message))
                self.dealer.send(messages.encode(effect.message))
            case events.PrepareEpoch():
                self._prepare_epoch(effect)
            case events.CommitEpoch():
                self._commit_epoch(effect)
            case events.StartReading():
                self._start_reading(effect)
            case events.EndInput(end):
                self.runners[end.shard].inputs[end.input].stop_at = end.offset
            case events.StopReading():
                for shard in effect.shards:
                    self._timed.pop(shard, None)
                    if shard in self.runners:
                        self.runners[shard].reading = False
            case events.PauseReading():
                self.note("pauses: %s", effect.reason)
                self._reading_paused = True
            case events.ResumeReading():
                self._reading_paused = False
                held, self._held_batches = self._held_batches, []
                self.inbox.extendleft(reversed(held))  # in front of what was fetched after them
            case events.OpenProducers():
                self._open_producers(effect)
            case events.DestroyProducers():
                self._destroy_writer()
            case events.AbortEpochs():
                self._abort_epochs(effect)
            case events.RewindShards():
                self._rewind(effect.shards)
            case events.RestoreShards():
                self.note("restores %s", " ".join(map(str, effect.shards)))
                retired, self._retired = self._retired, []
                self.restore_thread.submit(
                    self._restore(
                        effect.session, effect.shards, effect.committed, retired, self._restore_stop
                    )
                )
            case events.KeepStandbys():
                self.restore_thread.submit(self._keep_standbys(set(effect.shards), tuple(self._retired)))
            case events.DropLayers():
                self._drop_layers()
            case events.CloseShards():
                self._close_shards(effect.shards)
            case events.Log():
                if effect.level != "info":
                    self.note("log: %s", effect.text)
            case events.Exit():
                self._exit(effect)
                return
        if not isinstance(effect, events.Log):
            self.step(f"{type(effect).__name__} carried out")

    def _open_producers(self, effect: events.OpenProducers) -> None:
        if not self._take_disk(effect.slot):
            return
        self.writer = self.writer_class(self, effect.session, effect.slot)
        self.commit_thread = CommitThread(self)
        self.commit_thread.submit(self._at_rest(tuple(self._retired)))
        self.commit_thread.submit(self.writer.open())

    def _at_rest(self, threads: Iterable[CommitThread]) -> Thread:
        """Wait until these threads of former sessions are idle."""
        while any(thread.running for thread in threads):
            yield Sleep(REST_POLL_MS)

    def _take_disk(self, slot: int) -> bool:
        """Take ownership of the slot's part of the state directory. False: another process has it."""
        disk = self.cluster.disk(self.host, slot)
        if disk.owner is self:
            return True
        if disk.owner is not None:
            self.note("the directory of slot %d is in use by %s", slot, disk.owner)
            self.exit_code = 1
            self.kill("its directory is in use")
            return False
        if self.disk is not None:
            self._write_dropped()
            self.tail.leave()
            for shard in list(self.disk.stores):
                self.disk.close(shard)
            self.disk.owner = None
        disk.owner, self.disk, self.slot = self, disk, slot
        return True

    def _destroy_writer(self) -> None:
        if self.commit_thread is not None:
            self.commit_thread.shut_down()
            self._retired.append(self.commit_thread)
            self.commit_thread = None
        if self.writer is not None:
            self.writer.destroyed = True
            self._telling = Telling(self.cluster.topology, TELL_INTERVAL_MS)
            self.writer = None

    def _abort_epochs(self, effect: events.AbortEpochs) -> None:
        assert self.writer is not None
        assert self.commit_thread is not None
        self.writer.begin_abort()
        self._telling = Telling(self.cluster.topology, TELL_INTERVAL_MS)
        self._epoch_records = 0
        self.commit_thread.submit(self.abort_epochs(self.writer, effect.session, list(self.states.values())))

    def abort_epochs(self, writer: Writer, session: int, states: list[ShardState]) -> Thread:
        """Abort what isn't committed, and write what is (commit thread)."""
        try:
            yield from writer.abort()
            for state in states:
                state.flush()
        except (KafkaFailure, FclusterError) as failure:
            self.post(events.TransactionFailed(session, f"aborting: {failure}"))
            return
        self.world.landed["epochs aborted in their session"] += 1
        self.step("epochs aborted")
        self.post(events.EpochsAborted(session))

    def _rewind(self, shards: tuple[ShardId, ...]) -> None:
        for shard in shards:
            self.runners.pop(shard, None)
            self.states[shard] = self.rewound(self.states[shard])

    def rewound(self, state: ShardState) -> ShardState:
        """A shard's state without what isn't committed."""
        return state.of_the_store()

    def _drop_layers(self) -> None:
        self.runners.clear()
        self._timed.clear()
        self._restore_stop[0] = True
        self._restore_stop = [False]
        self._drop_states()
        self._epoch_records = 0

    def _drop_states(self) -> None:
        self._dropped += self.states.values()
        self.states = {}

    def _write_dropped(self) -> None:
        dropped, self._dropped = self._dropped, []
        for state in dropped:
            try:
                state.flush()
            except FclusterError as error:
                self.note("writing committed state: %s", error.message)

    def write_dropped_before_copies(self) -> None:
        """Write what a former session left unwritten. Otherwise these writes would come after those of a
        copy."""
        self._write_dropped()

    def _close_shards(self, shards: tuple[ShardId, ...]) -> None:
        self._telling.forget(shards)
        for shard in shards:
            self.runners.pop(shard, None)
        states = {shard: self.states.pop(shard, None) for shard in shards}
        self.restore_thread.submit(self._close_released(states, self.commit_thread))

    def _close_released(
        self, states: dict[ShardId, ShardState | None], writing: CommitThread | None
    ) -> Thread:
        """Close stores in the restore thread, once the commit thread has written to them for the last
        time."""
        if writing is not None:
            reached = writing.marker()
            while not reached():
                yield Sleep(1)
        for shard, state in states.items():
            self._close_one(shard, state)

    def _close_one(self, shard: ShardId, state: ShardState | None) -> None:
        assert self.disk is not None
        try:
            if state is not None:
                state.flush()
        except FclusterError as error:
            self.note("closing %s: %s", shard, error.message)
        self.disk.close(shard)

    # --- records --------------------------------------------------------------------------------------

    def _start_reading(self, effect: events.StartReading) -> None:
        idle_ms = self.cluster.settings.max_task_idle_ms
        shard, stage = effect.shard, self.cluster.topology.stage(effect.shard.stage)
        state = self.states[shard]
        runner = self.new_runner(stage, shard.partition, state, self.position_of(effect), idle_ms)
        for number, end in self.ends_of(effect).items():
            runner.inputs[number].stop_at = end
        offsets = "+".join(str(at.offset) for at in effect.position.inputs)
        self.note("runs %s from offset %s", effect.shard, offsets)
        self.runners[effect.shard] = runner
        if runner.timers is not None:
            self._timed[shard] = runner
        self._timers.start(runner, None)
        for number in range(len(runner.sources)):
            self._fetch(runner, number)

    def ends_of(self, effect: events.StartReading) -> Mapping[int, int]:
        """Where a bounded run ends in the shard's inputs."""
        return effect.ends

    def position_of(self, effect: events.StartReading) -> CommittedPosition:
        """The position at which the shard starts."""
        return effect.position

    def new_runner(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, idle_ms: int
    ) -> Runner:
        """Create what processes the records of a shard."""
        job_start = self.core.state.job_start
        self.cluster.checks.starts.add(job_start)
        runner = Runner(stage, partition, state, position, self._port, idle_ms, self.wall_ms, job_start)
        if runner.timers is not None:
            runner.timers.at_once_max = self.cluster.fired_at_once_max
        return runner

    def _fetch(self, runner: Runner, number: int) -> None:
        """Fetch the next records of an input. They are posted as soon as there are some."""
        if self.runners.get(runner.shard) is not runner or not runner.reading:
            return
        if runner.held and runner.merge is None:
            runner.parked.append(number)
            return
        source, position = runner.sources[number], runner.fetched_up_to[number]
        stop_at = runner.inputs[number].stop_at
        if stop_at is not None and position >= stop_at:
            self.later(0, self.post, (runner, Fetched(number, [], position, position)))
            return
        if self.kafka.last_stable_offset(source) <= position:
            self.cluster.when_stable(source, lambda: self.later(0, self._fetch, runner, number))
            if runner.needs_ends or self.cluster.run_end is not None:
                fetched = Fetched(number, [], position, self.kafka.end_offset(source))
                self.later(0, self.post, (runner, fetched))
            return
        delay_ms = self.world.latency_ms(self.world.timing.kafka_ms_max)
        open_ms = max(self.kafka_cut_until_ms, self.world.kafka_down_until_ms)
        if self.world.brokers is not None:
            delay_ms += self.world.brokers.way(self, source).delay_ms
        self.later(delay_ms + max(0, open_ms - self.world.now_ms), self._fetched, runner, number)

    def _fetched(self, runner: Runner, number: int) -> None:
        most = 1 + self.world.up_to(6)
        records, position = self.kafka.read_committed(
            runner.sources[number], runner.fetched_up_to[number], most
        )
        runner.fetched_up_to[number] = position
        if records:
            self.post((runner, Fetched(number, records, position)))
        else:
            self._fetch(runner, number)

    def _next(self, runner: Runner, fetched: Fetched) -> list[Read]:
        """The records to process now, given what was fetched."""
        number = fetched.number
        reads = [Read(number, runner.sources[number], offset, record) for offset, record in fetched.records]
        if runner.merge is None:
            return reads
        if fetched.number >= 0:
            runner.merge.add(fetched.number, reads)
            runner.merge.note(fetched.number, fetched.position, fetched.end)
            runner.read_up_to[fetched.number] = fetched.position
            if fetched.end is not None:
                runner.inputs[fetched.number].end = fetched.end
        if runner.held:
            return []
        taken: Any = runner.taken or runner.merge.take(self.world.now_ms, 1_000)
        if runner.taken:
            runner.taken = []
            self.later(0, self.post, (runner, Fetched(-1, [], 0)))
        due_ms = runner.merge.due_ms()
        if due_ms is not None:
            self.later(max(1, due_ms - self.world.now_ms), self.post, (runner, Fetched(-1, [], 0)))
        return taken

    def _process(self, runner: Runner, fetched: Fetched) -> None:
        self._has_fired = False
        if self._reading_paused:
            self._held_batches.append((runner, fetched))
            return
        writer = self.writer
        if self.runners.get(runner.shard) is not runner or not runner.reading or writer is None:
            return  # fetched before the shard was rewound or released
        if writer.failure is not None:
            self._feed(self.lost(self.core.state.session, "producing", writer.failure))
            return
        fetched = self._up_to_end(runner, fetched)
        reads = self._next(runner, fetched)
        if reads:
            rest = self._process_records(writer, runner, reads, fetched)
            if rest and runner.merge is not None:
                runner.taken = rest
                self.inbox.append((runner, Fetched(-1, [], 0)))
            elif rest:
                self.inbox.append((runner, replace(fetched, records=fetched.records[-len(rest) :])))
                return
        elif fetched.end is not None and runner.merge is None:
            one = runner.inputs[fetched.number]
            one.end, one.read_position = fetched.end, max(fetched.position, one.next_offset)
        if runner.merge is not None and not runner.taken:
            for one in runner.inputs:
                if not runner.merge.count(one.number):
                    one.read_position = runner.read_up_to[one.number]
        self._keep_step()
        if fetched.records:
            self._fetch(runner, fetched.number)

    def _up_to_end(self, runner: Runner, fetched: Fetched) -> Fetched:
        """What was fetched, without what is behind the end of a bounded run."""
        stop_at = None if fetched.number < 0 else runner.inputs[fetched.number].stop_at
        if stop_at is None:
            return fetched
        records = [one for one in fetched.records if one[0] < stop_at]
        if fetched.position >= stop_at:
            return replace(fetched, records=records, position=stop_at, end=stop_at)
        return replace(fetched, end=None if fetched.end is None else min(fetched.end, stop_at))

    def _process_records(
        self, writer: Writer, runner: Runner, reads: list[Read], fetched: Fetched
    ) -> list[Read]:
        """Process records. Returns those that are left, because timers have to fire before them."""
        self._interrupting.interrupts.clear()
        rest: list[Read] = []
        for number, read in enumerate(reads):
            one = runner.inputs[read.number]
            self._record_watch.record = read
            self._note_step(runner, read.number, read.offset())
            one.handle(read)
            one.last = read
            if self._interrupting.interrupts:
                reads, rest = reads[: number + 1], reads[number + 1 :]
                break
        self._record_watch.record = None
        _, fired = self._timers.take_fired()
        if self.world.transcript is not None:
            shown_records = " ".join(str(read.written) for read in reads)
            offsets = "+".join(str(one.next_offset) for one in runner.inputs)
            self.note("processes %s up to %s: %s", runner.shard, offsets, shown_records)
        self._write_outputs(writer)
        processed = len(reads) + fired
        self._epoch_records += processed
        dirty = frozenset(shard for shard, other in self.runners.items() if other.is_touched)
        source = runner.sources[max(0, fetched.number)]
        backlog = self.kafka.last_stable_offset(source) > fetched.position
        self._feed(events.RecordsProcessed(dirty, processed, backlog))
        self.step("records processed")
        return rest

    def _note_step(self, runner: Runner, number: int, offset: int | None) -> None:
        """Report to the checks what the inputs of a shard don't tell."""
        if runner.merge is not None and runner.clock is not None:
            runner.steps.append(Step(self.cluster.next_output(), number, offset))

    def _write_outputs(self, writer: Writer) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            writer.produce(outputs)

    def _hold_output(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        timestamp_ms: int,
        headers: Any,
        partition: int | None = None,
    ) -> None:
        """Called by the engine's port. Outputs are sent after each batch of records."""
        record: Any = self._record_watch.record
        shard = ShardId(self.cluster.job.stages_reading[record.topic()], record.partition())
        is_read = isinstance(record, Read)
        number = record.number if is_read else 0
        made, wall_ms = self.cluster.next_output(), self.wall_ms()
        origin = Origin(shard, number, record.offset(), made, wall_ms, of_timer=not is_read)
        written = Written(key, value, timestamp_ms, headers, origin)
        place = self.cluster.place(topic, key, value) if partition is None else (topic, partition)
        self._outputs.append((place, written))

    # --- timers and event time ------------------------------------------------------------------------

    @property
    def _may_fire(self) -> bool:
        is_open = self.writer is not None and not self.writer.failure
        return is_open and not self._reading_paused and not self.core.state.waits_for_commit()

    def _timers_come_next(self) -> bool:
        """Whether timers are due and nothing waits except records or an order to stop, which both come
        after timers."""
        if not self._timed or not self._may_fire:
            return False
        item = self.inbox[0] if self.inbox else None
        if isinstance(item, tuple) and self._has_fired:
            return self._timers.must_fire()  # windows that are due and records take turns
        is_to_stop = isinstance(item, events.MessageReceived) and isinstance(item.message, messages.Drain)
        return (item is None or isinstance(item, tuple) or is_to_stop) and self._timers.are_due()

    def _fire(self) -> None:
        """Fire timers of one shard. Its effects are carried out before the next shard's timers fire."""
        writer = self.writer
        assert writer is not None
        self._has_fired = True
        self._interrupting.interrupts.clear()
        runner = self._timers.due()[0]
        assert runner.timers is not None
        runner.timers.fire_due(max(1, self.cluster.fired_at_once_max))
        self._record_watch.record = None
        self.note("fires timers of %s", runner.shard)
        self._write_outputs(writer)
        shards, fired = self._timers.take_fired()
        self._epoch_records += fired
        self._feed(events.RecordsProcessed(shards, fired, False))
        self.step("timers fired")

    def _wake_for_timers(self) -> None:
        """Schedule a wake-up for the next timer in processing time, unless an earlier one is scheduled."""
        interval_s = self.cluster.settings.heartbeat_interval_ms / 1000
        if self._timed and self._may_fire:
            wait_s = self._timers.wait_s(interval_s)
            wakes_at_ms = self.world.now_ms + math.ceil(wait_s * 1000)
            if wait_s < interval_s and not self.world.now_ms < self._wakes_at_ms <= wakes_at_ms:
                self._wakes_at_ms = wakes_at_ms
                self.later(wakes_at_ms - self.world.now_ms, self._drain)

    def _pass_time(self) -> None:
        """Look for inputs that have become idle, and for event time that is overdue. Both need an epoch,
        although no records arrive.
        """
        if not self._reading_paused and not self.core.state.waits_for_commit():
            now_ms = self.world.now_ms
            active = [
                (runner, one.number)
                for runner in self.runners.values()
                for one in runner.inputs
                if runner.merge is not None and runner.clock is not None
                if not runner.clock.look()[one.number].idle
            ]
            self._keep_step()
            held = () if self._drift is None else self._drift.held
            idle = self._idle_inputs.look(self.runners.values(), now_ms, held)
            ended = end_times(self.runners.values())
            loaded = {runner.shard for runner in self.runners.values() if runner.has_loaded}
            for runner, number in active:
                if runner.clock is not None and runner.clock.look()[number].idle:
                    self._note_step(runner, number, None)
            shards = self.core.state.running(idle | ended | loaded | self._telling.overdue(now_ms))
            if shards:
                self._feed(events.RecordsProcessed(shards, 0, False))

    def _keep_step(self) -> None:
        """Hold shards that are too far ahead of others in event time. Release those that no longer are."""
        if self._drift is None:
            return
        read = [runner for runner in self.runners.values() if runner.reading]
        turn = self._drift.look(read, self.core.state.slowest_elsewhere, self.world.now_ms)
        for runner in turn.hold:
            self.runners[runner.shard].held = True
            self.note("holds %s: %s", runner.shard, self._drift.held[runner.shard])
            self.world.landed["shard held back"] += 1
        for runner in turn.release:
            released = self.runners[runner.shard]
            released.held = False
            self.note("reads %s on", runner.shard)
            parked, released.parked = released.parked, []
            for number in parked:
                self._fetch(released, number)
            if released.merge is not None:
                self.later(0, self.post, (released, Fetched(-1, [], 0)))

    # --- epochs ---------------------------------------------------------------------------------------

    def _prepare_epoch(self, effect: events.PrepareEpoch) -> None:
        """Freeze the shards, and let the commit thread write the rest. Meanwhile the main thread waits until
        the outputs are acknowledged.
        """
        writer = self.writer
        assert writer is not None
        frozen = [self._freeze(shard, effect.epoch) for shard in sorted(effect.shards)]
        self._tell(writer, [self.runners[shard] for shard in sorted(effect.shards)])
        self.step("layers frozen")
        if not self.alive:
            return
        sealed = self._seal(writer, effect, frozen)
        self._busy = True
        writer.flush_outputs(lambda: self._outputs_flushed(writer, effect, sealed))

    def _seal(self, writer: Writer, effect: events.PrepareEpoch, frozen: list[FrozenShard]) -> FrozenEpoch:
        records, self._epoch_records = self._epoch_records, 0
        sealed = writer.seal(effect.epoch, records, frozen)
        assert self.commit_thread is not None
        self.commit_thread.submit(self.flush_epoch(writer, sealed, effect))
        return sealed

    def _tell(self, writer: Writer, runners: list[Runner]) -> None:
        """Write watermark records, and that global tables are read, behind the outputs of the epoch."""
        sizes, due = self.core.state.stage_sizes, list[OwnRecord]()
        clocks = {runner.shard: runner.clock for runner in runners if runner.clock is not None}
        if clocks:
            due += self._telling.due(clocks, sizes, self.world.now_ms)
        for runner in runners:
            due += runner.take_loaded_marks(sizes)
        if due:
            writer.produce(
                [
                    ((record.topic, record.partition), Written(None, record.value, -1, record.headers))
                    for record in due
                ]
            )

    def _outputs_flushed(self, writer: Writer, effect: events.PrepareEpoch, sealed: FrozenEpoch) -> None:
        self._busy = False
        if writer.failure is None:
            sealed.awaited.acknowledge()
        elif sealed.awaited.fail():
            self.inbox.append(self.lost(effect.session, "flushing", writer.failure))
        self._drain()

    def _freeze(self, shard: ShardId, epoch: int) -> FrozenShard:
        runner = self.runners[shard]
        delta = runner.freeze(epoch, self.cluster.topology.fingerprint)
        if runner.steps:
            self.cluster.checks.steps[self.core.state.session, epoch, shard] = runner.steps
            runner.steps = []
        return FrozenShard(shard, runner.state, runner.position, delta)

    def flush_epoch(self, writer: Writer, sealed: FrozenEpoch, effect: events.PrepareEpoch) -> Thread:
        """Write deltas and offsets, and wait for the outputs (commit thread)."""
        try:
            if self.world.chance(0.5):
                # It encodes the deltas, while the main thread may work on the next epoch.
                yield Sleep(self.world.up_to(15))
            yield from self.write_deltas(sealed)
            self.step("delta flushed")
            yield from self.write_offsets(sealed)
        except KafkaFailure as failure:
            if sealed.awaited.fail():
                self.post(self.lost(effect.session, f"preparing epoch {sealed.epoch}", failure))
                writer.stop_waiting()
            return
        self.step("offsets sent")
        while not sealed.awaited.known():
            yield Sleep(1)
        if sealed.awaited.failed():
            return
        self.pending = sealed
        self.cluster.checks.prepared.add((effect.session, sealed.epoch))
        self.post(events.EpochFlushed(effect.session, sealed.epoch, sealed.records, 1.0))

    def lost(self, session: int, what: str, failure: KafkaFailure) -> events.TransactionFailed:
        """What follows from a failure before the commit."""
        return events.TransactionFailed(session, f"{what}: {failure}", abortable=failure.abortable)

    def write_deltas(self, sealed: FrozenEpoch) -> Thread:
        for frozen in sealed.shards:
            if frozen.delta is not None:
                partition = self.cluster.job.changelog(frozen.shard)
                records = [
                    (partition, record) for record in encode_delta(frozen.delta, DELTA_RECORD_BYTES_MAX)
                ]
                offsets = yield Call(
                    "delta",
                    lambda records=records: self.kafka.append(sealed.producer, records, self.world.now_ms),
                    sealed.delta_lane,
                    place=partition,
                    may_be_refused=True,
                )
                frozen.changelog_next = offsets[-1] + 1

    def write_offsets(self, sealed: FrozenEpoch) -> Thread:
        offsets = {source: at for frozen in sealed.shards for source, at in self.offsets_of(frozen).items()}
        yield Call(
            "offsets",
            lambda: self.kafka.send_offsets(sealed.producer, offsets, self.world.now_ms),
            sealed.offsets_lane,
            place=GROUP,
            may_be_refused=True,
        )

    def offsets_of(self, frozen: FrozenShard) -> dict[Partition, tuple[int, str]]:
        """The offsets to commit for a shard's inputs."""
        offsets: dict[Partition, tuple[int, str]] = {}
        for number, topic in enumerate(self.cluster.job.inputs[frozen.shard.stage]):
            at = frozen.position.of_input(number)
            offsets[topic, frozen.shard.partition] = (at.offset, at.encode_metadata())
        return offsets

    def _commit_epoch(self, effect: events.CommitEpoch) -> None:
        assert self.commit_thread is not None
        self.commit_thread.submit(self.commit_epoch(effect))

    def commit_epoch(self, effect: events.CommitEpoch) -> Thread:
        """Make the epoch visible, then turn its layers into committed state (commit thread)."""
        sealed = self.pending
        assert sealed is not None
        assert sealed.epoch == effect.epoch
        self.step("complete, before commit")
        if not self.alive:
            return
        try:
            yield Call(
                "commit",
                lambda: self.kafka.commit(sealed.producer),
                sealed.lane,
                place=sealed.producer.transactional_id,
            )
        except KafkaFailure as failure:
            yield from self.commit_failed(effect, sealed, failure)
            return
        self.step("committed, before apply")
        self.post(events.EpochCommitted(effect.session, effect.epoch, 1.0, positions_of(sealed)))
        # The main thread may handle the event before this thread continues.
        if self.world.chance(0.3):
            yield Sleep(self.world.up_to(4))
        self.apply(effect.session, sealed)

    def commit_failed(self, effect: events.CommitEpoch, sealed: FrozenEpoch, failure: KafkaFailure) -> Thread:
        """Called if the commit failed, or if its outcome is unknown."""
        self.post(events.TransactionFailed(effect.session, f"committing epoch {sealed.epoch}: {failure}"))
        yield from ()

    def apply(self, session: int, sealed: FrozenEpoch) -> None:
        """Turn the layers of a committed epoch into the state that is written to the store later."""
        try:
            for frozen in sealed.shards:
                if frozen.delta is not None:
                    frozen.state.commit(sealed.epoch, frozen.changelog_next, self.world.now_ms)
        except FclusterError as error:
            self.post(events.TransactionFailed(session, f"applying epoch {sealed.epoch}: {error.message}"))

    # --- restoring ------------------------------------------------------------------------------------

    def _restore(
        self,
        session: int,
        shards: tuple[ShardId, ...],
        committed: tuple[messages.CommittedOffset, ...],
        before: list[CommitThread],
        stop: list[bool],
    ) -> Thread:
        for known in committed:
            topic = self.cluster.job.inputs[known.shard.stage][known.input]
            self.reported.report(topic, known.shard.partition, known.offset)
        try:
            yield from self._at_rest(before)
            if stop[0]:
                return
            self._write_dropped()
            positions: dict[ShardId, CommittedPosition | None] = {}
            yield from self.read_positions(shards, positions)
            self.step("positions read")
            needed = {shard: at.state_epoch if at else 0 for shard, at in positions.items()}
            yield from self.tail.take(needed, PATIENCE_MS)
            for shard in shards:
                if stop[0] or not self.alive:
                    return
                try:
                    yield from self._restore_one(session, shard, positions[shard], stop)
                except StateDamaged:
                    now: dict[ShardId, CommittedPosition | None] = {}
                    yield from self.read_positions((shard,), now)
                    if now[shard] == positions[shard]:
                        raise
                    raise KafkaFailure(f"{shard} has another owner by now") from None
        except KafkaFailure as failure:
            if not stop[0]:
                self.post(events.RestoreFailed(session, failure_of(failure), fatal=False))
        except StateDamaged as error:
            if not stop[0]:
                self.post(events.RestoreFailed(session, failure_of(error), fatal=True))
        except FclusterError as error:
            if not stop[0]:
                self.post(events.RestoreFailed(session, failure_of(error), fatal=False))

    def _keep_standbys(self, shards: set[ShardId], before: tuple[CommitThread, ...]) -> Thread:
        """Keep copies of these shards only (restore thread)."""
        yield from self._at_rest(before)
        self.write_dropped_before_copies()
        dropped = self.tail.shards - shards
        yield from self.tail.take(dict.fromkeys(dropped, 0), 0)
        for shard in sorted(dropped):
            self._close_one(shard, None)
        self.tail.keep(shards)

    def read_positions(
        self, shards: tuple[ShardId, ...], positions: dict[ShardId, CommittedPosition | None]
    ) -> Thread:
        """Read what is committed for these shards, once no offset is pending."""
        topics = self.cluster.job.inputs
        inputs = {shard: [(topic, shard.partition) for topic in topics[shard.stage]] for shard in shards}
        wanted = [source for sources in inputs.values() for source in sources]
        deadline_ms = self.world.now_ms + self.world.timing.request_timeout_ms
        while True:
            found = yield Call(
                "committed",
                lambda: self._answered_offsets(wanted),
                place=GROUP if self._reader.cut_off is None else None,
                unknown=dict.fromkeys(wanted, NOT_KNOWN),
            )
            if found is not None and self.are_known(found):
                if not self.is_old(found):
                    break
                self.note("asks another broker for the committed offsets")
                self.world.landed["old answer of a group coordinator"] += 1
                self._reader = GroupReader(self.world)
            if self.world.now_ms > deadline_ms:
                raise KafkaFailure("offsets stay pending")
            yield Sleep(UNSETTLED_RETRY_MS)
        for shard, sources in inputs.items():
            committed = [
                None if (at := found[source]) is None else decode_position(*at) for source in sources
            ]
            positions[shard] = self.joined(committed)

    def joined(self, committed: list[CommittedPosition | None]) -> CommittedPosition | None:
        """A shard's position, from what is committed for its inputs. None: nothing is committed."""
        if not any(committed):
            return None
        try:
            return joined_position(committed, [0] * len(committed), self.cluster.topology.fingerprint)
        except SplitPositionError as error:
            raise StateDamaged(str(error)) from error

    def are_known(self, found: dict[Partition, tuple[int, str] | None]) -> bool:
        """Whether the client knows all committed offsets. If not, it is asked again."""
        return NOT_KNOWN not in found.values()

    def is_old(self, found: dict[Partition, tuple[int, str] | None]) -> bool:
        """Whether the answer is older than what workers have reported as committed."""
        answered = {at: None if position is None else position[0] for at, position in found.items()}
        return self.reported.find_older(answered) is not None

    def _answered_offsets(self, sources: list[Partition]) -> dict[Partition, tuple[int, str] | None] | None:
        """The answer of the group coordinator that the reader asks.

        A coordinator that is cut off gives an old answer, but only if the reports of workers reveal that it
        is old.
        Otherwise nothing could tell the difference (docs/decisions/0082), so that case isn't played.
        """
        cut_off = self._reader.cut_off
        if cut_off is not None:
            old = {source: cut_off.committed.get(source) for source in sources}
            answered = {at: None if position is None else position[0] for at, position in old.items()}
            if self.reported.find_older(answered) is not None:
                return old
        return self.settled_offsets(sources)

    def settled_offsets(self, sources: list[Partition]) -> dict[Partition, tuple[int, str] | None] | None:
        if any(self.kafka.offset_pending(source) for source in sources):
            return None
        return {source: self.kafka.committed(source) for source in sources}

    def _restore_one(
        self, session: int, shard: ShardId, committed: CommittedPosition | None, stop: list[bool]
    ) -> Thread:
        changelog = self.cluster.job.changelog(shard)
        request = RestoreRequest(
            shard=shard, committed=committed, changelog=changelog[0], changelog_id="changelog-id"
        )
        disk = self.disk
        assert disk is not None
        store = disk.open(shard)
        if not self.stands_exactly(request, store):
            end = yield from self.settled_end(changelog)
            failed: dict[tuple[Base, int], StateDamaged] = {}
            while True:
                if stop[0] or not self.alive or self.disk is not disk:
                    return
                plan = self._plan(request, store, changelog, end, failed)
                try:
                    store = self.put_base(disk, plan, shard)
                    yield Sleep(self.world.latency_ms(self.cluster.restore_ms_max))
                    if stop[0]:
                        return
                    self._replay(request, plan, store, changelog)
                    break
                except StateDamaged as damage:
                    self.note("the restore of %s starts again: %s", shard, damage.message)
                    failed[plan.base, plan.meta.state_epoch] = damage
        if stop[0] or not self.alive:
            return
        further = tuple(InputOffset(0) for _ in self.cluster.job.inputs[shard.stage][1:])
        position = committed or CommittedPosition(0, 0, 0, self.cluster.topology.fingerprint, further=further)
        self.cluster.checks.restored(shard, position, store.data)
        self.states[shard] = self.new_state(shard, store)
        self.step("shard restored")
        self.post(events.ShardRestored(session, shard, position))

    def new_state(self, shard: ShardId, store: SimStore) -> ShardState:
        """A shard's state: the layers in memory, above a restored store."""
        cluster = self.cluster
        stores = cluster.topology.stage(shard.stage).all_stores
        return ShardState(store, stores, EntriesMax(cluster.cache_entries_max), cluster.flush_limits)

    def stands_exactly(self, request: RestoreRequest, store: SimStore) -> bool:
        """Whether the local store is exactly at the committed epoch."""
        return stands_exactly(request, store.meta())

    def settled_end(self, changelog: Partition) -> Thread:
        deadline_ms = self.world.now_ms + self.world.timing.request_timeout_ms
        while True:
            answers = yield Call(
                "ends",
                lambda: (self.kafka.last_stable_offset(changelog), self.kafka.end_offset(changelog)),
                place=changelog,
                unknown=(NO_OFFSET, NO_OFFSET),
            )
            try:
                stable, end = (self.known(answer, changelog) for answer in answers)
                if stable == end:
                    return end
            except NotKnownYetError:
                pass  # asked again
            if self.world.now_ms > deadline_ms:
                raise KafkaFailure(f"a transaction in {changelog} is still open")
            yield Sleep(UNSETTLED_RETRY_MS)

    def known(self, answer: int, partition: Partition) -> int:
        """An offset that a client answered. The product's own rule says whether it is known."""
        return known_offset(answer, f"{partition[0]}/{partition[1]}")

    def _plan(
        self,
        request: RestoreRequest,
        store: SimStore,
        changelog: Partition,
        end: int,
        failed: dict[tuple[Base, int], StateDamaged],
    ) -> RestorePlan:
        meta = store.meta()
        manifests = [
            manifest
            for manifest in usable_manifests(self.cluster.snapshots, request.shard)
            if (Base.SNAPSHOT, manifest.state_epoch) not in failed
        ]
        begin = self.kafka.begins.get(changelog, 0)
        local = None if (Base.LOCAL, meta.state_epoch) in failed else meta
        plan = plan_restore(request, local, manifests, begin, end)
        if (plan.base, plan.meta.state_epoch) in failed:
            raise failed[plan.base, plan.meta.state_epoch]
        self.note(
            "restores %s from %s at epoch %d, changelog %d to %d",
            *(request.shard, plan.base.value, plan.meta.state_epoch, plan.meta.changelog_offset, end),
        )
        self.world.landed[f"restore from {plan.base.value}"] += 1
        return plan

    def put_base(self, disk: Disk, plan: RestorePlan, shard: ShardId) -> SimStore:
        """Put the files in place from which the restore starts."""
        if plan.base is Base.LOCAL:
            return disk.open(shard)
        if plan.snapshot is not None:
            data = self.cluster.snapshots.content(shard, plan.snapshot)
            disk.destroy(shard)
            store = disk.open(shard)
            store.replace(data, plan.snapshot.meta)
            return store
        disk.destroy(shard)
        return disk.open(shard)

    def _replay(
        self, request: RestoreRequest, plan: RestorePlan, store: SimStore, changelog: Partition
    ) -> None:
        """Read the changelog to its end and apply the deltas. Check that they end at the committed epoch."""
        reader = DeltaReader(f"{changelog[0]}/{changelog[1]}", plan.meta.state_epoch)
        if plan.meta.changelog_offset < self.kafka.begins.get(changelog, 0):
            if plan.read_to > plan.meta.changelog_offset:
                raise StateDamaged(f"the changelog has no offset {plan.meta.changelog_offset}")
            return
        changes: dict[bytes, bytes] = {}
        meta = plan.meta
        if plan.offsets_to_read:
            records, _ = self.kafka.read_committed(changelog, meta.changelog_offset, plan.offsets_to_read)
            for offset, record in records:
                delta = reader.feed(offset, record) if offset < plan.read_to else None
                if delta is not None:
                    if delta.epoch > request.target_epoch:
                        raise StateDamaged(
                            f"{changelog} holds epoch {delta.epoch}, committed is {request.target_epoch}"
                        )
                    changes.update(delta.changes)
                    meta = meta._replace(state_epoch=delta.epoch, changelog_offset=offset + 1)
            reader.finish()
        if meta.state_epoch != request.target_epoch:
            raise StateDamaged(
                f"{changelog} ends at epoch {meta.state_epoch}, committed is {request.target_epoch}"
            )
        if changes or store.meta() != meta:
            store.apply(changes, meta._replace(changelog_id="changelog-id"))

    # --- snapshots ------------------------------------------------------------------------------------

    def _begin_snapshots(self) -> None:
        self.start(self._take_snapshots())
        self.later(self.cluster.settings.snapshot_interval_ms, self._begin_snapshots)

    def _take_snapshots(self) -> Thread:
        for shard in list(self.states):
            try:
                yield from self._take_snapshot(shard)
            except KafkaFailure as failure:
                self.note("truncating the changelog of %s: %s", shard, failure)

    def _take_snapshot(self, shard: ShardId) -> Thread:
        store = self.disk.stores.get(shard) if self.disk is not None else None
        if store is None or store.closed:
            return
        meta, data, snapshots = store.meta(), store.data, self.cluster.snapshots
        if meta.state_epoch == self._snapshot_epochs.get(shard, 0):
            return
        damaged = self.world.faults_on and self.world.chance(self.cluster.upload_damage_share)
        yield Sleep(self.world.up_to(30))
        manifest = snapshots.upload(shard, data, meta, damaged=damaged)
        if not self.is_verified(shard, manifest):
            self.note("the snapshot of %s at epoch %d was damaged on its way", shard, meta.state_epoch)
            self.world.landed["snapshot damaged on its way"] += 1
            return
        self.step("snapshot uploaded")
        yield Sleep(self.world.up_to(10))
        snapshots.publish(shard, manifest)
        self.note("took a snapshot of %s at epoch %d", shard, meta.state_epoch)
        self.world.landed["snapshot taken"] += 1
        self.step("manifest written")
        self.prune(shard, meta)
        self._snapshot_epochs[shard] = meta.state_epoch
        yield Sleep(self.world.up_to(10))
        offset = self.truncation_offset(shard, meta.changelog_id)
        if offset:
            changelog = self.cluster.job.changelog(shard)
            yield Call("delete records", lambda: self.kafka.delete_before(changelog, offset), place=changelog)
            self.note("the changelog of %s now begins at %d", shard, offset)
            self.world.landed["changelog truncated"] += 1
        self.step("changelog truncated")

    def is_verified(self, shard: ShardId, manifest: Manifest) -> bool:
        """Whether the snapshot arrived undamaged."""
        return self.cluster.snapshots.is_intact(shard, manifest)

    def truncation_offset(self, shard: ShardId, changelog_id: str) -> int | None:
        """The changelog is needed from this offset on. None: all of it is needed."""
        return truncation_offset(self.cluster.snapshots, shard, changelog_id)

    def prune(self, shard: ShardId, meta: StoreMeta) -> None:
        """Remove older snapshots."""
        prune(self.cluster.snapshots, shard, meta)

    # --- control --------------------------------------------------------------------------------------

    def _on_frame(self, frame: bytes) -> None:
        message = messages.decode_from_coordinator(frame)
        self._misled = message.term < self.core.state.term
        self.post(events.MessageReceived(message))

    def _statuses(self) -> list[messages.ShardStatus]:
        state = self.core.state
        return [
            status
            for runner in self.runners.values()
            for status in statuses_of_runner(state, runner, self.wall_ms())
        ]

    def _pulse(self) -> None:
        """Send heartbeats and search for the leader, as the product does in a separate thread."""
        settings = self.cluster.settings
        if self.core.state.session and self.dealer.connected:
            job = self.cluster.job  # other jobs only need the standings that come with commits
            shards = self._statuses() if self.cluster.run_end is not None or job.dead_letters_max else []
            slowest = [] if self._drift is None else self._drift.slowest
            stats = WorkerStats(standbys=self.tail.statuses(), shards=shards, slowest=slowest)
            self.dealer.send(
                messages.encode(messages.Heartbeat(self.core.state.session, stats, self.core.orders_heard))
            )
        seeking = self._misled or not self.dealer.connected
        if seeking and self.world.now_ms - self._searched_ms >= 200:
            self._searched_ms = self.world.now_ms
            self.world.call(self, Call("find leader", self.cluster.find_leader), self._found_leader)
        self.later(settings.heartbeat_interval_ms, self._pulse)
        self.post(events.Tick())
        self.post(self._pass_time)

    def _found_leader(self, leader: Any, failure: KafkaFailure | None) -> None:
        if leader is None or failure is not None:
            return
        if self.dealer.connected and not (self._misled and leader.term >= self.core.state.term):
            return
        self._misled = False
        if self.dealer.target is not leader.router:
            self.note("connects to %s", leader)
            self.dealer.connect(leader.router)

    # --- for the end ----------------------------------------------------------------------------------

    def live_state(self, shard: ShardId, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The state of a running shard, as its handlers would see it."""
        table = next(iter(self.runners[shard].state.documents.values()))
        states = {key: table.peek(key.encode()) for key in keys}
        return {key: state for key, state in states.items() if state}


def positions_of(sealed: FrozenEpoch) -> dict[ShardId, CommittedPosition]:
    """The positions of the epoch's shards after its commit."""
    return {frozen.shard: frozen.position for frozen in sealed.shards}


def shown(thing: Any) -> str:
    """A short text for a message, event or effect."""
    words: list[str] = []
    names: Iterator[str] = iter(getattr(thing, "__struct_fields__", None) or thing.__dataclass_fields__)
    for name in names:
        value = getattr(thing, name)
        if name in (
            "stats",
            "host",
            "pid",
            "version",
            "topology",
            "snapshot_store",
            "prepare_ms",
            "commit_ms",
        ):
            continue
        if isinstance(value, frozenset | list | tuple) and value:
            value = " ".join(sorted(str(getattr(item, "shard", item)) for item in value))
        elif isinstance(value, dict):
            value = " ".join(f"{key}@{getattr(at, 'offset', at)}" for key, at in value.items())
        words.append(f"{name}={value}")
    return f"{type(thing).__name__}({', '.join(words)})"
