"""The coordinator process: carries out what `core` decides.

Responsible for: taking over the journal once `checks` has no objection, and then the loop that turns
frames, closed connections and outcomes into events, and effects into frames, journal writes and fences. One
thread owns the socket and the core; the journal, fences and background duties have threads of their own and
report to it through one queue.

Invariants kept: no effect that takes long runs in the loop's thread, so that no epoch waits for it; every
wait is bounded.

Must not: decide about workers, shards or epochs; those belong to `core`.
"""

from __future__ import annotations

import contextlib
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
from pathlib import Path
from typing import Any

from confluent_kafka import TopicPartition

from fcluster import __version__
from fcluster.common import failpoints, messages
from fcluster.common.discovery import LEADER_KEY, Leader
from fcluster.common.errors import ClusterConflict, FclusterError, SettingsError
from fcluster.common.job import Job
from fcluster.common.kafka_clients import (
    Admin,
    connect_or_raise,
    end_offsets,
    ensure_internal_topics,
    make_admin,
)
from fcluster.common.security import coordinator_security
from fcluster.common.settings import Settings
from fcluster.common.snapshot_store import store_identity
from fcluster.common.topology import Topology
from fcluster.common.transport import Disconnected, FrameReceived, HandshakeFailed, RouterTransport
from fcluster.coordinator import events
from fcluster.coordinator.checks import (
    check_no_other_leader,
    check_partitions,
    check_topology,
    highest_committed_epoch,
)
from fcluster.coordinator.core import EXIT_TEMPORARY, Coordinator
from fcluster.coordinator.events import Event
from fcluster.coordinator.fencing import Fencer
from fcluster.coordinator.gate import Gate
from fcluster.coordinator.journal import Journal, JournalLostError, JournalThread, open_journal
from fcluster.coordinator.model import Terms
from fcluster.coordinator.truncation import Truncation

_log = logging.getLogger("fcluster.coordinator")

BIND_RETRY_S = 5.0
"""A coordinator that was killed and started again may find its port not yet free."""
END_OFFSETS_RETRY_S = 1.0
EXIT_INTERRUPTED = 130
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def run_coordinator(
    job: Job | Topology,
    settings: Settings,
    *,
    expected_workers: int | None = None,
    until_caught_up: bool = False,
    ready_callback: Callable[[str], None] | None = None,
    ready_file: Path | None = None,
) -> int:
    """Lead the job until it is stopped, has caught up, or fails.

    SIGTERM and SIGINT drain the job, a second one ends the process at once.

    Args:
        job: to run.
        settings: resolved.
        expected_workers: the first assignment waits for so many, for a while; default: the setting `workers`.
        until_caught_up: stop once everything that was in the sources at start is committed.
        ready_callback: called with the address once workers can join.
        ready_file: written with the leader record, as JSON, once workers can join.

    Returns:
        The process's exit code: 0 stopped in good order, 3 the job failed, 75 another coordinator leads.

    Raises:
        FclusterError: it can't lead, for the reason in the message.
    """
    topology = job if isinstance(job, Topology) else job.build()
    security = coordinator_security(settings)
    admin = make_admin(settings)
    connect_or_raise(admin, settings)
    partitions = ensure_internal_topics(admin, topology, settings)
    check_no_other_leader(settings, topology.job)
    journal, past = open_journal(settings, topology.job)
    sources = {stage.source.name: partitions[stage.source.name] for stage in topology.stages}
    check_partitions(past, sources)
    check_topology(past, topology)
    terms = Terms(
        term=int(past.get("term", {}).get("term", 0)) + 1,
        topology=topology,
        partitions=sources,
        settings=settings,
        expected_workers=expected_workers or settings.workers,
        version=__version__,
        until_caught_up=until_caught_up,
        snapshot_store=store_identity(settings.snapshots, topology.job),
        highest_committed_epoch=highest_committed_epoch(settings, topology.job, sources),
    )
    transport = RouterTransport(security)
    public_key = "" if security is None else security.public_key.decode()
    try:
        leader = _become_leader(transport, journal, terms, public_key)
        gate = Gate(terms.term, secured=security is not None)
        shell = _Shell(terms, past, transport, gate, journal, admin)
        _announce(leader, ready_callback, ready_file)
        with _signals(shell):
            return shell.run()
    finally:
        transport.close()


# --- leading ------------------------------------------------------------------------------------------


def _become_leader(transport: RouterTransport, journal: Journal, terms: Terms, public_key: str) -> Leader:
    """Listen, and let the journal say so."""
    leader = Leader(
        address=_bind(transport, terms.settings.coordinator_bind),
        term=terms.term,
        host=socket.gethostname(),
        pid=os.getpid(),
        cluster_id=uuid.uuid4().hex,
        public_key=public_key,
    )
    entries: dict[str, Any] = {
        "term": {"term": terms.term},
        "topology": terms.topology.describe(),
        LEADER_KEY: leader,
    }
    entries |= {f"partitions/{topic}": {"count": count} for topic, count in terms.partitions.items()}
    try:
        journal.write(entries)
    except JournalLostError as error:
        raise ClusterConflict(
            f"The journal of job {terms.topology.job!r} can't be written: {error}.",
            remedy="Another coordinator may have been started at the same moment: look for it, or try again.",
        ) from error
    return leader


def _bind(transport: RouterTransport, bind: str) -> str:
    deadline_s = time.monotonic() + BIND_RETRY_S
    # ZeroMQ says * for "any free port".
    wanted = bind[: -len(":0")] + ":*" if bind.endswith(":0") else bind
    while True:
        try:
            address = transport.bind(wanted)
            break
        except OSError as error:
            if time.monotonic() >= deadline_s:
                raise SettingsError(
                    f"The coordinator can't listen on {bind}: {error}.",
                    remedy="Choose a free address in the setting coordinator.bind.",
                ) from error
            time.sleep(0.1)
    # Bound to all interfaces: workers elsewhere need a name they can connect to.
    return address.replace("0.0.0.0", socket.gethostname())


def _announce(leader: Leader, ready_callback: Callable[[str], None] | None, ready_file: Path | None) -> None:
    _log.info("coordinator of term %d listens at %s", leader.term, leader.address)
    if ready_file is not None:
        temporary = ready_file.with_name(ready_file.name + ".new")
        record = {"address": leader.address, "term": leader.term, "host": leader.host, "pid": leader.pid}
        temporary.write_text(json.dumps(record))
        temporary.replace(ready_file)
    if ready_callback is not None:
        ready_callback(leader.address)


@contextlib.contextmanager
def _signals(shell: _Shell) -> Generator[None]:
    """SIGTERM and SIGINT ask for a drain, then force the end. Only a process's main thread may do this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def on_signal(_number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            os._exit(EXIT_INTERRUPTED)
        asked = True
        shell.post(events.StopRequested())

    former = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Shell:
    """The loop, and the threads that work for it."""

    def __init__(
        self,
        terms: Terms,
        past: Mapping[str, Any],
        transport: RouterTransport,
        gate: Gate,
        journal: Journal,
        admin: Admin,
    ) -> None:
        self._topology = terms.topology
        self._core = Coordinator.recover(past, terms, _now_ms())
        self._transport = transport
        self._gate = gate
        self._admin = admin
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop: events.StopCoordinator | None = None
        self._journal_thread = JournalThread(journal, self.post)
        self._fencer = Fencer(terms.settings, terms.topology.job, self.post)
        self._duties = ThreadPoolExecutor(1, thread_name_prefix="duties")
        self._closing = threading.Event()
        self._truncation = Truncation(terms.topology, admin)

    def post(self, event: Event) -> None:
        """Hand an event to the loop; from any thread, and from signal handlers."""
        self._inbox.put(event)
        self._transport.wake()

    def run(self) -> int:
        """Lead until the core says stop; returns the exit code."""
        try:
            self._feed(events.Started())
            while self._stop is None:
                self._turn()
        finally:
            self._close()
        _log.log(
            logging.ERROR if self._stop.exit_code else logging.INFO, "coordinator ends: %s", self._stop.reason
        )
        return self._stop.exit_code

    def _turn(self) -> None:
        deadline_ms = self._core.next_deadline_ms()
        timeout_ms = None if deadline_ms is None else max(0.0, deadline_ms - _now_ms())
        happened = False
        for item in self._transport.poll(self._truncation.cap(timeout_ms)):
            match item:
                case FrameReceived():
                    # A flood of what is dropped must not keep the core from its clock.
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
        if self._truncation.is_due():
            self._in_background(self._truncation.run, self._core.committed_offsets())

    def _on_frame(self, received: FrameReceived) -> bool:
        """Whether the core got something to do."""
        message = self._gate.admit(received)
        if message is None:
            return False
        if isinstance(message, messages.Refused):
            self._transport.send(received.peer, messages.encode(message))
            return False
        if isinstance(message, messages.StatusRequest):
            self._feed(self._wire_counted())
        self._feed(events.MessageReceived(received.peer, message))
        return True

    def _wire_counted(self) -> events.WireCounted:
        gate, transport = self._gate, self._transport
        return events.WireCounted(
            malformed_frames=gate.malformed_frames + transport.malformed_frames,
            unauthorised_frames=gate.unauthorised_frames,
            failed_handshakes=transport.failed_handshakes,
        )

    def _feed(self, event: Event) -> None:
        for effect in self._core.handle(event, _now_ms()):
            match effect:
                case events.SendMessage(peer, message):
                    _pass_failpoint(message)
                    self._transport.send(peer, messages.encode(message))
                case events.WriteJournal():
                    self._journal_thread.write(effect)
                case events.FenceSlot(slot):
                    self._fencer.fence(slot)
                case events.ReadEndOffsets(stage):
                    self._in_background(self._read_end_offsets, stage)
                case events.LogLine(level, text):
                    _log.log(_LEVELS[level], "%s", text)
                case events.StopCoordinator():
                    self._stop = effect

    def _in_background(self, duty: Callable[[Any], None], argument: Any) -> None:
        def run() -> None:
            try:
                duty(argument)
            except Exception:  # noqa: BLE001  it would be lost in the executor
                _log.exception("a background duty failed")

        self._duties.submit(run)

    def _read_end_offsets(self, name: str) -> None:
        """How far a source reaches now; tried until it is known, for without it nothing ends."""
        stage = self._topology.stage(name)
        # What the job itself wrote is committed, but markers may still be on their way to the partitions:
        # the last stable offset could miss records that count.
        isolation = "read-uncommitted" if stage.internal else stage.source.isolation
        wanted = [
            TopicPartition(stage.source.name, shard.partition)
            for shard in self._core.shards
            if shard.stage == name
        ]
        while not self._closing.is_set():
            try:
                ends = end_offsets(self._admin, wanted, isolation)
                self.post(events.EndOffsetsRead(name, {at.partition: end for at, end in ends.items()}))
                return
            except FclusterError as error:
                _log.warning("the end of %s is not known yet: %s", stage.source.name, error.message)
                self._closing.wait(END_OFFSETS_RETRY_S)

    def _close(self) -> None:
        self._closing.set()
        if self._stop is not None and self._stop.exit_code != EXIT_TEMPORARY:
            # Nobody needs to ask an address where nobody listens any more.
            self._journal_thread.write(events.WriteJournal(0, {LEADER_KEY: None}))
        self._fencer.close()
        self._duties.shutdown(wait=False, cancel_futures=True)
        self._journal_thread.close()


def _now_ms() -> float:
    return time.monotonic() * 1000


def _pass_failpoint(message: messages.FromCoordinator) -> None:
    if isinstance(message, messages.Complete):
        failpoints.reach("coordinator.mid-broadcast", message.epoch)
    elif isinstance(message, messages.Assign):
        failpoints.reach("coordinator.mid-reassignment")
