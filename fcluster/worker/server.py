"""The worker process: carries out what `core` decides, and runs records through the job.

Responsible for: threads, queues and the order of things. One main thread owns the core, the runners and the
open epoch. All other threads report to it through one queue (`inbox`):

- the control thread (ZeroMQ) receives the coordinator's messages (`leader_link`),
- a reader thread for each isolation level, and another one for merged topics, fetches batches of records
  (`consuming`); records of a shard with several inputs are put in order first (`merges`),
- the commit thread prepares and commits epochs (`epoch_pipeline`), one thread for each session,
- the restore thread restores, opens and closes shards, and the snapshot thread uploads them (`shards`),
- the standby thread keeps warm copies of other workers' shards (`standby`),
- the pulse thread sends heartbeats and watches for hung threads,
- the seeker's thread looks for the leader when there is none (`leader_search`).

Of the invariants it keeps those about threads: between two records only the main thread decides, so a barrier
never falls into the middle of a record.

Must not: decide protocol questions; `core` does.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message

from fcluster import __version__
from fcluster.api.job import Job
from fcluster.common.errors import one_line
from fcluster.common.failures import bounded_text
from fcluster.common.ids import ShardId
from fcluster.common.isolation import Isolation
from fcluster.common.processes import process_space
from fcluster.common.settings import Settings, with_settings
from fcluster.engine.failure import Failure, UnkeptStateError
from fcluster.graph.topology import Stage, Topology
from fcluster.kafka.clients import LASTING, make_consumer
from fcluster.storage.store import LOCAL_TROUBLE
from fcluster.wire import messages
from fcluster.wire.http_port import health_port
from fcluster.wire.messages import ShardStatus, WorkerStats
from fcluster.worker import handler_processes, interpreter_lock
from fcluster.worker.announcing import announced_steps
from fcluster.worker.batches import Batches
from fcluster.worker.chunks import Chunks
from fcluster.worker.consuming import Batch, Idle, ReaderDied, ReaderEvent, ReadFailed, SourceReader
from fcluster.worker.core import events, model
from fcluster.worker.core import worker as core
from fcluster.worker.core.model import RecordAt
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.health import WorkerHealth
from fcluster.worker.inbox import Inbox
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.leader_link import LeaderLink
from fcluster.worker.merges import ShardMerge, sorted_out
from fcluster.worker.processing import (
    HandlerError,
    InputRunner,
    OutputPort,
    RecordError,
    ShardRunner,
    UnreadableRecordError,
    describe_record,
    running_step,
)
from fcluster.worker.record_watch import RecordWatch, Running, describe_overdue, frame_of
from fcluster.worker.shards import ShardHost
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.transactions import TransactionLostError, make_writer
from fcluster.worker.watchdog import Watchdog, dump_and_exit

_log = logging.getLogger("fcluster.worker")

LONG_RECORD_S = 0.2
"""A record that takes longer is reported with the heartbeats."""
LAST_WORD_S = 0.3
"""How long the last message before the process ends may take to be sent."""
RECORD_WATCH_INTERVAL_S = 0.25
UNBOUNDED_S = 1e9
READ_AHEAD_KIB = 16 * 1024
READ_AHEAD_MERGED_KIB = 2 * 1024
"""Of each partition that is merged: what is fetched ahead is thrown away when its reading is held."""
_LEVELS = logging.getLevelNamesMapping()
THREAD_SWITCH_INTERVAL_S = 0.001
"""How soon a waiting thread gets its turn. The default of 5 ms would be added to each step of an epoch that
needs another thread."""


class Worker:
    """One worker process.

    Args:
        job: to run.
        settings: resolved.
        slot: the wanted slot, -1 for any.
        coordinator_address: ``tcp://host:port``. Empty: read it from the job's journal.
    """

    def __init__(self, job: Job, settings: Settings, slot: int, coordinator_address: str) -> None:
        self._built: Topology = job.build(settings)
        self._topology = self._built
        settings = with_settings(settings, reading_group=self._topology.job)
        self._settings = settings
        self._inbox = Inbox()
        self._chunks = Chunks()
        self._record_watch = RecordWatch()
        self._main_thread = threading.get_ident()
        self._exit: events.Exit | None = None
        self._watchdog = Watchdog()
        self._kafka_waits = KafkaWaits(self._watchdog)
        self._host = ShardHost(self._topology, settings, self._inbox.post)
        self._batches = Batches(settings, self._host.largest_batch)
        self._source_checks = SourceChecks(self._topology.job, self._host.look, self._host.settled_look)
        identity = model.Identity(
            worker=f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            host=socket.gethostname(),
            pid=os.getpid(),
            wanted_slot=slot,
            topology=self._topology.fingerprint,
            snapshot_store=self._host.snapshot_store_identity,
            version=__version__,
            process_space=process_space(),
        )
        bounds = model.Bounds(
            epoch_records_max=settings.epoch_records_max,
            coordinator_loss_ms=settings.coordinator_loss_bound_ms,
            offset_refresh_ms=settings.offset_refresh_interval_ms,
            epoch_failures_max=settings.epoch_failures_max,
            leave_timeout_ms=settings.worker_leave_timeout_ms,
            last_commit_timeout_ms=settings.checkpoint_timeout_ms,
            leader_patience_ms=settings.session_timeout_ms,
        )
        self._core = core.WorkerCore(identity, bounds, _now_ms())
        self._health = WorkerHealth(self._topology.job, identity.worker)
        self._port = OutputPort()
        self._runners: dict[ShardId, ShardRunner] = {}
        self._inputs: list[InputRunner] = []  # of all runners
        self._routes = _no_routes(self._topology)
        self._readers: dict[tuple[Isolation, bool], SourceReader] = {}  # those of merged topics are apart
        self._merges: dict[ShardId, ShardMerge] = {}
        self._merge_at: dict[tuple[str, int], ShardMerge] = {}
        self._group_metadata: Any = None
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
        self._paused = False
        self._records_in = 0
        self._stats = WorkerStats()
        self._running: Running | None = None
        self._ticked_s = time.monotonic()
        self._link = LeaderLink(
            settings,
            self._topology.job,
            coordinator_address,
            self._core.state,
            self._inbox.post,
            on_job_over=self._on_job_over,
        )
        self._stopping = threading.Event()
        self._pulse = threading.Thread(target=self._run_pulse, name="pulse", daemon=True)

    # --- life ---------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Work until told to exit. Returns the process's exit code."""
        with health_port(self._settings.http_bind, self._health, insecure=self._settings.insecure) as port:
            handler_processes.keep_from_children(addresses=[port.url] if port is not None else [])
            self._pulse.start()
            self._link.start()
            try:
                while self._exit is None:
                    self._health.turned(self._turn_bound_s)
                    if self._merges:
                        self._take_merged()
                    self._take_events()
                    self._tick_if_due()
                    if self._chunks and not self._holds_still and self._exit is None:
                        self._process_chunk()
                        for idle in self._chunks.idle():
                            self._on_idle(idle)
            finally:
                self._close()
        in_good_order = self._exit.code in model.EXITS_IN_GOOD_ORDER
        _log.log(logging.INFO if in_good_order else logging.ERROR, "leaving: %s", self._exit.reason)
        return self._exit.code

    def request_termination(self) -> None:
        """Leave cleanly (see `events.TerminationRequested`). May be called by a signal handler."""
        self._inbox.post(events.TerminationRequested())

    def _close(self) -> None:
        self._stopping.set()
        with self._watchdog.bounded("closing", 60):
            self._pipeline.destroy()
            # Before anything that takes time: others may get the shards as soon as the connection is closed.
            self._link.close()
            for reader in self._readers.values():
                reader.close(timeout_s=5)
            self._runners.clear()
            self._inputs.clear()
            self._pipeline.close()
            self._host.close()

    # --- events -------------------------------------------------------------------------------------------

    def _take_events(self) -> None:
        """Handle queued events. Waits for one if there are no records to process."""
        waiting = not self._chunks or self._holds_still
        timeout_s = self._settings.heartbeat_interval_ms / 1000
        if self._merges and waiting:
            timeout_s = self._until_merged_s(timeout_s)
        for item in self._inbox.take(timeout_s if waiting else 0):
            with self._watchdog.bounded(f"handling {type(item).__name__}", self._hang_bound_s):
                self._handle(item)

    @property
    def _holds_still(self) -> bool:
        """Whether processing is paused, whatever was read."""
        return self._paused or self._core.state.waits_for_commit()

    @property
    def _hang_bound_s(self) -> float:
        # Later than the coordinator's own limit: by then the slot is fenced.
        return 2 * self._settings.checkpoint_timeout_ms / 1000

    @property
    def _turn_bound_s(self) -> float:
        """The longest time for one iteration of the main loop: a record may take as long as it may, all
        else has limits too.
        """
        record_s = self._settings.record_bound_ms / 1000 or UNBOUNDED_S
        return record_s + self._hang_bound_s

    def _handle(self, item: events.Event | ReaderEvent) -> None:
        match item:
            case Batch():
                if self._merge_at:
                    self._sort_out(item)
                else:
                    self._chunks.add(item)
            case Idle():
                if self._merge_at:
                    self._note_merged(item)
                if not self._chunks.hold_idle(item):
                    self._on_idle(item)
            case ReadFailed():
                self._on_read_failed(item)
            case ReaderDied():
                self._exit = events.Exit(1, f"reading failed: {item.reason}")
            case _:
                self._feed(item)

    def _feed(self, event: events.Event) -> None:
        """Give an event to the core and carry out what it decides."""
        if handler_processes.is_forked:
            os._exit(handler_processes.EXIT_FORKED)  # a handler forked, and its child returned from it
        for effect in self._core.handle(event, _now_ms()):
            self._carry_out(effect)
        if not isinstance(event, events.RecordsProcessed):
            self._health.publish(self._core.state)

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.Send():
                self._link.send(effect.message)
            case events.PrepareEpoch():
                self._pipeline.prepare(effect, self._runners)
            case events.CommitEpoch():
                self._pipeline.commit(effect)
            case events.StartReading():
                self._start_reading(effect)
            case events.StopReading():
                self._stop_reading(effect.shards)
            case events.PauseReading():
                self._pause_reading(effect.reason)
            case events.ResumeReading():
                self._resume_reading()
            case events.OpenProducers():
                self._open_producers(effect)
            case events.DestroyProducers():
                self._pipeline.destroy()
            case events.RestoreShards():
                before = self._pipeline.take_retired()
                self._host.restore(effect.session, effect.shards, effect.committed, before)
            case events.KeepStandbys():
                self._host.keep_standbys(effect.shards, before=self._pipeline.retired)
            case events.DropLayers():
                self._drop_layers()
            case events.CloseShards():
                self._close_shards(effect.shards)
            case events.Log():
                _log.log(_LEVELS[effect.level.upper()], "%s", effect.text)
            case events.Exit():
                self._exit = effect

    def _tick_if_due(self) -> None:
        """The core has to learn the time under load as well, because its deadlines apply then too."""
        now_s = time.monotonic()
        if now_s - self._ticked_s >= self._settings.heartbeat_interval_ms / 1000 and self._exit is None:
            self._ticked_s = now_s
            self._tick()

    def _tick(self) -> None:
        self._feed(events.Tick())
        self._hold_back()
        self._pipeline.flush_quiet(runner.state for runner in self._runners.values())
        self._refresh_stats()

    def _on_job_over(self) -> None:
        self._kafka_waits.in_vain = True

    def _on_idle(self, idle: Idle) -> None:
        for (topic, partition), position in idle.positions.items():
            runner = self._routes[topic].get(partition)
            if (topic, partition) in self._merge_at:
                continue  # what was read of it may wait there
            if runner is not None and runner.generation <= idle.generation:
                runner.read_position = max(position, runner.next_offset)
        for (topic, partition), end in idle.ends.items():
            runner = self._routes[topic].get(partition)
            if runner is not None:
                runner.end = end
        self._refresh_stats()
        self._send_heartbeat()

    def _on_read_failed(self, failure: ReadFailed) -> None:
        where = f"{failure.topic}/{failure.partition}"
        if failure.error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            # The restore checks what exists: it names the gap, or continues after it if that is allowed.
            reason = f"the next record of {where} is gone ({failure.error.str()})"
            self._feed(events.TransactionFailed(self._core.state.session, reason))
        elif failure.error.code() in (
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError._UNKNOWN_PARTITION,
            KafkaError._UNKNOWN_TOPIC,
        ):
            # This client may not know the topic yet. The coordinator finds out whether it is gone.
            self._link.say_trouble(f"can't read {where}: {failure.error.str()}; asking the brokers again")
        else:
            _log.warning("reading %s: %s", where, failure.error)

    # --- records ------------------------------------------------------------------------------------------

    def _sort_out(self, batch: Batch) -> None:
        """What is of a shard with several inputs waits until its turn comes."""
        rest, merged = sorted_out(batch, self._merge_at)
        for (topic, partition), records in merged.items():
            runner = self._routes[topic].get(partition)
            if runner is not None and runner.generation <= batch.generation:
                self._merge_at[topic, partition].add(runner.number, records)
        for at, (position, end) in batch.standings.items():
            self._note_standing(at, batch.generation, position, end)
        if rest:
            self._chunks.add(dataclasses.replace(batch, messages=rest))
        else:
            batch.reader.done()

    def _note_merged(self, idle: Idle) -> None:
        """What a merge waits for may not come for now: it has to know at once."""
        for at, position in idle.positions.items():
            self._note_standing(at, idle.generation, position, idle.ends.get(at))

    def _note_standing(self, at: tuple[str, int], generation: int, position: int, end: int | None) -> None:
        topic, partition = at
        runner, merge = self._routes[topic].get(partition), self._merge_at.get(at)
        if runner is not None and merge is not None and runner.generation <= generation:
            merge.note(runner.number, position, end)

    def _take_merged(self) -> None:
        """Have processed what is next in the shards with several inputs."""
        now_ms = _now_ms()
        for merge in self._merges.values():
            batch = merge.next_batch(now_ms)
            if batch is not None:
                self._chunks.add(batch)

    def _until_merged_s(self, timeout_s: float) -> float:
        """The time-out, or less if something is to be taken before that nobody tells of."""
        now_ms = _now_ms()
        due = [due_ms - now_ms for merge in self._merges.values() if (due_ms := merge.due_ms()) is not None]
        return max(0.001, min([timeout_s, *(wait_ms / 1000 for wait_ms in due)]))

    def _process_chunk(self) -> None:
        if not self._pipeline.is_open or not self._routes_open():
            self._chunks.drop_batch()
            return
        batch, chunk = self._chunks.take()
        started_s = time.monotonic()
        left = self._process(chunk, batch)
        self._chunks.done(left, time.monotonic() - started_s)
        with self._watchdog.bounded("serving delivery reports", self._hang_bound_s):
            self._hold_back()

    def _routes_open(self) -> bool:
        return any(self._routes.values())

    def _process(self, chunk: Sequence[Message], batch: Batch) -> int:
        """Process a chunk. Returns how many of its last records are left, because something else came up."""
        current = chunk
        records_max = self._core.state.pieces.records_max
        if records_max is not None or batch.generation < batch.reader.newest_generation:
            current = self._current(chunk, batch)
        remaining = iter(current)
        waiting = len(current)
        while True:
            if records_max is None:
                failure = self._run_records(remaining)
            else:
                room = records_max - self._core.state.open.records
                failure = self._run_records(islice(remaining, room))
            left = length_hint(remaining)
            processed, waiting = waiting - left, left
            self._records_in += processed
            self._pipeline.count(processed)
            touched = [one for one in self._inputs if one.last is not None]
            dirty = frozenset(one.shard for one in touched)
            for one in touched:
                self._source_checks.read(one.topic, one.partition, one.topic_id)
            if dirty:
                backlog = batch.full or self._chunks.backlog
                newest = None
                if records_max is not None and len(dirty) == 1:
                    newest = self._runners[next(iter(dirty))].newest()
                self._feed(events.RecordsProcessed(dirty, processed, backlog, newest))
            if failure is None:
                return left if current is chunk or not left else _left_of(chunk, next(remaining))
            with self._watchdog.bounded(f"handling {type(failure).__name__}", self._hang_bound_s):
                self._feed(failure)
            if not isinstance(failure, events.StopRecordReached):
                return 0  # everything since the last commit will be processed again
            if records_max is not None:
                # Records of the stopped shard don't belong to the piece: they are left out next time.
                return _left_of(chunk, next(remaining)) if left else 0

    def _run_records(self, records: Iterator[Message]) -> events.Event | None:
        """Process records until there are no more, one fails, or something else has happened.

        Returns:
            What failed.
        """
        routes = self._routes
        session = self._core.state.session
        interrupts, watch = self._inbox.interrupts, self._record_watch
        message: Any = None
        runner: Any = None  # that of `message`
        try:
            if not self._pipeline.has_begun:
                self._pipeline.begin()
            for message in records:
                runner = routes[message.topic()].get(message.partition())
                if runner is not None:
                    watch.record = message
                    runner.handle(message)
                    runner.last = message
                if interrupts:
                    break
        except UnreadableRecordError as error:
            at = _place_of(runner, message)
            return events.StopRecordReached(session, at.shard, at.offset, error.reason, at.input)
        except HandlerError as error:
            at = _place_of(runner, message)
            return events.HandlerFailed(session, at.shard, at.offset, error.reason, error.failure, at.input)
        except UnkeptStateError as error:
            failure = Failure(error.reason, step=error.step)
            return events.EpochFailed(session, failure, self._only_record(runner, message))
        except TransactionLostError as error:
            return self._pipeline.lost(session, error, self._only_record(runner, message))
        except LOCAL_TROUBLE as error:
            return events.WorkerBroken(one_line(error))
        except (KafkaException, RecordError) as error:
            reason = f"can't write an output of {describe_record(message)}: {error}"
            at = _place_of(runner, message)
            return events.HandlerFailed(session, at.shard, at.offset, reason, input=at.input)
        finally:
            watch.record = None
        return None

    def _run_announced(self, one: InputRunner, record: Message, handle: Callable[[Message], None]) -> None:
        """Process a record that may end the process: the coordinator knows before each step."""
        announce = functools.partial(self._announce, one, record)
        announce("")  # decoding it may be what ends the process
        try:
            with announced_steps(announce):
                handle(record)
        finally:
            self._link.send(messages.RecordEnded(self._core.state.session))

    def _announce(self, one: InputRunner, record: Message, step: str) -> None:
        if handler_processes.is_forked:
            return
        self._link.announce(
            messages.RecordBegun(
                self._core.state.session,
                one.shard,
                record.offset() or 0,
                bounded_text(step, 1_000),
                describe_record(record),
                one.number,
            )
        )

    def _only_record(self, runner: Any, message: Any) -> RecordAt | None:
        """The current record, if no other can be in the open epoch."""
        core_state = self._core.state
        if runner is None or core_state.pieces.records_max != 1 or core_state.open.records:
            return None
        return _place_of(runner, message)

    def _current(self, chunk: Sequence[Message], batch: Batch) -> list[Message]:
        """Without the records that were fetched before their partition was rewound or released."""
        if isinstance(batch.reader, ShardMerge):
            # All records are of one shard, and of the generation in which its reading began.
            return [] if batch.generation < batch.reader.newest_generation else list(chunk)
        current: list[Message] = []
        for message in chunk:
            runner = self._routes[message.topic() or ""].get(message.partition() or 0)
            if runner is not None and runner.generation <= batch.generation:
                current.append(message)
        return current

    def _hold_back(self) -> None:
        lost = self._pipeline.hold_back(self._chunks.backlog)
        if lost is not None:
            self._feed(lost)

    # --- effects ------------------------------------------------------------------------------------------

    def _open_producers(self, effect: events.OpenProducers) -> None:
        if not self._name_topics(effect.internal_topics):
            self._exit = events.Exit(1, "the coordinator now uses other names for the job's internal topics")
            return
        self._host.open(effect.slot)
        self._open_readers()
        make = functools.partial(
            make_writer,
            self._settings,
            self._topology.job,
            effect.slot,
            self._group_metadata,
            self._batches,
            self._kafka_waits,
        )
        self._pipeline.open(effect.session, make)

    def _name_topics(self, names: Mapping[str, str]) -> bool:
        """Use the coordinator's names for internal topics. False if readers already use other names."""
        topology = self._built.with_internal_topics(names)
        if topology == self._topology:
            return True
        if self._readers:
            return False
        self._topology = topology
        self._host.name_topics(topology)
        self._pipeline.name_topics(topology)
        self._routes = _no_routes(topology)
        return True

    def _open_readers(self) -> None:
        topics: dict[tuple[Isolation, bool], list[str]] = {}
        for stage in self._topology.stages:
            for source in stage.inputs:
                key = (source.topic.isolation, len(stage.inputs) > 1)
                topics.setdefault(key, []).append(source.topic.name)
        for (isolation, merged), read in topics.items():
            if (isolation, merged) not in self._readers:
                ahead_kib = READ_AHEAD_MERGED_KIB if merged else READ_AHEAD_KIB
                make = functools.partial(self._make_source_consumer, isolation, ahead_kib)
                name = f"reader-{isolation}" + ("-merged" if merged else "")
                self._readers[isolation, merged] = SourceReader(make, self._inbox.put, name, read)

    def _reader_of(self, stage: Stage, number: int) -> SourceReader:
        return self._readers[stage.inputs[number].topic.isolation, len(stage.inputs) > 1]

    def _make_source_consumer(
        self, isolation: Isolation, ahead_kib: int, fetching: Mapping[str, int]
    ) -> Consumer:
        consumer = make_consumer(
            self._settings,
            isolation,
            **{
                "group.id": self._topology.job,
                # librdkafka's own queue, in front of the batches: enough to stay ahead, small enough for
                # many workers. When it is full, look again soon: the default is after a second.
                "queued.max.messages.kbytes": ahead_kib,
                "fetch.queue.backoff.ms": 10,
            },
            **LASTING,
            **fetching,
        )
        if self._group_metadata is None:
            self._group_metadata = consumer.consumer_group_metadata()
        return consumer

    def _start_reading(self, effect: events.StartReading) -> None:
        stage = self._topology.stage(effect.shard.stage)
        state = self._host.state(effect.shard)
        runner = ShardRunner(stage, effect.shard.partition, state, effect.position, self._port)
        for record in effect.condemned:
            runner.condemn(record)
        stop = effect.stop_record
        if stop is not None:
            runner.inputs[stop.input].stop_before(stop.offset, stop.reason)
        for one, offsets in zip(runner.inputs, effect.announced, strict=False):
            one.announce(offsets, functools.partial(self._run_announced, one))
        readers = [self._reader_of(stage, one.number) for one in runner.inputs]
        merged = len(runner.inputs) > 1
        if merged:
            merge = ShardMerge(runner.inputs, readers, self._settings.max_task_idle_ms)
            self._merges[effect.shard] = merge
            self._merge_at |= {(one.topic, one.partition): merge for one in runner.inputs}
        for one, reader in zip(runner.inputs, readers, strict=True):
            one.generation = reader.start({(one.topic, one.partition): one.begun_at}, watched=merged)
            self._routes[one.topic][one.partition] = one
        self._runners[effect.shard] = runner
        self._inputs.extend(runner.inputs)

    def _stop_reading(self, shards: Sequence[ShardId]) -> None:
        for shard in shards:
            stage = self._topology.stage(shard.stage)
            for number, topic in enumerate(stage.topics):
                if self._routes[topic].pop(shard.partition, None) is not None:
                    self._reader_of(stage, number).stop({(topic, shard.partition)})
                    self._merge_at.pop((topic, shard.partition), None)
            merge = self._merges.pop(shard, None)
            if merge is not None:
                merge.close()

    def _drop_layers(self) -> None:
        self._source_checks.forget()
        self._runners.clear()
        self._inputs.clear()
        self._host.drop_states()

    def _close_shards(self, shards: Sequence[ShardId]) -> None:
        for shard in shards:
            self._runners.pop(shard, None)
        self._inputs = [one for runner in self._runners.values() for one in runner.inputs]
        self._host.release(shards, self._pipeline.rest())

    def _pause_reading(self, reason: str) -> None:
        _log.info("paused: %s", reason)
        self._paused = True
        for reader in self._readers.values():
            reader.pause()

    def _resume_reading(self) -> None:
        self._paused = False
        for reader in self._readers.values():
            reader.resume()

    # --- pulse --------------------------------------------------------------------------------------------

    def _run_pulse(self) -> None:
        """Heartbeats go on while a handler runs. The watchdog decides whether the handler takes too long."""
        interval_s = self._settings.heartbeat_interval_ms / 1000
        heartbeat_due_s = 0.0
        while not self._stopping.is_set():
            now_s = time.monotonic()
            interpreter_lock.put_off()
            self._watch_record(now_s)
            if now_s >= heartbeat_due_s:
                heartbeat_due_s = now_s + interval_s
                self._send_heartbeat()
                self._watchdog.check()
                self._kafka_waits.check()
                self._health.sent_heartbeat(interval_s)
            wake_s = min(heartbeat_due_s, now_s + RECORD_WATCH_INTERVAL_S)
            self._stopping.wait(max(0.01, wake_s - time.monotonic()))
        interpreter_lock.rest()

    def _watch_record(self, now_s: float) -> None:
        """Check how long the current record takes. A chunk that has become slow ends with it."""
        running = self._running = self._record_watch.sample(now_s)
        if self._record_watch.record is not None:
            self._inbox.interrupt()
        if running is None:
            return
        if 0 < self._settings.record_bound_ms <= running.running_s * 1000:
            self._give_up_record(running)

    def _give_up_record(self, running: Running) -> None:
        """A handler can't be interrupted from outside, so the process ends. The shard's next owner is
        told.
        """
        frame = frame_of(self._main_thread)
        reason = describe_overdue(running, self._settings, frame)
        topic, partition = running.record.topic() or "", running.record.partition() or 0
        runner = self._routes.get(topic, {}).get(partition)
        offset = running.record.offset()
        if runner is not None and offset is not None:
            overdue = messages.RecordOverdue(
                self._core.state.session,
                runner.shard,
                offset,
                bounded_text(reason, 2_000),
                bounded_text(running_step(frame), 1_000),
                runner.number,
            )
            self._link.send(overdue)
            time.sleep(LAST_WORD_S)
        dump_and_exit(reason, model.EXIT_RECORD_OVERDUE)

    def _send_heartbeat(self) -> None:
        # Others wait for these messages, so they don't wait for the main thread, which may be busy.
        read_bytes, left_bytes, left_ms = self._host.restore_progress()
        waits_for, waited_s = self._kafka_waits.longest()
        stats = msgspec.structs.replace(
            self._stats,
            restoring=self._host.restoring,
            restore_bytes=read_bytes,
            restore_bytes_left=left_bytes,
            restore_ms_left=left_ms,
            standbys=self._host.standby_statuses(),
            record=_long_record(self._running),
            kafka_wait=waits_for,
            kafka_wait_ms=round(1000 * waited_s),
        )
        self._health.note_stats(stats)
        if self._core.state.session and self._link.connected:
            heartbeat = messages.Heartbeat(self._core.state.session, stats, self._core.orders_heard)
            self._link.send(heartbeat)

    def _refresh_stats(self) -> None:
        latencies = self._pipeline.commit_latencies_ms()
        self._stats = WorkerStats(
            records_in=self._records_in,
            records_out=self._port.records,
            records_skipped=self._port.skipped,
            epochs_committed=self._pipeline.committed,
            commit_latency_ms_p50=_quantile(latencies, 0.5),
            commit_latency_ms_p99=_quantile(latencies, 0.99),
            restoring=self._host.restoring,
            resident_bytes=_resident_bytes(),
            snapshot_epoch_min=self._host.snapshot_epoch_min,
            shards=[
                status
                for shard, runner in self._runners.items()
                for status in self._shard_statuses(shard, runner)
            ],
        )

    def _shard_statuses(self, shard: ShardId, runner: ShardRunner) -> list[ShardStatus]:
        """Where the shard stands in each of its inputs."""
        owned = self._core.state.shards.get(shard)
        committed = owned.position if owned is not None and owned.position is not None else runner.position
        flight = self._core.state.in_flight
        in_flight = flight is not None and shard in flight.shards
        dirty = runner.is_touched or in_flight
        return [
            ShardStatus(
                shard,
                max(one.read_position, one.next_offset),
                at.offset,
                one.end,
                dirty,
                committed.epoch,
                one.number,
            )
            for one, at in zip(runner.inputs, committed.inputs, strict=True)
        ]


def _left_of(chunk: Sequence[Message], first: Message) -> int:
    """How many records of the chunk are left, including `first`."""
    return next(len(chunk) - index for index, message in enumerate(chunk) if message is first)


def _long_record(running: Running | None) -> messages.RunningRecord | None:
    if running is None or running.running_s < LONG_RECORD_S:
        return None
    record = running.record
    where = record.topic() or "", record.partition() or 0, record.offset() or 0
    return messages.RunningRecord(*where, round(running.running_s * 1000))


def _place_of(runner: Any, message: Any) -> RecordAt:
    return RecordAt(runner.shard, message.offset(), runner.number)


def _no_routes(topology: Topology) -> dict[str, dict[int, InputRunner]]:
    return {source.topic.name: {} for source in topology.inputs}


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] if ordered else 0.0


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # not on Linux


def run_worker(job: Job, settings: Settings, *, slot: int = -1, coordinator_address: str = "") -> int:
    """Run a worker in this process until it is told to exit (by the coordinator, SIGTERM or SIGINT).

    Returns:
        The exit code: 0 cleanly, 3 if the job failed, 1 if this worker can't continue, 4 if it was drained
        and isn't to be restarted, 5 if the job has ended.

    Raises:
        FclusterError: it can't start; the message says why.
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
    interpreter_lock.install(settings.session_timeout_ms / 1000)
    # What exists by now lives as long as the process; collecting it over and over costs 3 to 4%.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    return worker.run()
