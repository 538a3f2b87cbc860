"""A coordinator that doesn't lead: it has everything ready, and waits until no coordinator leads.

Responsible for: the clients that a takeover needs, connected in advance (`Candidate`), and watching the
leader over ZeroMQ and through the journal (`Standby`). Invariants:

- The journal has the last word. Whatever the network suggests, it is this standby's turn only if the journal
  still names the suspected leader, or if the leader has asked this standby to take over. Whether it then
  really leads is decided by the journal's fence.
- A job that was ended on purpose isn't taken over. Its standbys exit too, and say why.
- Every wait is bounded. Nothing is written.

Must not: lead, or know what a leader does.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Producer, TopicPartition

from fcluster.common.clocks import monotonic_ms
from fcluster.common.endpoints import split_address
from fcluster.common.errors import ClusterConflict, FclusterError, IncompatibleState, KafkaUnavailable
from fcluster.common.failures import Ended
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.coordinator.checks import (
    check_inputs,
    check_reset,
    check_topics,
    committed_positions,
    look_for,
    remembered_ids,
)
from fcluster.coordinator.core.election import Bounds, Watch
from fcluster.coordinator.health import CoordinatorHealth
from fcluster.coordinator.journal import Journal, journal_producer, open_journal
from fcluster.coordinator.owned_topics import own_names
from fcluster.graph.topology import Topology
from fcluster.kafka.brokers import connect_or_raise
from fcluster.kafka.clients import make_admin, make_consumer
from fcluster.kafka.topic_ids import Look
from fcluster.kafka.topics import ensure_internal_topics
from fcluster.wire import messages
from fcluster.wire.discovery import Leader, ended_in, leader_in, read_journal
from fcluster.wire.keys import Role
from fcluster.wire.messages import MalformedMessageError
from fcluster.wire.security import client_security
from fcluster.wire.transport import DealerTransport

_log = logging.getLogger("fcluster.coordinator")

JOURNAL_TIMEOUT_S = 3.0
PROBE_TIMEOUT_S = 0.2
NEWER_LEADER_S = 2.0
"""A newer leader first fences, and writes its name a moment later. A deposed leader waits this long for the
name.
"""
RETRY_S = 0.5
_RANK_UNKNOWN_MAX = 0.1


class Candidate:
    """What a coordinator needs from Kafka to take over, kept ready.

    Args:
        settings: the cluster's settings.
        topology: the job's topology. Its internal topics are created.

    Raises:
        FclusterError: brokers or topics aren't as they must be.
    """

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self.admin = make_admin(settings)
        connect_or_raise(self.admin, settings)
        self._settings = settings
        self._job = topology.job
        past = read_journal(settings, topology.job)
        check_reset(past, topology.job)
        self.topology = own_names(settings, self.admin, topology)
        """The job, with the actual names of its internal topics."""
        # Before missing topics are created: a deleted topic must not be mistaken for a new one.
        known = remembered_ids(past)
        check_topics(self.topology, settings, known, self._look(known))
        partitions = ensure_internal_topics(self.admin, self.topology, settings)
        self.sources: Mapping[str, int] = {
            source.topic.name: partitions[source.topic.name] for source in self.topology.inputs
        }
        self._producer: Producer | None = None
        # Read-uncommitted: workers of a previous leader may have open transactions, and this must not wait
        # for them. What they commit later belongs to an epoch number that the journal has reserved.
        self.consumer = make_consumer(settings, "read-uncommitted", **{"group.id": topology.job})

    def prepare(self) -> None:
        """Connect to everything that the takeover will use.

        Raises:
            KafkaUnavailable: the brokers don't answer.
        """
        if self._producer is None:
            self._producer = journal_producer(self._settings, self._job)
        self.committed_positions()

    def committed_positions(self) -> dict[TopicPartition, CommittedPosition]:
        """See `checks.committed_positions`."""
        return committed_positions(self.consumer, self._job, self.sources)

    def topics_now(self, past: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, int], int]:
        """The topics as they are now, compared with the journal (`past`) and the committed offsets.

        Returns:
            The topics' ids, the partition counts of the sources, and the highest committed epoch.

        Raises:
            KafkaUnavailable: the brokers don't answer.
            FclusterError: a topic was deleted or replaced (see `checks.check_topics`).
        """
        positions = self.committed_positions()
        ids = remembered_ids(past)
        check_inputs(past, self.topology, positions)
        ids |= {at.topic: position.topic_id for at, position in positions.items() if position.topic_id}
        look = self._look(ids)
        found = check_topics(self.topology, self._settings, ids, look)
        counts = dict(self.sources)
        # A standby may have waited for a long time, and partitions may have been added in the meantime.
        counts |= {topic: seen.partitions for topic in counts if (seen := look.get(topic)) is not None}
        self.sources = counts
        return found, counts, max((position.epoch for position in positions.values()), default=0)

    def _look(self, ids: Mapping[str, str]) -> Look:
        return look_for(self.admin, self.topology, ids)

    def open_journal(self) -> tuple[Journal, dict[str, Any]]:
        """See `journal.open_journal`."""
        producer, self._producer = self._producer, None
        return open_journal(self._settings, self._job, producer)

    def close(self) -> None:
        """Release the clients."""
        self._producer = None
        self.consumer.close()


@dataclass(frozen=True, slots=True)
class _Linked:
    stands: bool


@dataclass(frozen=True, slots=True)
class _Trouble:
    reason: str


@dataclass(frozen=True, slots=True)
class _Interrupted:
    pass


_Item = _Linked | _Trouble | _Interrupted | bytes


class Standby:
    """Waits for this coordinator's turn.

    Args:
        settings: the cluster's settings.
        topology: the job's topology.
        health: the health to update.
        patient: whether to stand by at all. If not, a leader that answers is a conflict, until this
            coordinator has led itself.
    """

    def __init__(
        self, settings: Settings, topology: Topology, health: CoordinatorHealth, *, patient: bool
    ) -> None:
        self.stood_by = False
        """Whether it has met a live leader."""
        self._settings = settings
        self._topology = topology
        self._health = health
        self._patient = patient
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._identity = f"standby-{self._name}-{uuid.uuid4().hex[:8]}".encode()
        self._rank = random.uniform(0, _RANK_UNKNOWN_MAX)
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._interrupted = threading.Event()

    @property
    def interrupted(self) -> bool:
        """Whether the wait was ended permanently."""
        return self._interrupted.is_set()

    def interrupt(self) -> None:
        """End the wait now and permanently. May be called by a signal handler."""
        self._interrupted.set()
        self._inbox.put(_Interrupted())

    def wait(self, own: Leader | None) -> Ended | None:
        """Wait until no coordinator leads.

        Args:
            own: the record of this coordinator's leadership that has just ended. None if it never led.

        Returns:
            None: it is this coordinator's turn. Otherwise, why it will never be.

        Raises:
            ClusterConflict: another coordinator leads, and this one must not stand by, or can't watch it.
            IncompatibleState: the leader runs another topology, or the journal can't be understood.
            KafkaUnavailable: only at the very first attempt.
        """
        while not self._interrupted.is_set():
            self._health.looks_for_leader()
            try:
                found = self._find(own)
                while isinstance(found, Leader):
                    found = self._follow(found)
                return found
            except KafkaUnavailable as error:
                if own is None and not self.stood_by:
                    raise
                _log.warning("standing by: %s", error.message)
                self._interrupted.wait(RETRY_S)
        return _INTERRUPTED

    def _find(self, own: Leader | None) -> Leader | Ended | None:
        """The leader according to the journal."""
        give_up_s = time.monotonic() + NEWER_LEADER_S * random.uniform(1, 1.5)
        while True:
            journal = read_journal(self._settings, self._topology.job, JOURNAL_TIMEOUT_S)
            leader = leader_in(journal, self._topology.job)
            if own is None:
                return leader
            self._patient = True
            ended = _end_in(journal, own.term)
            if ended is not None:
                return ended
            if leader not in (None, own) or time.monotonic() >= give_up_s:
                return leader
            if self._interrupted.wait(0.1):
                return _INTERRUPTED

    # --- watching -------------------------------------------------------------------------------------

    def _follow(self, leader: Leader) -> Leader | Ended | None:
        """Watch this leader until it is gone. Returns the new leader, or why there will be none. None: this
        coordinator is next.
        """
        try:
            security = client_security(self._settings, Role.COORDINATOR, leader.address, leader.public_key)
        except FclusterError as error:
            # It ran with other keys, or without keys. If it is alive, it loses the journal.
            _log.warning("can't ask the last coordinator, at %s: %s", leader.address, error.message)
            return None
        inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._inbox = inbox
        transport = DealerTransport(
            self._identity,
            on_frame=inbox.put,
            on_connected=lambda: inbox.put(_Linked(True)),
            on_disconnected=lambda: inbox.put(_Linked(False)),
            on_refused=lambda reason: inbox.put(_Trouble(reason)),
        )
        try:
            transport.connect(leader.address, security)
            return self._watch(leader, transport)
        finally:
            # Closing may wait half a second until a last request is sent. The takeover doesn't wait for that.
            threading.Thread(target=transport.close, name="closing", daemon=True).start()

    def _watch(self, leader: Leader, transport: DealerTransport) -> Leader | Ended | None:
        bounds = Bounds(
            silent_ms=self._settings.session_timeout_ms,
            check_interval_ms=self._settings.heartbeat_interval_ms,
            rank=self._rank,
        )
        watch = Watch(bounds, monotonic_ms())
        check = messages.encode(messages.LeaderCheck(self._name))
        while not self._interrupted.is_set():
            if watch.was_heard:
                self._health.stands_by(leader)
            else:
                self._health.looks_for_leader()
            self._take_news(leader, watch)
            if watch.wants_check(monotonic_ms()):
                transport.send(check)
            if watch.wants_probe(monotonic_ms()):
                refused = nobody_listens(leader.address)
                watch.probed(refused, monotonic_ms())
            suspicion = watch.suspicion(monotonic_ms())
            if suspicion:
                verdict = self._confirm(leader, watch, suspicion)
                if not isinstance(verdict, _Unconfirmed):
                    return verdict
        # A leader that was also asked to exit should not wait for this standby.
        transport.send(messages.encode(messages.LeaderCheck(self._name, leaves=True)))
        return _INTERRUPTED

    def _take_news(self, leader: Leader, watch: Watch) -> None:
        """Wait for something to happen, or for the next check, and record what happened."""
        timeout_s = max(0.0, watch.next_ms() - monotonic_ms()) / 1000
        try:
            self._note(self._inbox.get(timeout=timeout_s), leader, watch)
            while True:
                self._note(self._inbox.get_nowait(), leader, watch)
        except queue.Empty:
            return

    def _note(self, item: _Item, leader: Leader, watch: Watch) -> None:
        match item:
            case _Linked(True):
                watch.linked(monotonic_ms())
            case _Linked(False):
                watch.unlinked(monotonic_ms())
            case _Trouble(reason):
                self._on_trouble(reason, leader, watch)
            case bytes():
                self._on_frame(item, leader, watch)
            case _:
                pass

    def _on_frame(self, frame: bytes, leader: Leader, watch: Watch) -> None:
        try:
            message = messages.decode_from_coordinator(frame)
        except MalformedMessageError:
            return
        if isinstance(message, messages.LeaderAlive) and message.cluster_id == leader.cluster_id:
            if not watch.was_heard:
                self._meet(leader)
            watch.heard(message.rank, monotonic_ms(), resigns=message.resigns)
            self._rank = watch.rank

    def _meet(self, leader: Leader) -> None:
        job = self._topology.job
        if not self._patient:
            raise ClusterConflict(
                f"Job {job!r} is already running: its coordinator is process {leader.pid} on "
                f"{leader.host}, at {leader.address}.",
                remedy="Stop it first (Ctrl-C in its `fcluster up` or `fcluster coordinator`), or give this "
                "job another name.",
            )
        if leader.topology != self._topology.fingerprint:
            raise IncompatibleState(
                f"This coordinator can't be a standby: the leader of job {job!r} (process {leader.pid} on "
                f"{leader.host}) runs it with another topology ({leader.topology}) than this one "
                f"({self._topology.fingerprint}).",
                remedy="Start both from the same job file. To change the job, stop it first.",
            )
        self.stood_by = True
        _log.info(
            "standing by: process %d on %s leads job %r in term %d, at %s",
            leader.pid,
            leader.host,
            job,
            leader.term,
            leader.address,
        )

    def _on_trouble(self, reason: str, leader: Leader, watch: Watch) -> None:
        if watch.was_heard:
            _log.warning("no connection to the leader: %s", reason)
            return
        raise ClusterConflict(
            f"A process listens at {leader.address}, where the coordinator of job {self._topology.job!r} "
            f"was last, and doesn't accept this key: {reason}.",
            remedy="Use the same security.keys.dir for all coordinators of a job, or stop that one first.",
        )

    def _confirm(self, leader: Leader, watch: Watch, suspicion: str) -> Leader | Ended | _Unconfirmed | None:
        """Check the journal, and whether the leader has come back in the meantime."""
        signs = watch.signs
        try:
            journal = read_journal(self._settings, self._topology.job, JOURNAL_TIMEOUT_S)
        except KafkaUnavailable as error:
            _log.warning("the leader seems to be gone (%s), but: %s", suspicion, error.message)
            watch.patience_again(monotonic_ms())
            return _Unconfirmed()
        newest = leader_in(journal, self._topology.job)
        if newest is None:
            return _end_in(journal, leader.term)
        if newest != leader:
            return newest
        while not self._inbox.empty():
            self._note(self._inbox.get(), leader, watch)
        if watch.signs != signs and not watch.resigns:
            return _Unconfirmed()
        if self._interrupted.is_set():
            return _Unconfirmed()
        _log.info(
            "taking over from the coordinator of term %d, at %s: %s", leader.term, leader.address, suspicion
        )
        return None


class _Unconfirmed:
    pass


_INTERRUPTED = Ended(0, "asked to stop while standing by")


def _end_in(journal: Mapping[str, Any], term: int) -> Ended | None:
    """How the job ended in this or a later term, as its leader recorded it. None if it didn't."""
    found = ended_in(journal)
    return None if found is None or found[0] < term else found[1]


def nobody_listens(address: str) -> bool:
    """Whether the host in ``tcp://host:port`` replies that nothing listens there. No answer proves
    nothing.
    """
    host, port = split_address(address)
    try:
        socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False
