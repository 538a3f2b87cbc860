"""The coordinator's decisions about sessions, shards, epochs and the end of the job, without any I/O.

Responsible for: how a coordinator reacts to events. `Coordinator.handle(event, now_ms)` takes one event and
returns the effects, which the shell in `server` carries out in order. `next_deadline_ms` says when to call
again if no event comes. The parts make the decisions. This module defines which part gets which event, and
the order of due work:

- `membership`: sessions, their slots, and the fence between two of them. `liveness`: which workers are dead.
- `starts`: which start of the job this is.
- `joining`, `returning`, `leaving`: how a worker joins and leaves. `reports`: what it reports in between.
- `losses`: records that end or hang workers. `letters`: the limit on dead letters.
- `ownership` and `copies`: which worker runs or copies which shard. `rounds`: epochs.
- `topics`: topics that were deleted or replaced, or have grown.
- `ending`: the end of the job. `leadership`: handing over the leadership. `scaling`: the number of workers.

Invariants that all of them keep together:

- *Journal first.* A decision about sessions, fences and shards becomes visible to other processes only after
  the journal holds it: a session is journalled before its `Welcome`, the end of a session before its slot is
  fenced, and a shard's slot before `Assign`. The journal refuses a deposed leader, so it can't admit, fence
  or assign. The end of the job is journalled before a `Drain` or `Shutdown`.
- *Fence, then own.* A shard passes from one session to another only when the first session released it, said
  goodbye, or is over *and* its slot's ids have been fenced since. A slot that isn't fenced opens no session.
- *A session that is over stays over.* It never gets a `Barrier` or `Complete` again. A process that still
  sends messages for it gets `Evicted`.
- *Epoch numbers strictly increase*, and a session gets `Complete(e)` only after its `Prepared(e)`.
- *Leaving is final.* A session that is leaving gets no shards to keep, whatever happens to its connection or
  to the coordinator. Its worker knows that, or will be told again.
- *Epochs don't wait.* No journal write, fence or dead worker delays the epoch of another worker for longer
  than `checkpoint.straggler.ms`.

Must not: read a clock, use sockets, Kafka or threads, or draw random numbers. The work for an epoch grows
with the number of workers that take part in it, not with the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, cast

import msgspec

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.coordinator.core import events, invariants
from fcluster.coordinator.core.agents import Agents
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.copies import Copies
from fcluster.coordinator.core.election import Resignation
from fcluster.coordinator.core.ending import Ending
from fcluster.coordinator.core.events import Effect, Event
from fcluster.coordinator.core.joining import Joining
from fcluster.coordinator.core.leadership import Leadership
from fcluster.coordinator.core.leaving import Leaving
from fcluster.coordinator.core.letters import Letters
from fcluster.coordinator.core.liveness import Liveness
from fcluster.coordinator.core.losses import Losses
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import (
    LONG_AGO_MS,
    EpochPhase,
    Phase,
    Session,
    SessionPhase,
    ShardPhase,
    Slot,
    Terms,
)
from fcluster.coordinator.core.outbox import ENDING_KEY, Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.progress import Progress
from fcluster.coordinator.core.reports import Reports
from fcluster.coordinator.core.returning import Returning
from fcluster.coordinator.core.rounds import EpochNumbers, Rounds
from fcluster.coordinator.core.run_end import RunEnd
from fcluster.coordinator.core.scaling import Scaling
from fcluster.coordinator.core.starts import START_KEY, Starts
from fcluster.coordinator.core.status import describe
from fcluster.coordinator.core.takeovers import Takeovers
from fcluster.coordinator.core.topics import Topics
from fcluster.wire import messages

_EPOCH_KEY = "epoch"
_STOPPED, _RUNNING = Phase.STOPPED, Phase.RUNNING
"""Looking up a member of an enum takes eight times as long (Python 3.11), and each message looks at them."""
"""Journal key of the reservation of epoch numbers."""


class Coordinator:
    """The state of the cluster. The module's docstring lists the invariants.

    Its parts share `Cluster` (the state) and `Outbox` (the effects of the current event). A part knows only
    those parts that are created before it.

    Status and tests may read the attributes; only `handle` changes them.
    """

    def __init__(self, terms: Terms, now_ms: float) -> None:
        cluster = self._cluster = Cluster(terms, now_ms)
        outbox = self._outbox = Outbox()
        self.terms, self.settings = terms, terms.settings
        self.slots, self.sessions, self.shards = cluster.slots, cluster.sessions, cluster.shards
        self.joiners, self.counters = cluster.joiners, cluster.counters

        self.epochs = EpochNumbers(terms.highest_committed_epoch)
        self.rounds = Rounds(self.epochs, terms.settings, terms.term, outbox.send)
        self.progress = Progress(terms.topology, self.shards, terms.until_caught_up, terms.run_end)
        self.copies = Copies(terms.topology, terms.settings.num_standby_replicas, terms.term, outbox.send)
        self.agents = Agents(terms.term, terms.settings.session_timeout_ms)
        self.takeovers = Takeovers()

        self._starts = Starts(cluster, outbox)
        self._ownership = Ownership(cluster, outbox, self.copies, self.takeovers)
        self._losses = Losses(cluster, outbox, self.progress)
        self._membership = Membership(
            cluster, outbox, self.rounds, self._ownership, self.takeovers, self._losses
        )
        self._liveness = Liveness(cluster, outbox, self.rounds, self._ownership, self._membership)
        self._leaving = Leaving(cluster, outbox, self._ownership)
        self._ending = Ending(
            cluster, outbox, self.rounds, self.progress, self.agents, self._membership, self._losses
        )
        returning = Returning(
            cluster, outbox, self._starts, self.rounds, self._ownership, self._membership, self._leaving
        )
        self._joining = Joining(
            cluster,
            outbox,
            self.epochs,
            self._ownership,
            self._membership,
            self._leaving,
            self._ending,
            returning,
        )
        self.letters = Letters(cluster, self._ending)
        self._reports = Reports(
            cluster, outbox, self._ownership, self.copies, self.progress, self._losses, self.letters
        )
        self._scaling = Scaling(cluster, outbox, self.agents)
        self._topics = Topics(cluster, outbox, self._ownership, self.progress, self._ending)
        self._leadership = Leadership(cluster, outbox, self._ending)
        self._ending_resumed: Mapping[str, Any] | None = None
        self._routine: dict[type[messages.ToCoordinator], Callable[[Session, Any], None]] = {
            messages.Dirty: self._on_dirty,
            messages.Prepared: self._on_prepared,
            messages.Committed: self._on_committed,
            messages.Heartbeat: self._reports.heartbeat,
        }
        """What every worker sends all the time. It moves on the epochs of its session and the standings of
        its shards. Nothing else becomes possible by it, unless a shard waits for a warm copy, or the job
        ends.
        """
        self._calm_until_ms = LONG_AGO_MS
        """Until then, a routine message leaves nothing to do but epochs."""

    @property
    def phase(self) -> Phase:
        """The coordinator's phase."""
        return self._cluster.phase

    @property
    def failure(self) -> Failure | None:
        """Why the job can't continue. None if it can."""
        return self._cluster.failure

    @property
    def run_end(self) -> RunEnd | None:
        """Where a bounded run ends, and whether it has come to its end. None: it isn't bounded."""
        run_end = self._cluster.run_end
        if run_end is not None and self.progress.caught_up and self._cluster.failure is None:
            return run_end.over()
        return run_end

    @property
    def resignation(self) -> Resignation | None:
        """The hand-over in progress, if this leader is to leave."""
        return self._leadership.resignation

    @classmethod
    def recover(cls, journal: Mapping[str, Any], terms: Terms, now_ms: float) -> Coordinator:
        """A coordinator that takes over from the journal of previous terms.

        Args:
            journal: key to value, as the core wrote them. Unknown keys are ignored.
            terms: the terms of the new leadership.
            now_ms: from a clock that never goes back.
        """
        self = cls(terms, now_ms)
        self.epochs.observe(int(journal.get(_EPOCH_KEY, {}).get("reserved_until", 1)) - 1)
        self._ending_resumed = journal.get(ENDING_KEY)
        self._starts.recover(journal.get(START_KEY))
        for key, value in sorted(journal.items()):
            kind, _, rest = key.partition("/")
            if kind == "slot":
                self._recover_slot(int(rest), value)
            elif kind in ("assignment", "deaths", "overdue"):
                stage, _, partition = rest.rpartition("/")
                shard = self.shards.get(ShardId(stage, int(partition)))
                if shard is None:
                    continue  # the job has no such shard any more
                if kind == "assignment":
                    self._cluster.put(shard, int(value["slot"]))
                    shard.phase = ShardPhase.WAITING
                else:
                    self._losses.recover(kind, shard.identity, value)
        for shard in self.shards.values():
            if shard.slot is not None and shard.slot not in self.slots:
                self._cluster.put(shard, None)
                shard.phase = ShardPhase.FREE
        return self

    def _recover_slot(self, number: int, value: Mapping[str, Any]) -> None:
        slot = self.slots[number] = Slot(number, fenced=bool(value["fenced"]))
        if not value["session"]:
            return
        slot.fenced = False
        session = Session(
            number=int(value["session"]),
            slot=number,
            worker=str(value["worker"]),
            host=str(value["host"]),
            pid=int(value["pid"]),
            peer=b"",
            phase=SessionPhase.AWAITED,
            heard_ms=self._cluster.now_ms,
        )
        slot.session = self.sessions[session.number] = session
        self._cluster.session_of_worker[session.worker] = session

    # --- events ---------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: float) -> list[Effect]:
        """Returns the effects of `event`, in order. `now_ms` comes from a clock that never goes back."""
        cluster = self._cluster
        if cluster.phase is _STOPPED:
            return []
        self._liveness.notice_absence(now_ms)
        cluster.now_ms = now_ms
        self._outbox.begin()
        act = self._routine.get(type(event.message)) if type(event) is events.MessageReceived else None
        if act is not None:
            received = cast("events.MessageReceived", event)
            message = cast("messages.FromWorker", received.message)
            session = self._hear(received.peer, message)
            if session is not None:
                act(session, message)
            # Phase.RUNNING and no shard that warms up: then the rest of `_advance` would do nothing.
            if now_ms < self._calm_until_ms and cluster.phase is _RUNNING and not self._ownership.warming:
                self._advance_epochs()
                return self._outbox.finish()
        else:
            self._dispatch(event)
        self._advance()
        return self._outbox.finish()

    def _dispatch(self, event: Event) -> None:
        match event:
            case events.MessageReceived(peer, message):
                self._on_message(peer, message)
            case events.JournalWritten(sequence):
                self._on_journal_written(sequence)
            case events.PeerDisconnected(peer):
                self.agents.unlinked(peer)
                self._liveness.disconnected(peer)
            case events.ProcessEnded(worker):
                self._liveness.process_ended(worker)
            case events.SlotFenced(slot):
                self._membership.fenced(slot)
            case events.SlotFenceFailed(slot, reason):
                self._membership.fence_failed(slot, reason)
            case events.EndOffsetsRead(stage, offsets, number):
                self._ending.end_offsets_read(stage, offsets, number)
            case events.Started():
                self._on_started()
            case events.TopicsLooked(look):
                self._topics.looked(look)
            case events.GroupLooked(foreign, members):
                self._topics.group_looked(foreign, members)
            case events.KafkaSeen(troubles):
                self._cluster.kafka_troubles = troubles
            case events.WireCounted():
                self._note_wire(event)
            case events.StopRequested():
                self._ending.begin_drain("asked to stop")
            case events.ResignRequested():
                self._leadership.resign()
            case events.Deposed(reason):
                self._ending.stop(ExitCode.TEMPORARY, f"deposed: {reason}")
            case events.Tick():
                pass

    def _advance(self) -> None:
        """Do the work that is due by the clock, or that the event has made possible."""
        if self.phase is Phase.STOPPED:
            return
        self._liveness.end_suspects()
        self._liveness.sweep()
        self._membership.retry_fences()
        self._joining.place_joiners()
        self._starts.decide()
        self._ownership.begin_assigning()
        self._ownership.hand_over_warm()
        self._advance_epochs()
        self._reserve_epochs()
        self._leadership.follow_resignation()
        self._ending.follow_drain()
        self._calm_until_ms = self._find_calm()

    def _advance_epochs(self) -> None:
        """What a routine message may make possible."""
        begun = self.rounds.begun
        self.rounds.advance(self._cluster.now_ms)
        if self.progress.has_targets:
            self._ending.follow_progress()
        if self.rounds.begun != begun:
            self._reserve_epochs()  # it has taken a number

    def _find_calm(self) -> float:
        """Until when time alone makes nothing possible except epochs, as far as the cluster stays as it is.

        With thousands of workers, most events are routine messages, and looking for due work after each of
        them would take half of the coordinator's time.
        """
        if not self._cluster.assigning or self._leadership.resignation is not None:
            return LONG_AGO_MS
        if any(joiner.slot is None for joiner in self.joiners.values()):
            return LONG_AGO_MS
        deadlines = chain(self._liveness.deadlines_ms(), self._membership.deadlines_ms())
        return min((ms for ms in deadlines if ms is not None), default=LONG_AGO_MS)

    def next_deadline_ms(self) -> float | None:
        """When to call `handle(Tick())` if no event comes before. None: never."""
        if self.phase is Phase.STOPPED:
            return None
        deadlines = chain(
            self._liveness.deadlines_ms(),
            self._membership.deadlines_ms(),
            self._ownership.deadlines_ms(),
            self._leadership.deadlines_ms(),
            self._ending.deadlines_ms(),
            [self.rounds.deadline_ms()],
        )
        # Past deadlines were handled already, and wait for something other than time.
        now_ms = self._cluster.now_ms
        return min((ms for ms in deadlines if ms is not None and ms > now_ms), default=None)

    # --- start ----------------------------------------------------------------------------------------

    def _on_started(self) -> None:
        self._cluster.started = True
        awaited = [session for session in self.sessions.values() if session.phase is SessionPhase.AWAITED]
        self._outbox.log(
            "info",
            f"leading job {self.terms.topology.job!r} in term {self.terms.term}: {len(self.shards)} shards, "
            f"{len(self.slots)} known slots, {len(awaited)} sessions to adopt",
        )
        if self._cluster.run_end is not None:
            self._outbox.log("info", f"the run ends at {self._cluster.run_end.text}")
        for slot in self.slots.values():
            if not slot.fenced and slot.session is None:
                self._membership.fence(slot)
        if self._ending_resumed is not None:
            self._ending.resume(self._ending_resumed)

    # --- the journal ----------------------------------------------------------------------------------

    def _on_journal_written(self, sequence: int) -> None:
        welcomes = False
        for held in self._outbox.written(sequence):
            match held.kind:
                case "welcome":
                    self._joining.welcome(held.number)
                    welcomes = True
                case "fence":
                    self._outbox.add(events.FenceSlot(held.number))
                    self.takeovers.journalled(held.number, self._cluster.now_ms)
                case "start":
                    self._cluster.job_start = held.number
                    self._ownership.settle_all()
                case "drain":
                    self._ending.tell()
                case "end":
                    self._ending.end_written()
                case "epochs":
                    self.epochs.reserved(held.number)
        if welcomes:  # once for all of them: it looks at all shards
            self._ownership.balance()
        self._ownership.assignments_written(sequence)

    def _reserve_epochs(self) -> None:
        until = self.epochs.wanted_reservation()
        if until is not None:
            sequence = self._outbox.journal(_EPOCH_KEY, {"reserved_until": until})
            self._outbox.hold("epochs", sequence, until)

    def _note_wire(self, counted: events.WireCounted) -> None:
        self.counters.malformed_frames = counted.malformed_frames
        self.counters.unauthorised_frames = counted.unauthorised_frames
        self.counters.failed_handshakes = counted.failed_handshakes

    # --- messages -------------------------------------------------------------------------------------

    def _on_message(self, peer: bytes, message: messages.ToCoordinator) -> None:
        if isinstance(message, messages.Hello):
            self._on_hello(peer, message)
        elif isinstance(message, messages.StatusRequest):
            status = msgspec.Raw(msgspec.msgpack.encode(self.status()))
            self._outbox.send(peer, messages.StatusReply(self.terms.term, status))
        elif isinstance(message, messages.LeaderCheck):
            self._leadership.leader_check(peer, message)
        elif isinstance(message, messages.StopRequest):
            self._ending.stop_asked(peer)
        elif isinstance(message, messages.DrainRequest):
            self._outbox.send(peer, self._leaving.drain_worker(message.worker))
        elif isinstance(message, messages.ScaleRequest):
            self._outbox.send(peer, self._scaling.scale(message))
        elif isinstance(message, messages.AgentReport):
            self._scaling.agent_report(peer, message)
        else:
            self._on_worker_message(peer, message)

    def _on_worker_message(self, peer: bytes, message: messages.FromWorker) -> None:
        session = self._hear(peer, message)
        if session is not None:
            self._on_session_message(session, message)

    def _hear(self, peer: bytes, message: messages.FromWorker) -> Session | None:
        """The session that the message belongs to. If it is none of this peer's, the peer is told so."""
        session = self.sessions.get(message.session)
        if session is None or session.peer != peer:
            self._answer_stranger(peer, message)
            return None
        self._membership.hear(session)
        session.spoken = True
        return session

    def _on_hello(self, peer: bytes, hello: messages.Hello) -> None:
        if hello.term > self.terms.term:
            self._leadership.doubt(peer, hello)
        else:
            self._joining.hello(peer, hello)

    def _answer_stranger(self, peer: bytes, message: messages.FromWorker) -> None:
        """Tell the sender that its session is over. If the session is awaited, the worker will soon send a
        Hello.
        """
        awaited = message.session in self.sessions  # frames that were queued before the new leader's Welcome
        if message.session and not awaited and not isinstance(message, messages.Goodbye):
            self._outbox.send(peer, messages.Evicted(self.terms.term, message.session))

    def _on_dirty(self, session: Session, dirty: messages.Dirty) -> None:
        session.backlog = dirty.backlog
        self.rounds.want(session)

    def _on_prepared(self, session: Session, prepared: messages.Prepared) -> None:
        session.backlog = prepared.backlog
        self.rounds.prepared(session, prepared.epoch, self._cluster.now_ms)

    def _on_committed(self, session: Session, committed: messages.Committed) -> None:
        self._reports.committed(session, committed.shards, committed.letter)
        self.rounds.committed(session, committed, self._cluster.now_ms)

    def _on_session_message(self, session: Session, message: messages.FromWorker) -> None:
        match message:
            case messages.ShardsRunning():
                for status in message.shards:
                    self._reports.running(session, status)
            case messages.TornTransaction():
                self._reports.torn(session, message)
            case messages.Released():
                self._on_released(session, message)
            case messages.Drained():
                if self.phase is Phase.DRAINING:
                    session.phase = SessionPhase.DRAINED
            case messages.WorkerFailed():
                self._ending.worker_failed(session, message.failure)
            case messages.RecordOverdue():
                self._losses.hung(session, message)
            case messages.RecordBegun():
                self._losses.begun(session, message)
            case messages.RecordEnded():
                session.begun = None
            case messages.Leaving():
                self._leaving.said(session)
            case messages.Goodbye():
                self.counters.leaves += 1
                self._membership.end(session, "left cleanly", clean=True)
            case _:
                raise AssertionError(f"{type(message).__name__} is handled before")

    def _on_released(self, session: Session, message: messages.Released) -> None:
        if message.number <= session.released_number:
            return
        session.released_number = message.number
        objection = self._ownership.released(session, message.shards)
        if objection:
            self._membership.evict(session, objection)

    # --- looking at it --------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The JSON document that `fcluster status --json` prints."""
        return describe(
            self._cluster,
            rounds=self.rounds,
            progress=self.progress,
            agents=self.agents,
            standbys=self._leadership.standbys,
            takeovers=self.takeovers,
            notices=list(self._topics.notices.values()),
        )

    @property
    def topics_in_doubt(self) -> bool:
        """Whether the topics should be checked again soon."""
        return self._topics.in_doubt

    def waits_ms(self, now_ms: float) -> float:
        """How long the oldest open epoch or takeover has taken so far. 0: there is none."""
        busy = (EpochPhase.PREPARING, EpochPhase.COMMITTING)
        begun_ms = [session.barrier_ms for session in self.sessions.values() if session.epoch_phase in busy]
        begun_ms += [takeover.noticed_ms for takeover in self.takeovers.under_way.values()]
        return max(0.0, now_ms - min(begun_ms)) if begun_ms else 0.0

    def committed_offsets(self) -> dict[tuple[ShardId, int], int]:
        """The committed offsets that workers have reported, by shard and input number."""
        return {
            (shard, number): status.committed
            for shard, inputs in self.progress.standings.items()
            for number, status in inputs.items()
        }

    def invariants(self) -> None:
        """Assert what must hold after every event. Tests and the simulation call it.

        Raises:
            AssertionError: something doesn't hold.
        """
        invariants.check(self._cluster, self.rounds, self.copies, self._ownership, self._membership)
