"""The coordinator process: stands by while another coordinator leads, then carries out what `core` decides.

Responsible for: taking over the journal when it is this process's turn (see `standby`) and `checks` raises no
error. After that, the loop that turns frames, closed connections and results into events, and effects into
frames, journal writes and fences. One thread owns the socket and the core. The journal, fences and background
tasks have their own threads, and report to it through one queue.

Invariants: no slow effect runs in the loop's thread, so no epoch waits for one; every wait is bounded.

Must not: decide about workers, shards or epochs; `core` does.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from confluent_kafka import TopicPartition

from fcluster import __version__
from fcluster.api.job import Job
from fcluster.common import failpoints, garbage
from fcluster.common.clocks import monotonic_ms
from fcluster.common.errors import FclusterError, KafkaUnavailable, SettingsError, failure_of
from fcluster.common.event_ring import EventRing
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Ended
from fcluster.common.ids import transactional_ids
from fcluster.common.offset_targets import Target
from fcluster.common.processes import process_space
from fcluster.common.settings import Settings, with_settings
from fcluster.coordinator.bounded_runs import fix_end, recorded_end
from fcluster.coordinator.checks import check_partitions, check_reset, check_topology, refresh_interval_ms
from fcluster.coordinator.core import events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.events import Event
from fcluster.coordinator.core.model import Terms
from fcluster.coordinator.core.outbox import ENDING_KEY
from fcluster.coordinator.core.run_end import RUN_END_KEY
from fcluster.coordinator.core.topics import roles_of, topic_key
from fcluster.coordinator.fencing import Fencer
from fcluster.coordinator.gate import Gate
from fcluster.coordinator.health import CoordinatorHealth
from fcluster.coordinator.journal import Journal, JournalLostError, JournalThread
from fcluster.coordinator.process_watch import ProcessWatch
from fcluster.coordinator.standby import Candidate, Standby
from fcluster.coordinator.topic_watch import TopicWatch
from fcluster.coordinator.truncation import Truncation
from fcluster.graph.topology import Topology
from fcluster.kafka.brokers import broker_setting
from fcluster.kafka.clients import Admin
from fcluster.kafka.offsets import end_offsets
from fcluster.kafka.ports import reserve_for_process
from fcluster.kafka.topics import create_output_topic
from fcluster.kafka.watch import Concern, KafkaWatch
from fcluster.storage.snapshot_store import store_identity
from fcluster.wire import messages
from fcluster.wire.addresses import announced_address
from fcluster.wire.discovery import (
    ENDED_KEY,
    LEADER_KEY,
    Leader,
    LeaderFollower,
    leader_in,
    read_journal,
)
from fcluster.wire.http_port import health_port
from fcluster.wire.security import CoordinatorSecurity, coordinator_security
from fcluster.wire.transport import Disconnected, FrameReceived, HandshakeFailed, RouterTransport

_log = logging.getLogger("fcluster.coordinator")

BIND_RETRY_S = 5.0
"""When a coordinator was killed and restarted, its port may not be free yet."""
END_OFFSETS_RETRY_S = 1.0
TAKE_OVER_RETRY_S = 1.0
TURN_MS_MAX = 500.0
STATUS_AGE_S_MAX = 0.5
"""The loop builds a new status document at most this often, however many HTTP clients ask."""
STATUS_WAIT_S = 2.0
TOPIC_WATCH_END_S = 5.0
SUCCESSOR_S = 2.0
SUCCESSOR_POLL_S = 0.05
KAFKA_WAITS_MS = 2_000
"""If an epoch or a takeover takes longer than this, it may be waiting for Kafka: then Kafka is checked."""
KAFKA_TROUBLED_S = 10.0
"""Kafka is also checked for this long after a worker lost a transaction or a slot couldn't be fenced."""
KAFKA_WATCH_NOTED_S = 0.5
ABSENCE_S = 2.0
"""If a loop iteration took this long, the process was suspended."""
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def run_coordinator(
    job: Job | Topology,
    settings: Settings,
    *,
    expected_workers: int | None = None,
    until_caught_up: bool = False,
    end: Target | None = None,
    stand_by: bool = True,
    ready_callback: Callable[[str], None] | None = None,
    ready_file: Path | None = None,
) -> Ended:
    """Lead the job until it is stopped, has caught up, or fails. Stand by as long as another coordinator
    leads.

    SIGINT drains the job if this coordinator leads it. SIGTERM hands over to a standby, so that the job
    continues; it drains the job only if there is no standby. A second signal ends the process at once. A
    standby exits on either signal.

    Args:
        job: the job to run.
        settings: the resolved settings.
        expected_workers: the first assignment waits for this many, for a while. Default: the setting
            `workers`.
        until_caught_up: stop once all records that were in the sources at the start are committed.
        end: where the run ends. None: where the one that is under way ends, otherwise nowhere.
        stand_by: if False, a coordinator that already leads is a conflict.
        ready_callback: called with the address once workers can join, in each term in which this process
            leads.
        ready_file: written with the leader record, as JSON, at the same time.

    Returns:
        How it ended. The exit code is 0 if it stopped cleanly, 3 if the job failed.

    Raises:
        FclusterError: it can neither lead nor stand by, for the reason in the message.
    """
    topology = job if isinstance(job, Topology) else job.build(settings)
    settings = with_settings(settings, reading_group=topology.job)
    security = coordinator_security(settings)
    health = CoordinatorHealth(topology.job)
    leadership = _Leadership(
        job=topology.job,
        settings=settings,
        security=security,
        health=health,
        expected_workers=expected_workers or settings.workers,
        until_caught_up=until_caught_up,
        end=end,
        ready_callback=ready_callback,
        ready_file=ready_file,
    )
    garbage.settle()
    with health_port(settings.http_bind, health, insecure=settings.insecure):
        candidate = Candidate(settings, topology)
        try:
            return _take_turns(candidate, Standby(settings, topology, health, patient=stand_by), leadership)
        finally:
            candidate.close()


def _take_turns(candidate: Candidate, standby: Standby, leadership: _Leadership) -> Ended:
    """Stand by and lead, in turn, until the end."""

    def stop_waiting(_number: int) -> None:
        standby.interrupt()

    signals = _Signals(stop_waiting)
    own: Leader | None = None
    with signals.handled():
        while True:
            ended = _wait_for_turn(candidate, standby, own)
            if ended is not None:
                level = logging.ERROR if ended.exit_code else logging.INFO
                _log.log(level, "coordinator ends: %s", ended.reason)
                return ended
            again = standby.stood_by or own is not None
            ended, own = leadership.lead(candidate, signals, own, again=again)
            if ended.exit_code != ExitCode.TEMPORARY:
                return ended
            if signals.asked:
                _log.info("the coordinator exits: another coordinator leads now")
                return Ended(0, "another coordinator leads now")
            signals.on_stop = stop_waiting
            gc.collect()  # close a deposed leader's clients and sockets now, not later


def _wait_for_turn(candidate: Candidate, standby: Standby, own: Leader | None) -> Ended | None:
    if standby.interrupted:
        return standby.wait(own)
    if own is None and not standby.stood_by:
        candidate.prepare()
    else:
        with contextlib.suppress(KafkaUnavailable):  # then the takeover will be slower, or fail
            candidate.prepare()
    return standby.wait(own)


# --- leading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leadership:
    """What stays the same from one leadership of this process to the next."""

    job: str
    settings: Settings
    security: CoordinatorSecurity | None
    health: CoordinatorHealth
    expected_workers: int
    until_caught_up: bool
    end: Target | None
    ready_callback: Callable[[str], None] | None
    ready_file: Path | None

    def lead(
        self, candidate: Candidate, signals: _Signals, own: Leader | None, *, again: bool
    ) -> tuple[Ended, Leader | None]:
        """Take the term and lead until it ends. Returns how it ended, and the leader record of this process's
        last leadership.

        Args:
            candidate: has the Kafka clients ready.
            signals: the signals to obey.
            own: the leader record so far.
            again: whether this process stood by or led before. Then a problem on the way to leadership may be
                temporary, and an end of the job that has begun is completed.
        """
        self.health.takes_over()
        transport = RouterTransport(self.security)
        try:
            # This comes first: a coordinator that can't listen must not depose another one.
            address = _announced(self.settings, _bind(transport, self.settings.coordinator_bind))
            journal, past = candidate.open_journal()
            if not again:
                # A coordinator that didn't see the last leader end the job starts the job again: how that run
                # ended doesn't matter.
                past.pop(ENDING_KEY, None)
            terms, own = self._terms(candidate, past, address, takes_over=again)
            journal.write(_first_entries(own, terms, ending=past.get(ENDING_KEY)))
            journal.is_ours = functools.partial(self._leads, own)
            gate = Gate(terms.term, secured=self.security is not None)
            shell = _Shell(terms, past, own, transport, gate, journal, candidate, self.health)
            signals.on_stop = shell.on_signal
            _announce(own, self.ready_callback, self.ready_file)
            return shell.run(), own
        except JournalLostError as error:
            _log.warning("not leading: %s", error)
            return Ended(ExitCode.TEMPORARY, "not leading"), own
        except (KafkaUnavailable, SettingsError) as error:
            if not again:
                raise
            _log.error("can't take over: %s", error.message)
            time.sleep(TAKE_OVER_RETRY_S)
            return Ended(ExitCode.TEMPORARY, error.message, failure_of(error)), own
        finally:
            transport.close()

    def _leads(self, own: Leader) -> bool:
        """Whether the journal names no newer leader."""
        found = leader_in(read_journal(self.settings, self.job), self.job)
        return found is None or found.term <= own.term

    def _terms(
        self, candidate: Candidate, past: Mapping[str, Any], address: str, *, takes_over: bool
    ) -> tuple[Terms, Leader]:
        """The terms of the next leadership, and its record in the journal."""
        topology = candidate.topology
        check_reset(past, topology.job)
        ids, partitions, highest_committed_epoch = candidate.topics_now(past)
        check_partitions(past, topology, partitions)
        check_topology(past, topology)
        run_end = recorded_end(past, topology, self.end, takes_over=takes_over)
        if run_end is None and self.end is not None and not takes_over:
            run_end = fix_end(topology, partitions, self.end, candidate.admin, candidate.consumer)
        leader = Leader(
            address=address,
            term=int(past.get("term", {}).get("term", 0)) + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            cluster_id=uuid.uuid4().hex,
            public_key="" if self.security is None else self.security.public_key.decode(),
            topology=topology.fingerprint,
        )
        terms = Terms(
            term=leader.term,
            topology=topology,
            partitions=partitions,
            settings=self.settings,
            expected_workers=self.expected_workers,
            version=__version__,
            until_caught_up=self.until_caught_up,
            run_end=run_end,
            snapshot_store=store_identity(self.settings.snapshots, topology.job),
            highest_committed_epoch=highest_committed_epoch,
            cluster_id=leader.cluster_id,
            topic_ids=ids,
        )
        return terms, leader


def _first_entries(leader: Leader, terms: Terms, ending: Any) -> dict[str, Any]:
    """The entries of a leader's first write."""
    entries: dict[str, Any] = {
        "term": {"term": terms.term},
        "topology": terms.topology.describe(),
        LEADER_KEY: leader,
        ENDED_KEY: None,
        ENDING_KEY: ending,
    }
    if terms.run_end is not None:
        entries[RUN_END_KEY] = terms.run_end.document()
    entries |= {topic_key(topic): {"id": topic_id} for topic, topic_id in terms.topic_ids.items()}
    return entries | {f"partitions/{topic}": {"count": count} for topic, count in terms.partitions.items()}


def _bind(transport: RouterTransport, bind: str) -> str:
    deadline_s = time.monotonic() + BIND_RETRY_S
    while True:
        # Workers connect there for a while after we have exited, so the port must not be given to others.
        wanted = f"{bind.removesuffix(':0')}:{reserve_for_process()}" if bind.endswith(":0") else bind
        try:
            return transport.bind(wanted)
        except OSError as error:
            if time.monotonic() >= deadline_s:
                raise SettingsError(
                    f"The coordinator can't listen on {bind}: {error}.",
                    remedy="Choose a free address in the setting coordinator.bind.",
                ) from error
            time.sleep(0.1)


def _announced(settings: Settings, bound: str) -> str:
    """The address that workers are told."""
    announced = announced_address(bound, settings.coordinator_advertised_address, settings.bootstrap_servers)
    if announced.warning:
        _log.warning("%s", announced.warning)
    return announced.address


def _announce(leader: Leader, ready_callback: Callable[[str], None] | None, ready_file: Path | None) -> None:
    _log.info("coordinator of term %d listens at %s", leader.term, leader.address)
    if ready_file is not None:
        temporary = ready_file.with_name(ready_file.name + ".new")
        record = {"address": leader.address, "term": leader.term, "host": leader.host, "pid": leader.pid}
        temporary.write_text(json.dumps(record))
        temporary.replace(ready_file)
    if ready_callback is not None:
        ready_callback(leader.address)


def refresh_interval_s(settings: Settings, admin: Admin) -> float:
    """The longest time between two journal writes, in seconds: well within what the brokers remember."""
    interval_ms, warning = refresh_interval_ms(
        settings, broker_setting(admin, "transactional.id.expiration.ms")
    )
    if warning:
        _log.warning("%s", warning)
    return interval_ms / 1000


class _Signals:
    """SIGTERM and SIGINT: the first one ends the current activity cleanly, a second one ends the process.

    Args:
        on_stop: ends the current activity, given the signal's number.
    """

    def __init__(self, on_stop: Callable[[int], None]) -> None:
        self._on_stop = on_stop
        self._number = 0

    @property
    def asked(self) -> bool:
        """Whether the first signal has come."""
        return self._number != 0

    @property
    def on_stop(self) -> Callable[[int], None]:
        """What the first signal calls. If that signal has already come, it is called at once."""
        return self._on_stop

    @on_stop.setter
    def on_stop(self, on_stop: Callable[[int], None]) -> None:
        self._on_stop = on_stop
        if self._number:
            on_stop(self._number)

    @contextlib.contextmanager
    def handled(self) -> Generator[None]:
        """Handle signals in this block. Only a process's main thread can; in other threads this does
        nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self._number:
            os._exit(ExitCode.INTERRUPTED)
        self._number = number
        self._on_stop(number)


class _Shell:
    """The loop and its threads."""

    def __init__(
        self,
        terms: Terms,
        past: Mapping[str, Any],
        leader: Leader,
        transport: RouterTransport,
        gate: Gate,
        journal: Journal,
        candidate: Candidate,
        health: CoordinatorHealth,
    ) -> None:
        self._topology = terms.topology
        self._settings = terms.settings
        now_ms = monotonic_ms()
        self._core = Coordinator.recover(past, terms, now_ms)
        self._ring = EventRing(
            "coordinator",
            __version__,
            _beginning(past, terms, now_ms),
            Path(terms.settings.state_dir) / "logs",
        )
        self._ring.dump_on_signal()
        self._leader = leader
        self._turned_s = time.monotonic()
        self._refresh_s = terms.settings.offset_refresh_interval_ms / 1000
        self._refresh_due_s = self._turned_s + self._refresh_s
        self._health = health
        self._publisher = _StatusPublisher(transport.wake)
        self._transport = transport
        self._gate = gate
        self._admin = admin = candidate.admin
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop: events.StopCoordinator | None = None
        self._journal_thread = JournalThread(journal, self._on_journal)
        self._fencer = Fencer(terms.settings, terms.topology.job, self.post)
        self._process_space = process_space()
        self._processes = ProcessWatch(lambda worker: self.post(events.ProcessEnded(worker)))
        self._duties = ThreadPoolExecutor(1, thread_name_prefix="duties")
        self._closing = threading.Event()
        self._truncation = Truncation(terms.topology, admin)
        self._topic_watch = TopicWatch(
            admin,
            candidate.consumer,
            terms.topology.job,
            topics=roles_of(terms.topology),
            partitions=self._source_partitions,
            post=self.post,
            in_doubt=lambda: self._core.topics_in_doubt,
        )
        self._kafka_watch = KafkaWatch(
            terms.settings, self._concern, lambda said: self.post(events.KafkaSeen(tuple(said)))
        )
        self._watch_due_s = self._troubled_until_s = 0.0
        self._troubles_counted = 0

    def post(self, event: Event) -> None:
        """Pass an event to the loop. May be called by any thread and by signal handlers."""
        self._inbox.put(event)
        self._transport.wake()

    def on_signal(self, number: int) -> None:
        """The process was asked to end the job, or only its leadership."""
        self.post(events.ResignRequested() if number == signal.SIGTERM else events.StopRequested())

    def _on_journal(self, event: events.JournalWritten | events.Deposed) -> None:
        """Called in the journal's thread, which ends after `Deposed`.

        A leader that resigns keeps serving its workers until they can find the new leader. It is fenced, so
        it can do no harm, and the workers don't have to wait until the new leader has read the journal.
        """
        if isinstance(event, events.Deposed) and self._core.resignation is not None:
            self._await_successor()
        self.post(event)

    def _await_successor(self) -> None:
        deadline_s = time.monotonic() + SUCCESSOR_S
        follower = LeaderFollower(self._settings, self._topology.job)
        try:
            while time.monotonic() < deadline_s and not self._closing.is_set():
                follower.poll(SUCCESSOR_POLL_S)
                if follower.leader is not None and follower.leader.term > self._leader.term:
                    return
        except FclusterError as error:
            _log.warning("looking for the new leader: %s", error.message)
        finally:
            follower.close()

    def run(self) -> Ended:
        """Lead until the core says that it stops."""
        self._health.leads(self._leader, self._publisher.document)
        try:
            self._feed(events.Started())
            self._in_background(self._learn_refresh_interval, self._settings)
            self._topic_watch.start()
            while self._stop is None:
                self._turn()
        finally:
            self._close()
        if self._stop.exit_code == ExitCode.TEMPORARY:
            _log.warning("term %d is over: %s", self._leader.term, self._stop.reason)
        else:
            level = logging.ERROR if self._stop.exit_code else logging.INFO
            _log.log(level, "coordinator ends: %s", self._stop.reason)
        return self._ended(self._stop)

    def _ended(self, stop: events.StopCoordinator) -> Ended:
        return Ended(stop.exit_code, stop.reason, stop.failure)

    def _turn(self) -> None:
        deadline_ms = self._core.next_deadline_ms()
        timeout_ms = TURN_MS_MAX if deadline_ms is None else max(0.0, deadline_ms - monotonic_ms())
        happened = False
        happenings = self._transport.poll(self._truncation.cap(min(timeout_ms, TURN_MS_MAX)))
        self._health.turned()
        self._notice_absence()
        self._keep_alive()
        for item in happenings:
            match item:
                case FrameReceived():
                    # A flood of dropped frames must not keep the core from its deadlines.
                    happened |= self._on_frame(item)
                case Disconnected(peer):
                    happened = True
                    self._feed(events.PeerDisconnected(peer))
                case HandshakeFailed(reason):
                    self._gate.note_handshake(reason)
        while True:
            try:
                event = self._inbox.get_nowait()
            except queue.Empty:
                break
            happened = True
            self._feed(event)
        if not happened:
            self._feed(events.Tick())
        if self._publisher.is_wanted:
            self._feed(self._wire_counted())
            self._publisher.publish(self._core.status())
        self._watch_kafka_if_needed()
        if self._truncation.is_due():
            self._in_background(self._truncation.run, self._core.committed_offsets())

    def _concern(self) -> Concern:
        """What the job needs from Kafka. Called in the watch's thread."""
        topology = self._topology
        ids = [name for slot in list(self._core.slots) for name in transactional_ids(topology.job, slot)]
        return Concern(frozenset(roles_of(topology)), topology.job, tuple(ids))

    def _watch_kafka_if_needed(self) -> None:
        """Kafka is watched only while something takes longer than it should, or if workers have just lost
        transactions.
        """
        now_s = time.monotonic()
        if now_s < self._watch_due_s:
            return
        self._watch_due_s = now_s + KAFKA_WATCH_NOTED_S
        counters = self._core.counters
        counted = counters.resets + counters.fence_failures
        if counted > self._troubles_counted:
            self._troubles_counted, self._troubled_until_s = counted, now_s + KAFKA_TROUBLED_S
        waits = self._core.waits_ms(monotonic_ms()) >= KAFKA_WAITS_MS
        self._kafka_watch.note(waiting=waits or now_s < self._troubled_until_s)

    def _notice_absence(self) -> None:
        """A process that was stopped or swapped out may have been deposed in the meantime. The journal says
        whether it was.
        """
        former_s, self._turned_s = self._turned_s, time.monotonic()
        if self._turned_s - former_s >= ABSENCE_S:
            self._journal_thread.write(events.WriteJournal(0, {LEADER_KEY: self._leader}))

    def _keep_alive(self) -> None:
        """Write to the journal from time to time: the brokers forget a transactional id that is idle for
        long.
        """
        now_s = time.monotonic()
        if now_s >= self._refresh_due_s:
            self._refresh_due_s = now_s + self._refresh_s
            self._journal_thread.write(events.WriteJournal(0, {LEADER_KEY: self._leader}))

    def _learn_refresh_interval(self, settings: Settings) -> None:
        """In the background thread, so that a takeover doesn't wait for it."""
        with contextlib.suppress(FclusterError):  # then the setting alone applies
            self._refresh_s = refresh_interval_s(settings, self._admin)
            self._refresh_due_s = min(self._refresh_due_s, time.monotonic() + self._refresh_s)

    def _on_frame(self, received: FrameReceived) -> bool:
        """Returns whether the core has something to do because of the frame."""
        message = self._gate.admit(received)
        if message is None:
            return False
        if isinstance(message, messages.Refused):
            self._transport.send(received.peer, messages.encode(message))
            return False
        if isinstance(message, messages.StatusRequest):
            self._feed(self._wire_counted())
        self._feed(events.MessageReceived(received.peer, message))
        if isinstance(message, messages.Hello) and self._process_space == message.process_space != "":
            self._processes.watch(message.worker, message.pid)
        return True

    def _wire_counted(self) -> events.WireCounted:
        gate, transport = self._gate, self._transport
        return events.WireCounted(
            malformed_frames=gate.malformed_frames + transport.malformed_frames,
            unauthorised_frames=gate.unauthorised_frames,
            failed_handshakes=transport.failed_handshakes,
        )

    def _feed(self, event: Event) -> None:
        now_ms = monotonic_ms()
        effects = self._core.handle(event, now_ms)
        self._ring.note(now_ms, event, effects)
        for effect in effects:
            match effect:
                case events.SendMessage(peer, message):
                    _pass_failpoint(message)
                    self._transport.send(peer, messages.encode(message))
                case events.WriteJournal():
                    self._journal_thread.write(effect)
                case events.ForgetFence(slot):
                    self._fencer.forget(slot)
                case events.PrepareFence(slot, soon):
                    self._fencer.prepare(slot, soon=soon)
                case events.FenceSlot(slot):
                    self._fencer.fence(slot)
                case events.ReadEndOffsets(stage, number):
                    self._in_background(self._read_end_offsets, (stage, number))
                case events.MakeTopic(topic, partitions):
                    self._in_background(self._make_topic, (topic, partitions))
                case events.LogLine(level, text):
                    _log.log(_LEVELS[level], "%s", text)
                case events.StopCoordinator():
                    self._stop = effect

    def _in_background(self, duty: Callable[[Any], None], argument: Any) -> None:
        def run() -> None:
            try:
                duty(argument)
            except Exception:  # noqa: BLE001  the executor would swallow it
                _log.exception("a background task failed")

        self._duties.submit(run)

    def _read_end_offsets(self, wanted_of: tuple[str, int]) -> None:
        """The present end offsets of an input. It is repeated until they are known, because nothing ends
        without them.
        """
        name, number = wanted_of
        source = self._topology.stage(name).inputs[number]
        # Records that the job itself wrote are committed, but commit markers may not have reached all
        # partitions. The last stable offset could miss records that count.
        is_own = bool(self._topology.feeders(source.topic.name))
        isolation = "read-uncommitted" if is_own else source.topic.isolation
        wanted = [
            TopicPartition(source.topic.name, shard.partition)
            for shard in self._core.shards
            if shard.stage == name
        ]
        told = False
        while not self._closing.is_set():
            try:
                ends = end_offsets(self._admin, wanted, isolation)
                offsets = {at.partition: end for at, end in ends.items()}
                self.post(events.EndOffsetsRead(name, offsets, number))
                return
            except FclusterError as error:
                if not told:
                    _log.warning(
                        "the end of %s isn't known yet, retrying: %s", source.topic.name, error.message
                    )
                told = True
                self._closing.wait(END_OFFSETS_RETRY_S)

    def _source_partitions(self) -> list[tuple[str, int]]:
        """The source partitions of all shards that exist now. May be called by any thread."""
        topics = {stage.name: stage.topics for stage in self._topology.stages}
        return [
            (topic, shard.partition) for shard in tuple(self._core.shards) for topic in topics[shard.stage]
        ]

    def _make_topic(self, wanted: tuple[str, int]) -> None:
        topic, partitions = wanted
        try:
            create_output_topic(self._admin, topic, partitions, self._settings)
        except FclusterError as error:
            _log.warning("the output topic %s can't be created yet: %s", topic, error.message)

    def _close(self) -> None:
        self._closing.set()
        self._topic_watch.close()
        if self._stop is not None and self._stop.exit_code != ExitCode.TEMPORARY:
            # So no process asks an address where nothing listens any more, and standbys exit too.
            end = {"term": self._leader.term} | self._ended(self._stop).document()
            entries: dict[str, Any] = {LEADER_KEY: None, ENDED_KEY: end, ENDING_KEY: None}
            run_end = self._core.run_end
            if run_end is not None and run_end.is_over:
                # Without event time, the job can go on with what comes next.
                entries[RUN_END_KEY] = run_end.document() if self._topology.keeps_time else None
            self._journal_thread.write(events.WriteJournal(0, entries))
        self._processes.close()
        self._kafka_watch.close()
        self._fencer.close()
        self._duties.shutdown(wait=False, cancel_futures=True)
        self._journal_thread.close()
        self._topic_watch.join(TOPIC_WATCH_END_S)


class _StatusPublisher:
    """Gives the loop's status document to other threads. The loop builds it when one of them needs it.

    Args:
        wake: wakes the loop.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._wanted = False
        self._document: Mapping[str, Any] = {}
        self._made_s = float("-inf")

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits for a document."""
        return self._wanted

    def publish(self, document: Mapping[str, Any]) -> None:
        """Publish this document. Called in the loop."""
        with self._changed:
            self._document, self._made_s, self._wanted = document, time.monotonic(), False
            self._changed.notify_all()

    def document(self) -> Mapping[str, Any] | None:
        """A recent document. None if the loop doesn't provide one in time. May be called by any thread but
        the loop's.
        """
        asked_s = time.monotonic()
        with self._changed:
            if asked_s - self._made_s >= STATUS_AGE_S_MAX:
                self._wanted = True
                self._wake()
                self._changed.wait_for(lambda: self._made_s >= asked_s, STATUS_WAIT_S)
            return (
                self._document if time.monotonic() - self._made_s < STATUS_AGE_S_MAX + STATUS_WAIT_S else None
            )


def _beginning(past: Mapping[str, Any], terms: Terms, now_ms: float) -> dict[str, Any]:
    """What the core is created with, for a replay of its events. It contains no secrets, and not the job's
    code.
    """
    left_out = ("topology", "settings")
    given = {each.name: getattr(terms, each.name) for each in fields(terms) if each.name not in left_out}
    return {"terms": given, "settings": terms.settings.redacted(), "journal": dict(past), "now_ms": now_ms}


def _pass_failpoint(message: messages.FromCoordinator) -> None:
    if isinstance(message, messages.Complete):
        failpoints.reach("coordinator.mid-broadcast", message.epoch)
    elif isinstance(message, messages.Assign):
        failpoints.reach("coordinator.mid-reassignment")
