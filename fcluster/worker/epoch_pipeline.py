"""The epochs of a worker on their way into Kafka: one is open, and one may be in flight behind its barrier.

Responsible for: an epoch from its first record to its commit, as one object that passes through the threads.
The main thread opens it (`OpenEpoch`), and at the barrier freezes it into an `EpochInFlight`. That object
belongs to the commit thread, which prepares and commits it while the main thread works on the next epoch.
Also responsible for a session's writer and commit thread, and for turning failures there into events.

Invariants:
- An epoch begins in the transaction that takes its first output, and only when all outputs of the epoch
  before are acknowledged. So the outputs of a key keep the order of its inputs across epochs.
- The commit thread gets everything that it needs with the epoch. It reads nothing that the main thread
  changes, except the session, to recognise sessions that are over.
- State layers become committed state after the transaction's commit, in the order of the epochs.

Must not: decide when an epoch ends or may be committed; `core` does. Must not know readers.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor
from dataclasses import dataclass

from fcluster.common import failpoints
from fcluster.common.clocks import monotonic_ms
from fcluster.common.errors import FclusterError, ProcessingError, failure_of
from fcluster.common.failures import FailureKind
from fcluster.common.ids import ShardId
from fcluster.engine.failure import Condemnation
from fcluster.engine.state import ShardState
from fcluster.engine.watermarks import OwnRecord, Telling
from fcluster.graph.topology import Topology
from fcluster.storage.store import LOCAL_TROUBLE
from fcluster.worker.batches import Batches
from fcluster.worker.commit_thread import CommitThread
from fcluster.worker.core import events
from fcluster.worker.core.model import RecordAt
from fcluster.worker.core.state import CoreState
from fcluster.worker.epoch_trace import EpochTrace, EpochTraces
from fcluster.worker.processing import OutputPort, ShardRunner
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.transactions import (
    AwaitedOutputs,
    EpochTransaction,
    EpochWriter,
    FrozenEpoch,
    OutputsFailedError,
    ShardEpoch,
    TransactionLostError,
)
from fcluster.worker.watchdog import Watchdog

_log = logging.getLogger("fcluster.worker")

OUTPUTS_UNACKNOWLEDGED_MAX = 100_000
SEND_INTERVAL_S = 0.02
"""If an epoch has been open for longer than this, its outputs are sent from time to time, which takes 1 ms of
the main thread.
"""
SEND_INTERVAL_BACKLOG_S = 0.1
COMMIT_LATENCIES_KEPT = 500

MakeWriter = Callable[[Callable[[str], None]], EpochWriter]
"""Creates a session's writer with `give_up`; see `transactions.TransactionalWriter`."""


@dataclass(slots=True)
class OpenEpoch:
    """The epoch that takes records now. Belongs to the main thread.

    Attributes:
        begun_s: when its transaction began.
        sent_s: when its outputs were last sent, `begun_s` if they haven't been sent yet.
        records: how many records were processed in it.
        closing_s: how long timers have fired in it, in turns of their own.
    """

    transaction: EpochTransaction
    begun_s: float
    sent_s: float
    records: int = 0
    closing_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EpochInFlight:
    """An epoch from its barrier to its commit: everything that this worker knows of it. Belongs to the commit
    thread.

    Attributes:
        frozen: what is committed.
        states: the states of its shards.
        transaction: contains the outputs, and gets the rest.
        confirm_sources: raises if a source was replaced while its records were read.
        begun_s: when its transaction began.
        frozen_s: when its barrier came.
        letter: the error of the last dead letter; see `LetterLimit.last`.
        outputs: whether they are acknowledged. The main thread waits for that.
    """

    session: int
    frozen: FrozenEpoch
    states: Mapping[ShardId, ShardState]
    transaction: EpochTransaction
    confirm_sources: Callable[[], None]
    begun_s: float
    frozen_s: float
    letter: str
    outputs: AwaitedOutputs


class EpochPipeline:
    """See the module's docstring. All methods are for the main thread, unless they say otherwise.

    Args:
        topology: the job's topology.
        core_state: the core's state. It is only read.
        port: takes outputs. It is bound to the open epoch's transaction.
        batches: learns from refusals how large batches may be.
        source_checks: knows which records the open epoch has read.
        watchdog: watches the commit thread.
        hang_bound_s: how long a step in it may take.
        post: queues an event for the main thread. May be called from any thread.
        note_delta: called in the commit thread when a delta is committed, with the changelog offset after it
            and its size in bytes.

    Attributes:
        committed: how many epochs were committed since the process started.
        traces: where the time of the newest epochs went.
        retired: the commit threads of previous sessions, until a restore takes them to wait for them.
    """

    def __init__(
        self,
        topology: Topology,
        core_state: CoreState,
        port: OutputPort,
        batches: Batches,
        source_checks: SourceChecks,
        watchdog: Watchdog,
        hang_bound_s: float,
        post: Callable[[events.Event], None],
        note_delta: Callable[[ShardId, int, int], None],
    ) -> None:
        self._topology = topology
        self._core_state = core_state
        self._port = port
        self._batches = batches
        self._source_checks = source_checks
        self._watchdog = watchdog
        self._hang_bound_s = hang_bound_s
        self._post = post
        self._note_delta = note_delta
        self._telling = Telling(topology)
        self._writer: EpochWriter | None = None
        self._commit_thread: CommitThread | None = None
        self._open: OpenEpoch | None = None
        self._in_flight: EpochInFlight | None = None
        self.traces = EpochTraces()
        self._latencies_ms: deque[float] = deque(maxlen=COMMIT_LATENCIES_KEPT)
        self.committed = 0
        self.retired: list[CommitThread] = []

    # --- a session's writer -------------------------------------------------------------------------------

    def name_topics(self, topology: Topology) -> None:
        """Use the topic names of this topology. Call it before the first `open`."""
        self._topology = topology
        self._telling = Telling(topology)

    def release(self, shards: Iterable[ShardId]) -> None:
        """Other workers get these shards."""
        shards = list(shards)
        self._port.letters.forget(shards)
        self._telling.forget(shards)

    def open(self, session: int, make_writer: MakeWriter) -> None:
        """Create the session's writer, and its commit thread, which initialises the writer."""
        self._commit_thread = thread = CommitThread()

        def give_up(reason: str) -> None:
            # The thread hangs in a call. The broker, not this worker, ends its transaction.
            thread.abandon()
            epoch = self._in_flight
            if epoch is not None and epoch.session == session:
                epoch.outputs.fail()  # the main thread needn't wait for them any longer
            self._post(events.TransactionFailed(session, reason))

        self._writer = writer = make_writer(give_up)
        thread.submit(self._open_writer, writer, session, tuple(self.retired))

    def _open_writer(self, writer: EpochWriter, session: int, before: Sequence[Executor]) -> None:
        """Runs in the commit thread."""
        with self._reporting(session, "initialising the producers", abortable=False):
            for executor in before:
                # It may still be initialising producers with the same ids, which would fence ours.
                executor.shutdown(wait=True)
            writer.open()
            self._post(events.ProducersOpened(session))

    def abort(self, session: int, states: Sequence[ShardState]) -> None:
        """Abort the transactions of both producers, then write what `states` have of committed epochs to
        their stores. Nothing is processed meanwhile.
        """
        self._port.close()
        self._open = self._in_flight = None
        self._telling = Telling(self._topology)
        assert self._commit_thread is not None
        assert self._writer is not None
        self._commit_thread.submit(self._abort, self._writer, session, states)

    def _abort(self, writer: EpochWriter, session: int, states: Sequence[ShardState]) -> None:
        """Runs in the commit thread, after everything that the aborted epochs gave it to do."""
        with self._reporting(session, "aborting what isn't committed", abortable=False):
            writer.abort()
            for state in states:
                state.flush()
            self._post(events.EpochsAborted(session))

    def destroy(self) -> None:
        """The session is over. Destroy its writer without waiting. Its epochs are never committed."""
        self._port.close()  # the writer's thread, not this one, has to destroy its producer
        self._open = self._in_flight = None
        self._telling = Telling(self._topology)
        retired, self._commit_thread = self._commit_thread, None
        if retired is not None:
            retired.shutdown(wait=False, cancel_futures=True)
            self.retired.append(retired)

        def last_use() -> None:
            if retired is not None:
                retired.join()

        if self._writer is not None:
            self._writer.destroy(last_use)
            self._writer = None

    def close(self) -> None:
        """Wait for the commit threads of all sessions that are over."""
        for thread in self.retired:
            thread.shutdown(wait=True)

    def take_retired(self) -> list[CommitThread]:
        """`retired`. From now on the caller is responsible for these threads."""
        retired, self.retired = self.retired, []
        return retired

    @property
    def is_open(self) -> bool:
        """Whether there is a session that can write."""
        return self._writer is not None

    # --- the open epoch -----------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether an epoch is open."""
        return self._open is not None

    def begin(self) -> OpenEpoch:
        """Open the next epoch.

        Raises:
            TransactionLostError: its transaction can't begin.
        """
        assert self._writer is not None
        transaction = self._writer.begin()
        self._port.produce = transaction.produce
        now_s = time.monotonic()
        self._open = OpenEpoch(transaction, now_s, now_s)
        return self._open

    def count(self, records: int) -> None:
        """Count records that were processed in the open epoch."""
        if self._open is not None:
            self._open.records += records

    def note_closing(self, took_s: float) -> None:
        """Timers have fired in the open epoch for this long."""
        if self._open is not None:
            self._open.closing_s += took_s

    @property
    def closing_s(self) -> float:
        """How long timers have fired in the open epoch."""
        return 0.0 if self._open is None else self._open.closing_s

    @property
    def open_s(self) -> float:
        """How long the open epoch has been open."""
        return 0.0 if self._open is None else time.monotonic() - self._open.begun_s

    def hold_back(self, backlog: bool) -> events.Event | None:
        """Serve delivery reports, and wait if outputs are produced faster than Kafka accepts them.

        Outputs of an epoch that has been open for some time are sent before the barrier, for readers of
        uncommitted records.

        Returns:
            What failed.
        """
        opened = self._open
        if opened is None:
            return None
        now_s = time.monotonic()
        interval_s = SEND_INTERVAL_BACKLOG_S if backlog else SEND_INTERVAL_S
        is_time = now_s - opened.sent_s > interval_s
        if is_time:
            opened.sent_s = now_s
        try:
            waiting = opened.transaction.serve(send=is_time)
            while waiting > OUTPUTS_UNACKNOWLEDGED_MAX:
                opened.transaction.check()
                time.sleep(0.002)
                waiting = opened.transaction.serve(send=True)
        except TransactionLostError as error:
            return self.lost(self._core_state.session, error)
        return None

    # --- the epoch in flight ------------------------------------------------------------------------------

    def prepare(self, effect: events.PrepareEpoch, runners: Mapping[ShardId, ShardRunner]) -> None:
        """Freeze the open epoch and hand it to the commit thread. The next epoch begins after it."""
        failpoints.reach("worker.barrier-received", effect.epoch)
        assert self._commit_thread is not None
        frozen_s = time.monotonic()
        try:
            opened = self._open or self.begin()  # there is nothing to commit except offsets
            trace = EpochTrace(opened.begun_s)
            trace.ended("open")
            confirm_sources = self._source_checks.begin()
            parts = [self._freeze(runners[shard], effect.epoch) for shard in sorted(effect.shards)]
            failpoints.reach("worker.layers-frozen", effect.epoch)
            self._tell(opened.transaction, [runners[shard] for shard in sorted(effect.shards)])
            trace.ended("freeze")
        except TransactionLostError as error:
            self._post(self.lost(effect.session, error))
            return
        except ProcessingError as error:
            found = (runners[shard].find_unkept() for shard in sorted(effect.shards))
            unkept = next((one for one in found if one is not None), Condemnation(failure_of(error)))
            self._post(events.EpochFailed(effect.session, unkept))
            return
        except FclusterError as error:
            self._post(events.JobBroken(effect.session, failure_of(error)))
            return
        epoch = EpochInFlight(
            session=effect.session,
            frozen=FrozenEpoch(effect.epoch, opened.records, parts, trace=trace),
            states={shard: runners[shard].state for shard in effect.shards},
            transaction=opened.transaction,
            confirm_sources=confirm_sources,
            begun_s=opened.begun_s,
            frozen_s=frozen_s,
            letter=self._port.letters.last,
            outputs=AwaitedOutputs(),
        )
        self._open, self._in_flight = None, epoch
        self._commit_thread.submit(self._flush, epoch)
        self._wait_for_outputs(epoch)

    def _wait_for_outputs(self, epoch: EpochInFlight) -> None:
        """Wait until they are acknowledged. The next epoch must not begin before."""
        outputs = epoch.outputs
        try:
            epoch.transaction.flush_outputs(outputs.failed)
            outputs.acknowledge()
        except TransactionLostError as error:
            if outputs.fail():
                self._post(self.lost(epoch.session, error))
        except BaseException:
            outputs.fail()
            raise

    def _tell(self, transaction: EpochTransaction, runners: Sequence[ShardRunner]) -> None:
        """Tell the stages downstream of event time, and of global tables that are read."""
        sizes, told = self._core_state.stage_sizes, list[OwnRecord]()
        clocks = {runner.shard: runner.clock for runner in runners if runner.clock is not None}
        if clocks:
            told += self._telling.due(clocks, sizes, monotonic_ms())
        for runner in runners:
            told += runner.take_loaded_marks(sizes)
        if told:
            transaction.tell(told)

    def untold(self, now_ms: float) -> frozenset[ShardId]:
        """The shards that need an epoch so that their event time is reported to the stages downstream."""
        return self._telling.overdue(now_ms)

    def _freeze(self, runner: ShardRunner, epoch: int) -> ShardEpoch:
        delta = runner.freeze(epoch, self._topology.fingerprint)
        return ShardEpoch(
            shard=runner.shard,
            topics=runner.stage.topics,
            position=runner.position,
            changelog=runner.stage.changelog,
            delta=delta,
        )

    def _flush(self, epoch: EpochInFlight) -> None:
        """Write deltas and offsets, and wait for all of it. Runs in the commit thread."""
        frozen = epoch.frozen
        with self._reporting(epoch.session, f"preparing epoch {frozen.epoch}", fail=epoch.outputs.fail):
            frozen.encode()
            frozen.trace.ended("encode")
            epoch.transaction.prepare(frozen, epoch.outputs)
            epoch.confirm_sources()
            frozen.trace.ended("sources")
            prepare_ms = (time.monotonic() - epoch.frozen_s) * 1000
            self._post(events.EpochFlushed(epoch.session, frozen.epoch, frozen.records, prepare_ms))
            failpoints.reach("worker.prepared", frozen.epoch)

    def commit(self, effect: events.CommitEpoch) -> None:
        """Make the commit thread commit the epoch in flight."""
        failpoints.reach("worker.complete-received", effect.epoch)
        assert self._commit_thread is not None
        epoch, self._in_flight = self._in_flight, None
        assert epoch is not None
        assert epoch.frozen.epoch == effect.epoch
        self._commit_thread.submit(self._commit, epoch)

    def _commit(self, epoch: EpochInFlight) -> None:
        """Make the epoch visible. Then its layers become the committed state. Runs in the commit thread."""
        frozen = epoch.frozen
        # Whatever a failed commit says, its outcome is uncertain.
        with self._reporting(epoch.session, f"committing epoch {frozen.epoch}", abortable=False):
            started_s = time.monotonic()
            frozen.trace.ended("declare")
            epoch.transaction.commit(frozen)
            frozen.trace.ended("commit")
            failpoints.reach("worker.committed", frozen.epoch)
            committed_s = time.monotonic()
            commit_ms = (committed_s - started_s) * 1000
            positions = frozen.positions()
            self._post(events.EpochCommitted(epoch.session, frozen.epoch, commit_ms, positions, epoch.letter))
            self._latencies_ms.append((committed_s - epoch.begun_s) * 1000)
            self.committed += 1
            for part in frozen.parts:
                if part.records:
                    next_offset = frozen.changelog_next[part.shard]
                    epoch.states[part.shard].commit(frozen.epoch, next_offset, monotonic_ms())
                    self._note_delta(part.shard, next_offset, sum(map(len, part.records)))
            frozen.trace.ended("apply")
            self.traces.add(frozen.trace)
            if slowness := frozen.trace.slowness():
                _log.info("epoch %d took %s", frozen.epoch, slowness)

    def commit_latencies_ms(self) -> list[float]:
        """The latencies of the newest epochs, from the first record to the commit, sorted."""
        return sorted(self._latencies_ms)

    # --- the commit thread's other work -------------------------------------------------------------------

    def flush_quiet(self, states: Iterable[ShardState]) -> None:
        """Write changes of the last commit before a pause to the store, and so into snapshots."""
        if self._commit_thread is not None:
            now_ms = monotonic_ms()
            for state in states:
                if state.flush_is_due(now_ms):
                    self._commit_thread.submit(self._flush_state, state, self._core_state.session)

    def _flush_state(self, state: ShardState, session: int) -> None:
        with self._reporting(session, "writing committed state to the local store"):
            state.flush()

    def rest(self) -> Callable[[], None]:
        """A function that waits until the commit thread has finished all tasks it was given so far."""
        thread = self._commit_thread
        if thread is None:
            return lambda: None
        done = thread.submit(lambda: None)

        def wait() -> None:
            try:
                done.result()
            except CancelledError:
                thread.shutdown(wait=True)  # abandoned, but it finishes its current task

        return wait

    # --- failures -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reporting(
        self,
        session: int,
        what: str,
        *,
        abortable: bool = True,
        fail: Callable[[], bool] = lambda: True,
    ) -> Generator[None]:
        """Watch a step of the commit thread, and turn its failure into an event.

        Args:
            session: the session that the step belongs to.
            what: describes the step.
            abortable: if the error says so, the session can go on after an abort.
            fail: notes the failure. Returns False if the main thread has reported already that this
                transaction is lost.
        """
        try:
            with self._watchdog.bounded(what, self._hang_bound_s):
                yield
        except OutputsFailedError:
            pass
        except TransactionLostError as error:
            if not fail():
                return
            if session != self._core_state.session:
                # Nothing depends on it any more, but it shows that the writes of a former session are
                # refused.
                _log.info("refused, from session %d, which is over: %s", session, error)
            self._post(self.lost(session, error, abortable=abortable))
        except LOCAL_TROUBLE as error:
            fail()
            self._post(events.WorkerBroken(failure_of(error, FailureKind.HOST)))
        except FclusterError as error:
            fail()
            self._post(events.JobBroken(session, failure_of(error)))
        except Exception as error:  # noqa: BLE001  a thread that dies silently would block its epoch
            fail()
            _log.exception("%s failed", what)
            reason = f"{what}: {type(error).__name__}: {error}"
            self._post(events.TransactionFailed(session, reason, unexpected=True))

    def lost(
        self,
        session: int,
        error: TransactionLostError,
        record: RecordAt | None = None,
        *,
        abortable: bool = True,
    ) -> events.Event:
        """Decide what follows from a lost transaction: if a replay can help, a replay, if necessary in
        smaller pieces. May be called from any thread.

        Args:
            session: the session of the transaction.
            error: what happened to it.
            record: the only record in the transaction, if that is known.
            abortable: whether an abort is enough if the error says so.
        """
        refusal = error.refusal([topic.name for topic in self._topology.outputs])
        if refusal is not None:
            return events.JobBroken(session, refusal)
        condemnation = error.condemnation()
        if condemnation is not None:
            self._batches.refused(error.topic, error.code)
            return events.EpochFailed(session, condemnation, record)
        return events.TransactionFailed(
            session, str(error), error.is_unexpected(), abortable and error.abortable
        )
