"""The worker process: carries out what `core` decides, and runs records through the job.

Responsible for: creating and connecting the worker's parts, the main loop, and deciding which part carries
out which effect. The main thread owns the core, the runners and the open epoch. All other threads report to
it through one queue (`inbox`):

- the control thread (ZeroMQ) receives the coordinator's messages, and the seeker's thread looks for the
  leader when there is none (`leader_link`),
- a reader thread for each isolation level, and another one for merged topics, fetches batches of records
  (`consuming`); `running_shards` knows which shard they are for, and `record_pump` processes them,
- the commit thread prepares and commits epochs (`epoch_pipeline`), one thread for each session,
- the thread of calls awaits the job's async functions (`call_thread`); `calls` has the records that wait,
- the restore thread restores, opens and closes shards, and the snapshot thread uploads them (`shards`),
- the standby thread keeps warm copies of other workers' shards (`standby`),
- the pulse thread sends heartbeats (`reporting`) and watches for hung threads (`pulse`).

It keeps the invariants about threads: only the main thread makes decisions, and only between two records. So
a barrier never falls into the middle of a record.

Must not: decide protocol questions; `core` does.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from fcluster import __version__
from fcluster.api.job import Job
from fcluster.common import garbage
from fcluster.common.clocks import monotonic_ms
from fcluster.common.event_ring import EventRing
from fcluster.common.exit_codes import IN_GOOD_ORDER, ExitCode
from fcluster.common.failures import Ended, Failure, FailureKind
from fcluster.common.processes import process_space
from fcluster.common.settings import Settings, with_settings
from fcluster.graph.topology import Topology
from fcluster.kafka.outcasts import Outcasts, Relief
from fcluster.wire import messages
from fcluster.wire.http_port import health_port
from fcluster.worker import handler_processes, interpreter_lock
from fcluster.worker.batches import Batches
from fcluster.worker.consuming import Batch, ReaderDied, ReaderEvent, ReadFailed, ReadUpTo
from fcluster.worker.core import events, model
from fcluster.worker.core import worker as core
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.health import WorkerHealth
from fcluster.worker.inbox import CallsEnded, Inbox
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.leader_link import LeaderLink
from fcluster.worker.processing import OutputPort
from fcluster.worker.pulse import PulseThread
from fcluster.worker.record_pump import RecordPump
from fcluster.worker.record_watch import RecordWatch
from fcluster.worker.reporting import Reporting
from fcluster.worker.running_shards import RunningShards
from fcluster.worker.shards import ShardHost
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.transactions import make_writer
from fcluster.worker.watchdog import Watchdog, dump_and_exit

_log = logging.getLogger("fcluster.worker")

UNBOUNDED_S = 1e9
CLOSING_BOUND_S = 60.0
_LEVELS = logging.getLevelNamesMapping()
THREAD_SWITCH_INTERVAL_S = 0.001
"""How soon a waiting thread gets its turn. The default of 5 ms would be added to each step of an epoch that
needs another thread."""


class Worker:
    """One worker process.

    Args:
        job: the job to run.
        settings: the resolved settings.
        slot: the wanted slot, -1 for any.
        coordinator_address: ``tcp://host:port``. Empty: read it from the job's journal.
    """

    def __init__(self, job: Job, settings: Settings, slot: int, coordinator_address: str) -> None:
        self._built = self._topology = job.build(settings)
        name = self._topology.job
        self._settings = settings = with_settings(settings, reading_group=name)
        self._interval_s = settings.heartbeat_interval_ms / 1000
        # This is later than the coordinator's own limit: by then the slot is fenced.
        self._hang_bound_s = 2 * settings.checkpoint_timeout_ms / 1000
        self._exit: events.Exit | None = None
        self._ticked_s = time.monotonic()
        self._inbox = Inbox()
        self._watchdog = Watchdog(self._hung)
        self._kafka_waits = KafkaWaits(self._watchdog, Relief(Outcasts(settings).leave))
        self._host = ShardHost(self._topology, settings, self._inbox.post)
        self._batches = Batches(settings, self._host.largest_batch)
        self._source_checks = SourceChecks(name, self._host.look, self._host.settled_look)
        identity = _identity(slot, self._topology, self._host.snapshot_store_identity)
        bounds, now_ms = _bounds(settings), monotonic_ms()
        self._core = core.WorkerCore(identity, bounds, now_ms)
        begin = {"identity": identity, "bounds": bounds, "now_ms": now_ms}
        self._ring = EventRing("worker", __version__, begin, Path(settings.state_dir) / "logs")
        self._health = WorkerHealth(name, identity.worker)
        self._port = OutputPort()
        self._port.stage_sizes = self._core.state.stage_sizes
        self._port.letters.most = settings.dead_letters_max
        record_watch = RecordWatch()
        self._link = LeaderLink(
            settings,
            name,
            coordinator_address,
            self._core.state,
            self._inbox.post,
            on_job_over=self._on_job_over,
        )
        self._shards = RunningShards(
            self._topology,
            settings,
            self._inbox.put,
            wake=lambda: self._inbox.put(CallsEnded()),
            say=lambda text: _log.warning("%s", text),
        )
        self._pipeline = EpochPipeline(
            self._topology,
            self._core.state,
            self._port,
            self._batches,
            self._source_checks,
            self._watchdog,
            self._hang_bound_s,
            self._inbox.post,
            self._host.note_delta,
        )
        self._pump = RecordPump(
            self._shards,
            self._pipeline,
            self._core.state,
            self._feed,
            self._inbox,
            self._link,
            self._source_checks,
            record_watch,
            self._watchdog,
            self._hang_bound_s,
            on_read=self._report,
        )
        self._reporting = Reporting(
            self._core,
            self._link,
            self._health,
            self._host,
            self._shards,
            self._pump,
            self._pipeline,
            self._port,
            self._kafka_waits,
            record_watch,
        )
        self._pulse = PulseThread(
            settings,
            self._core.state,
            self._reporting,
            self._inbox,
            self._link,
            self._shards,
            record_watch,
            self._watchdog,
            self._kafka_waits,
            self._health,
            end=self._hung,
        )

    # --- life ---------------------------------------------------------------------------------------------

    def run(self) -> Ended:
        """Work until the worker is told to exit."""
        # A record may take as long as its limit allows. Everything else in an iteration has a limit too.
        turn_bound_s = (self._settings.record_bound_ms / 1000 or UNBOUNDED_S) + self._hang_bound_s
        with health_port(self._settings.http_bind, self._health, insecure=self._settings.insecure) as port:
            handler_processes.keep_from_children(addresses=[port.url] if port is not None else [])
            self._pulse.start()
            self._link.start()
            try:
                while self._exit is None:
                    self._health.turned(turn_bound_s)
                    self._pump.add_merged()
                    self._pump.add_called()
                    self._take_events()
                    self._tick_if_due()
                    if self._exit is None and self._pump.has_work:
                        self._pump.run_chunk()
            finally:
                self._close()
        in_good_order = self._exit.code in IN_GOOD_ORDER
        _log.log(logging.INFO if in_good_order else logging.ERROR, "leaving: %s", self._exit.reason)
        return Ended(self._exit.code, self._exit.reason, self._exit.failure)

    def request_termination(self) -> None:
        """Leave cleanly (see `events.TerminationRequested`). May be called by a signal handler."""
        self._inbox.post(events.TerminationRequested())

    def _close(self) -> None:
        self._pulse.stop()
        with self._watchdog.bounded("closing", CLOSING_BOUND_S):
            self._pipeline.destroy()
            # This comes before everything that takes time: other workers may get the shards as soon as the
            # connection is closed.
            self._link.close()
            self._shards.close()
            self._pipeline.close()
            self._host.close()

    # --- events -------------------------------------------------------------------------------------------

    def _take_events(self) -> None:
        """Handle queued events. Waits for one if there are no records to process."""
        for item in self._inbox.take(self._pump.wait_s(self._interval_s)):
            with self._watchdog.bounded(f"handling {type(item).__name__}", self._hang_bound_s):
                self._handle(item)

    def _handle(self, item: events.Event | ReaderEvent | CallsEnded) -> None:
        match item:
            case Batch():
                self._pump.add(item)
            case ReadUpTo():
                self._pump.add_told(item)
            case ReadFailed():
                self._pump.read_failed(item)
            case CallsEnded():
                pass  # the next iteration takes them
            case ReaderDied():
                self._exit_now(Failure(FailureKind.BUG, f"reading failed: {item.reason}").fitted())
            case events.MessageReceived(messages.Drain()):
                self._pump.fire_due()  # timers that are due are part of the work to be finished
                self._feed(item)
            case _:
                self._feed(item)

    def _exit_now(self, failure: Failure) -> None:
        self._exit = events.Exit(ExitCode.MISTAKE, str(failure), failure)

    def _hung(self, what: str, code: int = ExitCode.CRASHED) -> None:
        self._ring.dump()
        dump_and_exit(what, code)

    def dump_events_on_signal(self) -> None:
        """From now on, SIGUSR1 writes the core's last events to a file. Called by the main thread."""
        self._ring.dump_on_signal()

    def _feed(self, event: events.Event) -> None:
        """Pass an event to the core, and carry out what it decides."""
        if handler_processes.is_forked:
            os._exit(ExitCode.CRASHED)  # a handler forked, and the child returned from the handler
        now_ms = monotonic_ms()
        effects = self._core.handle(event, now_ms)
        self._ring.note(now_ms, event, effects)
        for effect in effects:
            self._carry_out(effect)
        if not isinstance(event, events.RecordsProcessed):
            self._health.publish(self._core.state)

    def _tick_if_due(self) -> None:
        """The core has to learn the time even under load, because its deadlines apply then too."""
        now_s = time.monotonic()
        if now_s - self._ticked_s >= self._interval_s and self._exit is None:
            self._ticked_s = now_s
            self._feed(events.Tick())
            if self._topology.keeps_time or self._topology.has_global_tables:
                self._pump.pass_time(monotonic_ms())
            self._pump.hold_back()
            self._pipeline.flush_quiet(runner.state for runner in self._shards.runners.values())
            self._reporting.refresh()

    def _report(self) -> None:
        """Everything that was read has been processed: other parts may wait for that."""
        self._reporting.refresh()
        self._reporting.send_heartbeat()

    def _on_job_over(self) -> None:
        self._kafka_waits.in_vain = True

    # --- effects ------------------------------------------------------------------------------------------

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.Send():
                self._link.send(effect.message)
            case events.PrepareEpoch():
                self._pipeline.prepare(effect, self._shards.runners)
            case events.CommitEpoch():
                self._pipeline.commit(effect)
            case events.StartReading(shard):
                stage = self._topology.stage(shard.stage)
                self._pump.start(effect, stage, self._host.state(shard), self._port)
            case events.EndInput():
                self._pump.end(effect.end)
            case events.StopReading():
                self._shards.stop(effect.shards)
            case events.PauseReading():
                self._pump.pause(effect.reason)
            case events.ResumeReading():
                self._pump.resume()
            case events.OpenProducers():
                self._open_producers(effect)
            case events.DestroyProducers():
                self._pipeline.destroy()
            case events.AbortEpochs():
                self._pipeline.abort(effect.session, self._host.states())
            case events.RewindShards():
                self._source_checks.forget()
                self._shards.release(effect.shards)
                self._host.rewind(effect.shards)
            case events.RestoreShards():
                before = self._pipeline.take_retired()
                self._host.restore(effect.session, effect.shards, effect.committed, before)
            case events.KeepStandbys():
                self._host.keep_standbys(effect.shards, before=self._pipeline.retired)
            case events.DropLayers():
                self._source_checks.forget()
                self._shards.forget()
                self._host.drop_states()
            case events.CloseShards():
                self._shards.release(effect.shards)
                self._pipeline.release(effect.shards)
                self._host.release(effect.shards, self._pipeline.rest())
            case events.Log():
                _log.log(_LEVELS[effect.level.upper()], "%s", effect.text)
            case events.Exit():
                self._exit = effect

    def _open_producers(self, effect: events.OpenProducers) -> None:
        if not self._name_topics(effect.internal_topics):
            message = "the coordinator now uses other names for the job's internal topics"
            self._exit_now(Failure(FailureKind.CLUSTER, message))
            return
        self._host.open(effect.slot)
        self._shards.open_readers()
        make = functools.partial(
            make_writer,
            self._settings,
            self._topology.job,
            effect.slot,
            self._shards.group_metadata,
            self._batches,
            self._kafka_waits,
        )
        self._pipeline.open(effect.session, make)

    def _name_topics(self, names: Mapping[str, str]) -> bool:
        """Use the coordinator's names for internal topics. Returns False if readers already use other
        names.
        """
        topology = self._built.with_internal_topics(names)
        if topology == self._topology:
            return True
        if self._shards.has_readers:
            return False
        self._topology = topology
        self._host.name_topics(topology)
        self._shards.name_topics(topology)
        self._pipeline.name_topics(topology)
        return True


def _identity(slot: int, topology: Topology, snapshot_store: str) -> model.Identity:
    return model.Identity(
        worker=f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
        host=socket.gethostname(),
        pid=os.getpid(),
        wanted_slot=slot,
        topology=topology.fingerprint,
        snapshot_store=snapshot_store,
        version=__version__,
        process_space=process_space(),
    )


def _bounds(settings: Settings) -> model.Bounds:
    return model.Bounds(
        epoch_records_max=settings.epoch_records_max,
        coordinator_loss_ms=settings.coordinator_loss_bound_ms,
        offset_refresh_ms=settings.offset_refresh_interval_ms,
        epoch_failures_max=settings.epoch_failures_max,
        leave_timeout_ms=settings.worker_leave_timeout_ms,
        last_commit_timeout_ms=settings.checkpoint_timeout_ms,
        leader_patience_ms=settings.session_timeout_ms,
    )


def run_worker(job: Job, settings: Settings, *, slot: int = -1, coordinator_address: str = "") -> Ended:
    """Run a worker in this process until it is told to exit (by the coordinator, SIGTERM or SIGINT).

    Returns:
        How it ended. The exit code is 0 if it left cleanly, 3 if the job failed, 1 if this worker can't
        continue, 4 if it was drained and must not be restarted, 5 if the job has ended.

    Raises:
        FclusterError: it can't start. The message says why.
    """
    sys.setswitchinterval(THREAD_SWITCH_INTERVAL_S)
    address = coordinator_address or settings.coordinator_address
    worker = Worker(job, settings, slot, address)
    handler_processes.keep_from_children(
        addresses=[*settings.bootstrap_servers.split(","), address],
        directory=Path(settings.state_dir),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: worker.request_termination())
    worker.dump_events_on_signal()
    interpreter_lock.install(settings.session_timeout_ms / 1000)
    garbage.settle()
    return worker.run()
