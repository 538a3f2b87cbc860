"""The coordinator's decisions: sessions, shards, epochs and the end of the job, without any I/O.

Responsible for: what a coordinator does when something happened. `Coordinator.handle(event, now_ms)` takes
one event and returns the effects that the shell in `server` carries out, in order. `next_deadline_ms` says
when to call again if nothing happens.

Invariants kept:

- *Journal first.* Whatever the world outside can see of a decision about sessions, fences and shards
  happens after the journal holds it: a session is journalled before its `Welcome`, the end of a session
  before its slot is fenced, a shard's slot before `Assign`. A deposed leader, whom the journal refuses,
  therefore can't admit, fence or assign. The end of the job is journalled before a `Drain` or `Shutdown`.
- *Fence, then own.* A shard passes from one session to another only when the first released it, said
  goodbye, or is over *and* its slot's ids have been fenced since. A slot that isn't fenced opens no session.
- *One session, one conversation.* A session that is over never gets a `Barrier` or `Complete` again; who
  still speaks for it is told `Evicted`.
- *Epoch numbers rise strictly*, and a session gets `Complete(e)` only after its `Prepared(e)`.
- *Who leaves, leaves.* A session that is leaving gets no shards to keep, whatever happens to its connection
  or to the coordinator; its worker knows, or is told again.
- *Epochs wait for nobody.* No journal write, fence or dead worker holds back the epoch of another worker
  for longer than `checkpoint.straggler.ms`.

Must not: read a clock, touch a socket, Kafka or a thread, or draw random numbers. Work for an epoch grows
with the workers that take part in it, not with shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from fcluster.common import messages
from fcluster.common.ids import ShardId
from fcluster.common.messages import FromCoordinator, WorkerStats
from fcluster.coordinator import events
from fcluster.coordinator.agents import Agents
from fcluster.coordinator.assignment import plan
from fcluster.coordinator.election import STANDBYS_COME_MS, Resignation, Roster
from fcluster.coordinator.events import Effect, Event
from fcluster.coordinator.model import (
    HELD_PHASES,
    Counters,
    EpochPhase,
    Joiner,
    Phase,
    Session,
    SessionPhase,
    Shard,
    ShardPhase,
    Slot,
    Terms,
)
from fcluster.coordinator.progress import Progress
from fcluster.coordinator.rounds import EpochNumbers, Rounds
from fcluster.coordinator.copies import Copies, learn
from fcluster.coordinator.naming import find_worker
from fcluster.coordinator.status import describe
from fcluster.coordinator.takeovers import Takeovers

EXIT_DONE = 0
EXIT_JOB_FAILED = 3
"""The job can't go on, wherever it runs: no use in starting the coordinator again."""
EXIT_TEMPORARY = 75
"""Another coordinator leads the job."""

SUSPICION_GRACE_MS = 150
"""A closed connection that doesn't come back within this time means a dead worker. One whose host says that the
process is gone isn't waited for."""
CROSSING_MS = 500
"""A Hello that comes so soon after a Welcome was probably sent before that arrived. It is less than a worker
waits before it says Hello again."""
FENCE_RETRY_MS = 250
FENCE_RETRY_MS_MAX = 5_000
FAILED_GRACE_MS = 2_000
"""A worker that says that the job has failed gets so long to commit what it had before."""
STOP_GRACE_MS = 10_000
"""Last fences and journal writes get so long before the coordinator ends without them."""
ABSENCE_NOTICED_MS = 1_000
"""If nobody called for so long while there was work, it was the coordinator that was away."""
WARMING_MS_MAX = 30_000
"""A shard moves after so long even if its copy at the target isn't warm: what is missing is then read there."""
SLOTS_MAX = 10_000
DRAINED_REMEMBERED_MAX = 10_000
EPOCHS_AHEAD_MAX = 1_000_000
"""Every number that was ever handed out is below a reservation in the journal, and so below what this leader
knows. A worker that knows of one so much higher isn't of this job, and must not push the numbers up there."""
REASON_CHARACTERS_MAX = 10_000
STOP_ASKERS_MAX = 100
ENDING_KEY = "ending"
"""Journal key for the decision to end the job, while that is being carried out."""
CHECK_KEY = "check"
"""Journal key that is written to find out whether the journal still takes our writes."""
DOUBT_INTERVAL_MS = 1_000
"""Workers say that there is a newer leader, honest or not: that often the journal is asked."""
_SESSIONS_IN_TERM = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Held:
    """Something to go on with when the journal holds the write `sequence`.

    `number` is the session to welcome, the slot to fence, or the end of the reserved epochs; the end of the job
    needs none.
    """

    sequence: int
    kind: Literal["welcome", "fence", "epochs", "drain"]
    number: int


@dataclass(slots=True)
class _Output:
    """What the event at hand has led to so far."""

    effects: list[Effect] = field(default_factory=lambda: list[Effect]())
    journal: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())


def slot_key(slot: int) -> str:
    """Journal key of a slot and its session."""
    return f"slot/{slot}"


def assignment_key(shard: ShardId) -> str:
    """Journal key of a shard's slot."""
    return f"assignment/{shard.stage}/{shard.partition}"


def _highest_epoch(hello: messages.Hello) -> int:
    return max(hello.epoch, hello.prepared_epoch, hello.in_flight_epoch)


class Coordinator:
    """The state of the cluster; see the module's docstring for the rules it keeps.

    Attributes are for reading by status and tests; only `handle` changes them.
    """

    def __init__(self, terms: Terms, now_ms: float) -> None:
        self.terms = terms
        self.settings = terms.settings
        self.phase = Phase.RUNNING
        self.stop_reason = ""
        self.failure = ""
        self.slots: dict[int, Slot] = {}
        self.sessions: dict[int, Session] = {}
        self.shards = {identity: Shard(identity) for identity in terms.topology.shards(terms.partitions)}
        self.joiners: dict[bytes, Joiner] = {}
        self.assigning = False
        self.epochs = EpochNumbers(terms.highest_committed_epoch)
        self.rounds = Rounds(self.epochs, terms.settings, terms.term, self._send)
        self.progress = Progress(terms.topology, self.shards, terms.until_caught_up)
        self.copies = Copies(terms.topology, terms.settings.num_standby_replicas, terms.term, self._send)
        self.agents = Agents(terms.term, terms.settings.session_timeout_ms)
        self.counters = Counters()
        self.standbys = Roster(terms.settings.heartbeat_interval_ms)
        self.resignation: Resignation | None = None
        self.takeovers = Takeovers()
        self.snapshot_store = terms.snapshot_store
        self.started_ms = now_ms
        self._now = now_ms
        self._first_join_ms: float | None = None
        self._sessions_opened = 0
        self._session_of_worker: dict[str, Session] = {}
        self._session_of_peer: dict[bytes, Session] = {}
        self._suspects: dict[int, Session] = {}
        self._retrying: dict[int, Slot] = {}
        self._warming: list[Shard] = []
        self._postponed: set[ShardId] = set()
        self._drained: dict[str, None] = {}
        """Workers that an operator wants gone; a new session doesn't change that. An ordered set."""
        self._sweep_ms = max(20.0, min(300.0, terms.settings.session_timeout_ms / 10))
        self._next_sweep_ms = now_ms
        self._drain_began_ms = now_ms
        self._drain_deadline_ms = now_ms
        self._ending_sequence = 0
        self._ending_told = False
        self._stop_askers: list[bytes] = []
        self._ending_resumed: Mapping[str, Any] | None = None
        self._doubted_ms = float("-inf")
        self._last_sequence = 0
        self._written_sequence = 0
        self._held: deque[_Held] = deque()
        self._out = _Output()
        self._started = False

    @classmethod
    def recover(cls, journal: Mapping[str, Any], terms: Terms, now_ms: float) -> Coordinator:
        """A coordinator that takes over where the journal of former terms ends.

        Args:
            journal: key to value, as the core wrote them; keys of others are ignored.
            terms: of the new leadership.
            now_ms: of a clock that never goes back.
        """
        self = cls(terms, now_ms)
        self.epochs.observe(int(journal.get("epoch", {}).get("reserved_until", 1)) - 1)
        self._ending_resumed = journal.get(ENDING_KEY)
        for key, value in sorted(journal.items()):
            kind, _, rest = key.partition("/")
            if kind == "slot":
                self._recover_slot(int(rest), value)
            elif kind == "assignment":
                stage, _, partition = rest.rpartition("/")
                shard = self.shards.get(ShardId(stage, int(partition)))
                if shard is not None:
                    shard.slot, shard.phase = int(value["slot"]), ShardPhase.WAITING
        for shard in self.shards.values():
            if shard.slot is not None and shard.slot not in self.slots:
                shard.slot, shard.phase = None, ShardPhase.FREE
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
            heard_ms=self._now,
        )
        slot.session = self.sessions[session.number] = session
        self._session_of_worker[session.worker] = session

    # --- the one entrance -----------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: float) -> list[Effect]:
        """What to do about `event`, in order. `now_ms` is of a clock that never goes back."""
        if self.phase is Phase.STOPPED:
            return []
        self._notice_absence(now_ms)
        self._now = now_ms
        self._out = _Output()
        match event:
            case events.MessageReceived(peer, message):
                self._on_message(peer, message)
            case events.JournalWritten(sequence):
                self._on_journal_written(sequence)
            case events.PeerDisconnected(peer):
                self._on_disconnected(peer)
            case events.ProcessEnded(worker):
                self._on_process_ended(worker)
            case events.SlotFenced(slot):
                self._on_fenced(slot)
            case events.SlotFenceFailed(slot, reason):
                self._on_fence_failed(slot, reason)
            case events.EndOffsetsRead(stage, offsets):
                self.progress.set_target(stage, offsets)
            case events.Started():
                self._on_started()
            case events.WireCounted():
                self._note_wire(event)
            case events.StopRequested():
                self._begin_drain("asked to stop")
            case events.ResignRequested():
                self._on_resign_requested()
            case events.Deposed(reason):
                self._stop(EXIT_TEMPORARY, f"deposed: {reason}")
            case events.Tick():
                pass
        self._advance()
        return self._finish()

    def next_deadline_ms(self) -> float | None:
        """When to call `handle(Tick())` if nothing else happens before; None: never."""
        if self.phase is Phase.STOPPED:
            return None
        settings = self.settings
        deadlines = [session.suspect_until_ms for session in self._suspects.values()]
        deadlines += [slot.fence_retry_ms for slot in self._retrying.values()]
        deadlines += [shard.warm_until_ms for shard in self._warming]
        deadlines.append(self.rounds.deadline_ms())
        if self.sessions:
            deadlines.append(self._next_sweep_ms)
        if not self.assigning and self._first_join_ms is not None:
            deadlines.append(self._first_join_ms + settings.initial_rebalance_delay_ms)
        if self.resignation is not None:
            deadlines.append(self.resignation.next_ms())
        if self.phase is not Phase.RUNNING:
            deadlines += [self._drain_deadline_ms, self._drain_began_ms + FAILED_GRACE_MS]
        # What is past already was looked at, and waits for something other than time.
        return min((ms for ms in deadlines if ms is not None and ms > self._now), default=None)

    def _notice_absence(self, now_ms: float) -> None:
        """A coordinator that was stopped or swapped out must not take its own absence for its workers'."""
        absence_ms = now_ms - self._now
        if absence_ms < max(ABSENCE_NOTICED_MS, 2 * self._sweep_ms):
            return
        for session in self.sessions.values():
            session.heard_ms += absence_ms
            session.epoch_phase_ms += absence_ms
            session.unheard_ms += absence_ms
            if session.suspect_until_ms is not None:
                session.suspect_until_ms += absence_ms
            if session.unlinked_ms is not None:
                session.unlinked_ms += absence_ms

    def _advance(self) -> None:
        """All that only the clock decides, and what the event has made possible."""
        if self.phase is Phase.STOPPED:
            return
        self._end_suspects()
        self._sweep()
        self._retry_fences()
        self._place_joiners()
        self._begin_assigning()
        self._hand_over_warm()
        self.rounds.advance(self._now)
        self._follow_progress()
        self._follow_resignation()
        self._follow_drain()
        self._reserve_epochs()

    def _finish(self) -> list[Effect]:
        if self._out.journal:
            self._last_sequence += 1
            self._out.effects.append(events.WriteJournal(self._last_sequence, self._out.journal))
        return self._out.effects

    # --- output ---------------------------------------------------------------------------------------

    def _send(self, peer: bytes, message: FromCoordinator) -> None:
        self._out.effects.append(events.SendMessage(peer, message))

    def _log(self, level: Literal["debug", "info", "warning", "error"], text: str) -> None:
        self._out.effects.append(events.LogLine(level, text))

    def _journal(self, key: str, value: Any) -> int:
        """Add an entry to this event's write; returns the write's sequence."""
        self._out.journal[key] = value
        return self._last_sequence + 1

    def _journal_slot(self, slot: Slot) -> int:
        session = slot.session
        value = {
            "session": session.number if session else 0,
            "worker": session.worker if session else "",
            "host": session.host if session else "",
            "pid": session.pid if session else 0,
            "fenced": slot.fenced,
        }
        return self._journal(slot_key(slot.number), value)

    def _hold(self, kind: Literal["welcome", "fence", "epochs", "drain"], sequence: int, number: int) -> None:
        self._held.append(_Held(sequence, kind, number))

    def _on_journal_written(self, sequence: int) -> None:
        self._written_sequence = max(self._written_sequence, sequence)
        while self._held and self._held[0].sequence <= sequence:
            held = self._held.popleft()
            if held.kind == "welcome":
                self._welcome(held.number)
            elif held.kind == "fence":
                self._out.effects.append(events.FenceSlot(held.number))
                self.takeovers.journalled(held.number, self._now)
            elif held.kind == "drain":
                self._tell_ending()
            else:
                self.epochs.reserved(held.number)
        self._on_assignments_written(sequence)

    # --- beginning ------------------------------------------------------------------------------------

    def _on_started(self) -> None:
        self._started = True
        awaited = [session for session in self.sessions.values() if session.phase is SessionPhase.AWAITED]
        self._log(
            "info",
            f"leading job {self.terms.topology.job!r} in term {self.terms.term}: {len(self.shards)} shards, "
            f"{len(self.slots)} known slots, {len(awaited)} sessions to adopt",
        )
        for slot in self.slots.values():
            if not slot.fenced and slot.session is None:
                self._fence(slot)
        if self._ending_resumed is not None:
            reason = str(self._ending_resumed["reason"])
            if self._ending_resumed["failed"]:
                self.failure = reason
            self._begin_drain(reason)

    def _reserve_epochs(self) -> None:
        until = self.epochs.wanted_reservation()
        if until is not None:
            self._hold("epochs", self._journal("epoch", {"reserved_until": until}), until)

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
            self._send(peer, messages.StatusReply(self.terms.term, status))
        elif isinstance(message, messages.LeaderCheck):
            self._on_leader_check(peer, message)
        elif isinstance(message, messages.StopRequest):
            self._on_stop_request(peer)
        elif isinstance(message, messages.DrainRequest):
            self._send(peer, self._drain_worker(message.worker))
        elif isinstance(message, messages.ScaleRequest):
            self._send(peer, self._scale(message))
        elif isinstance(message, messages.AgentReport):
            self._on_agent_report(peer, message)
        else:
            session = self.sessions.get(message.session)
            if session is None or session.peer != peer:
                self._answer_stranger(peer, message)
            else:
                self._hear(session)
                session.spoken = True
                self._on_session_message(session, message)

    def _answer_stranger(self, peer: bytes, message: messages.FromWorker) -> None:
        """Somebody speaks for a session that is over: tell him. One that is awaited will say Hello soon."""
        awaited = message.session in self.sessions  # frames that were queued before the new leader's Welcome
        if message.session and not awaited and not isinstance(message, messages.Goodbye):
            self._send(peer, messages.Evicted(self.terms.term, message.session))

    def _on_session_message(self, session: Session, message: messages.FromWorker) -> None:
        match message:
            case messages.Dirty():
                session.backlog = message.backlog
                self.rounds.want(session)
            case messages.Prepared():
                session.backlog = message.backlog
                self.rounds.prepared(session, message.epoch, self._now)
            case messages.Committed():
                self._learn_committed(session, message.shards)
                self.rounds.committed(session, message, self._now)
            case messages.Heartbeat():
                heard = min(session.orders, message.orders_heard)
                session.orders_heard = max(session.orders_heard, heard)
                self._on_heartbeat(session, message.stats)
            case messages.ShardsRunning():
                for status in message.shards:
                    self._learn_running(session, status)
            case messages.Released():
                if message.number > session.released_number:
                    session.released_number = message.number
                    self._on_released(session, message.shards)
            case messages.Drained():
                if self.phase is Phase.DRAINING:
                    session.phase = SessionPhase.DRAINED
            case messages.WorkerFailed():
                self._on_worker_failed(session, message.reason)
            case messages.Leaving():
                self._on_leaving(session)
            case messages.Goodbye():
                self.counters.leaves += 1
                self._end_session(session, "left in good order", clean=True)
            case messages.Hello():
                raise AssertionError("handled before")

    def _hear(self, session: Session) -> None:
        session.heard_ms = self._now
        if session.suspect_until_ms is not None and not session.process_ended:
            session.suspect_until_ms = None
            del self._suspects[session.number]

    def _on_heartbeat(self, session: Session, stats: WorkerStats) -> None:
        former, seconds = session.stats, (self._now - session.stats_ms) / 1000
        if former is None or seconds > 0.05:
            if former is not None:
                session.records_in_per_second = max(0.0, (stats.records_in - former.records_in) / seconds)
                session.records_out_per_second = max(0.0, (stats.records_out - former.records_out) / seconds)
            session.stats = msgspec.structs.replace(stats, shards=[], standbys=[])
            session.stats_ms = self._now
        learn(session, [status for status in stats.standbys if status.shard in self.shards])
        if session.standbys and session.standbys_told is None:
            self.copies.tell(self.shards, self.slots)
        for status in stats.shards:
            self._learn_running(session, status)
        if session.phase is not SessionPhase.OPENING:
            self._send(session.peer, messages.HeartbeatAck(self.terms.term, session.number))

    def _learn_running(self, session: Session, status: messages.ShardStatus) -> None:
        shard = self.shards.get(status.shard)
        if shard is None or shard.session != session.number:
            return  # not (any more) this session's to speak of
        if shard.phase is ShardPhase.RESTORING:
            shard.phase = ShardPhase.RUNNING
            takeover = self.takeovers.runs(shard.identity, self._now)
            if takeover is not None:
                self._log("info", takeover.describe())
            if shard.identity in self._postponed:
                self._balance()
        self.progress.learn(status)

    def _learn_committed(self, session: Session, statuses: Sequence[messages.ShardStatus]) -> None:
        for status in statuses:
            shard = self.shards.get(status.shard)
            if shard is not None and shard.session == session.number:
                self.progress.learn_commit(status)

    # --- joining --------------------------------------------------------------------------------------

    def _on_hello(self, peer: bytes, hello: messages.Hello) -> None:
        if hello.term > self.terms.term:
            self._doubt(peer, hello)
            return
        refusal = self._refusal(hello)
        if refusal:
            self._log("warning", f"refused worker {hello.worker} on {hello.host}: {refusal}")
            self._send(peer, messages.Refused(self.terms.term, refusal, retry=False))
            return
        self.snapshot_store = self.snapshot_store or hello.snapshot_store
        self.epochs.observe(_highest_epoch(hello))
        if hello.session:
            self._on_return(peer, hello)
        else:
            self._on_fresh_hello(peer, hello)

    def _refusal(self, hello: messages.Hello) -> str:
        """Why this worker can't work here at all; empty if it can."""
        if hello.version != self.terms.version:
            return (
                f"the worker runs fcluster {hello.version}, the coordinator {self.terms.version}. "
                "Install the same version on all hosts."
            )
        if hello.topology != self.terms.topology.fingerprint:
            return (
                f"the worker's job file describes another topology ({hello.topology}) than the coordinator's "
                f"({self.terms.topology.fingerprint}). Start all processes from the same job file."
            )
        if self.snapshot_store and hello.snapshot_store != self.snapshot_store:
            return (
                f"the worker's snapshot store ({hello.snapshot_store}) is not the cluster's "
                f"({self.snapshot_store}). Give all hosts the same directory or URL as 'snapshots'."
            )
        if hello.slot >= SLOTS_MAX:
            return f"slot {hello.slot} is beyond the limit of {SLOTS_MAX}. Choose a smaller one."
        if _highest_epoch(hello) > self.epochs.highest + EPOCHS_AHEAD_MAX:
            return (
                f"the worker knows of epoch {_highest_epoch(hello)}, which this job, now at "
                f"{self.epochs.highest}, never had. Restart the worker, or the whole cluster if the journal "
                "topic was deleted."
            )
        return ""

    def _on_fresh_hello(self, peer: bytes, hello: messages.Hello) -> None:
        former = self._session_of_worker.get(hello.worker)
        if former is not None and former.phase is SessionPhase.OPENING:
            self._link(former, peer)  # asked again, perhaps over a new connection; the journal is waited for
            return
        if former is not None and self._crosses_welcome(former):
            return
        if former is not None:
            self.counters.resets += 1
            self._end_session(former, "began anew", clean=False, rejoins=True)
        if self.phase is not Phase.RUNNING:
            self._turn_away(peer, former.slot if former else hello.slot)
            return
        joiner = self.joiners.get(peer)
        if joiner is None:
            joiner = self.joiners[peer] = Joiner(peer, hello)
            self._note_join()
        joiner.hello = msgspec.structs.replace(hello, owned=[])  # it begins with nothing; lists can be long
        if former is not None:
            self._place(joiner, self.slots[former.slot])

    def _crosses_welcome(self, session: Session) -> bool:
        """Whether a fresh Hello of the session's worker just missed our Welcome, which is on its way.

        To end the session then would make the worker find out a moment later, say Hello again, miss the next
        Welcome, and so on. If it did begin anew, it will say so once more.
        """
        in_time = self._now - session.welcomed_ms < CROSSING_MS
        return in_time and not session.spoken and session.unlinked_ms is None

    def _turn_away(self, peer: bytes, slot: int) -> None:
        """No session for anybody while the job ends; a worker of ours that restarted shall end with it.

        Before the journal holds the decision nothing is said: the worker asks again in a second.
        """
        if not self._ending_told:
            return
        if slot in self.slots:
            self._send(peer, messages.Shutdown(self.terms.term, 0, self.stop_reason, bool(self.failure)))
        else:
            reason = f"the job is stopping ({self.stop_reason}). Start the worker once the job runs again."
            self._send(peer, messages.Refused(self.terms.term, reason, retry=False))

    def _note_join(self) -> None:
        if self._first_join_ms is None:
            self._first_join_ms = self._now

    def _place(self, joiner: Joiner, slot: Slot | None = None) -> None:
        """Give the joiner a slot, the one it wants if possible; it waits if none can be chosen yet."""
        slot = slot or self._choose_slot(joiner.hello)
        if slot is None:
            return
        slot.joiner, joiner.slot = joiner, slot.number
        self._pursue(slot)

    def _choose_slot(self, hello: messages.Hello) -> Slot | None:
        if hello.slot >= 0:
            wanted = self.slots.setdefault(hello.slot, Slot(hello.slot))
            if wanted.session is not None and self._is_superseded(wanted.session, hello):
                self._end_session(
                    wanted.session, f"replaced by worker {hello.worker}", clean=False, rejoins=True
                )
            if wanted.session is None and wanted.joiner is None:
                return wanted
        if any(session.phase is SessionPhase.AWAITED for session in self.sessions.values()):
            return None  # slots shall stay few: some of these will turn out to be free
        for number in range(SLOTS_MAX):
            slot = self.slots.setdefault(number, Slot(number))
            if slot.session is None and slot.joiner is None:
                return slot
        return None

    def _is_superseded(self, session: Session, hello: messages.Hello) -> bool:
        """A worker whose connection is gone, and whose host started another one for the same slot, is dead.

        If this is ever wrong, the fence makes it right.
        """
        gone = session.phase is SessionPhase.AWAITED or session.suspect_until_ms is not None
        return gone and session.host == hello.host

    def _pursue(self, slot: Slot) -> None:
        """Bring a slot without a session to its next state: fenced, then a session for who waits for it."""
        if slot.session is not None:
            return
        if not slot.fenced:
            if not slot.fencing and slot.fence_retry_ms is None:
                self._fence(slot)
        elif slot.joiner is not None:
            self._open_session(slot, slot.joiner)
        self._settle(slot)

    def _open_session(self, slot: Slot, joiner: Joiner) -> None:
        self._sessions_opened += 1
        assert self._sessions_opened < _SESSIONS_IN_TERM
        hello = joiner.hello
        session = Session(
            number=self.terms.term * _SESSIONS_IN_TERM + self._sessions_opened,
            slot=slot.number,
            worker=hello.worker,
            host=hello.host,
            pid=hello.pid,
            peer=joiner.peer,
            phase=SessionPhase.OPENING,
            heard_ms=self._now,
            interval_ms=self.settings.commit_interval_min_ms,
            leaving=hello.worker in self._drained,
        )
        del self.joiners[joiner.peer]
        slot.joiner, slot.session, slot.fenced = None, session, False
        self.sessions[session.number] = session
        self._session_of_worker[session.worker] = session
        self._session_of_peer[session.peer] = session
        self._hold("welcome", self._journal_slot(slot), session.number)

    def _welcome(self, number: int) -> None:
        session = self.sessions.get(number)
        if session is None:
            return  # its worker died before the journal was written
        if self.phase is not Phase.RUNNING:
            self._turn_away(session.peer, session.slot)
            self._end_session(session, "the job is stopping", clean=True)
            return
        session.phase = SessionPhase.LIVE
        session.heard_ms = session.welcomed_ms = self._now
        self.counters.joins += 1
        self._log("info", f"worker {session.worker} (pid {session.pid}) has slot {session.slot}")
        self._send(
            session.peer,
            messages.Welcome(self.terms.term, number, session.slot, self.epochs.highest, adopted=False),
        )
        self._tell_to_leave(session)
        self._out.effects.append(events.PrepareFence(session.slot, soon=False))
        self._settle(self.slots[session.slot])
        self._balance()

    # --- returning ------------------------------------------------------------------------------------

    def _on_return(self, peer: bytes, hello: messages.Hello) -> None:
        """A worker that lost its connection, or its coordinator, but not its session."""
        session = self.sessions.get(hello.session)
        if session is None or session.worker != hello.worker or session.phase is SessionPhase.OPENING:
            self._send(peer, messages.Evicted(self.terms.term, hello.session))
            return
        if hello.leaving:
            self._on_leaving(session)
        if session.phase is not SessionPhase.AWAITED and session.unlinked_ms is None and session.peer == peer:
            # A Hello that outlived a connection and arrived with the next one's: since the one before nothing
            # was lost, so it says nothing new, and what it says is older than what was sent meanwhile.
            self._send_adoption(session)
            return
        owned = set(hello.owned)
        objection = self._objection(session, owned)
        if hello.draining and self.phase is Phase.RUNNING:
            objection = objection or "stopped for an end of the job that its coordinator didn't live to see"
        if objection:
            self._evict(session, objection, peer)
            return
        if session.phase is SessionPhase.AWAITED:
            self._adopt(session)
        self._link(session, peer)
        session.spoken = True
        self._send_adoption(session)
        self.rounds.returned(session, hello, self._now)
        self._reconcile_shards(session, owned)
        if self.phase is Phase.DRAINING:
            session.phase = SessionPhase.LIVE
            if self._ending_told:
                self._send(peer, messages.Drain(self.terms.term, session.number))
        self._tell_to_leave(session)
        self._balance()

    def _send_adoption(self, session: Session) -> None:
        number, slot = session.number, session.slot
        welcome = messages.Welcome(self.terms.term, number, slot, self.epochs.highest, adopted=True)
        self._send(session.peer, welcome)

    def _link(self, session: Session, peer: bytes) -> None:
        """The session's worker speaks over this connection, and knows what was lost with the one before."""
        if self._session_of_peer.get(session.peer) is session:
            del self._session_of_peer[session.peer]
        session.peer, self._session_of_peer[peer] = peer, session
        session.unlinked_ms = None
        session.orders_heard = session.orders  # what got lost is made up for by what it says it holds
        session.dismissed = False
        self._hear(session)

    def _objection(self, session: Session, owned: set[ShardId]) -> str:
        """Why the session can't go on with what it holds; empty if it can."""
        for identity in sorted(owned):
            shard = self.shards.get(identity)
            if shard is None or shard.slot != session.slot:
                return f"holds {identity}, which is not its own"
            if shard.phase is ShardPhase.RELEASING:
                # Whether it got the word to release it is anybody's guess. If it was repeated, one answer too
                # many could later pass for the release of the shard in a new life with the same session.
                return f"was to give back {identity} when its connection closed"
        return ""

    def _adopt(self, session: Session) -> None:
        session.phase = SessionPhase.LIVE
        session.standbys_told = None
        session.interval_ms = self.settings.commit_interval_min_ms
        self.counters.adoptions += 1
        self._out.effects.append(events.PrepareFence(session.slot, soon=False))
        self._note_join()
        self._log("info", f"adopted worker {session.worker} with slot {session.slot}")

    def _reconcile_shards(self, session: Session, owned: set[ShardId]) -> None:
        missing: list[ShardId] = []
        for shard in self._shards_of(session.slot):
            if shard.phase is ShardPhase.ASSIGNING:
                continue
            if shard.phase is ShardPhase.RELEASING:
                self._free(shard)  # it isn't held any more, only the word of it got lost
            elif shard.identity in owned:
                if shard.phase is ShardPhase.WAITING:
                    shard.phase, shard.session = ShardPhase.RUNNING, session.number
            else:
                shard.phase, shard.session, shard.target = ShardPhase.RESTORING, session.number, None
                missing.append(shard.identity)
        if missing:
            self._send_assign(session, missing)

    # --- agents ---------------------------------------------------------------------------------------

    def _on_agent_report(self, peer: bytes, report: messages.AgentReport) -> None:
        term = self.terms.term
        if report.job != self.terms.topology.job:
            reason = f"this is the coordinator of job {self.terms.topology.job!r}, not of {report.job!r}"
            self._send(peer, messages.Refused(term, reason, retry=False))
            return
        order = self.agents.heard(peer, report, self._now)
        if self.phase is Phase.STOPPING:
            self._send(peer, messages.Shutdown(term, 0, self.stop_reason, bool(self.failure)))
        elif order is None:
            self._send(peer, messages.Refused(term, "there are too many agents", retry=True))
        elif report.slots_wanted:
            own = set(report.running)
            slots = {
                session.pid: session.slot
                for session in self.sessions.values()
                if session.host == report.host and session.pid in own
            }
            self._send(peer, msgspec.structs.replace(order, slots=slots))
        else:
            self._send(peer, order)

    def _scale(self, request: messages.ScaleRequest) -> messages.ScaleReply | messages.Refused:
        if self.phase is not Phase.RUNNING:
            return messages.Refused(self.terms.term, f"the job is stopping ({self.stop_reason})", retry=False)
        answer = self.agents.scale(request, self._now)
        if isinstance(answer, str):
            return messages.Refused(self.terms.term, answer, retry=False)
        reply, orders = answer
        for peer, order in orders.items():
            self._send(peer, order)
        told = ", ".join(f"{target.host}:{target.pid} {target.target}" for target in reply.targets)
        self._log("info", f"workers wanted, by agent: {told}")
        return reply

    # --- leaving --------------------------------------------------------------------------------------

    def _on_leaving(self, session: Session) -> None:
        if not session.leaving_said:
            self._log("info", f"worker {session.worker} (slot {session.slot}) is leaving")
        session.leaving_said = True
        if not session.leaving:
            session.leaving = True
            self._balance()

    def _drain_worker(self, name: str) -> messages.DrainReply | messages.Refused:
        """An operator wants that worker gone."""
        if self.phase is not Phase.RUNNING:
            return messages.Refused(self.terms.term, f"the job is stopping ({self.stop_reason})", retry=False)
        session = find_worker(name, self.sessions.values())
        if isinstance(session, str):
            return messages.Refused(self.terms.term, session, retry=False)
        self._drained[session.worker] = None
        if len(self._drained) > DRAINED_REMEMBERED_MAX:
            del self._drained[next(iter(self._drained))]
        if session.phase is SessionPhase.LIVE and session.unlinked_ms is None:
            self._tell_to_leave(session)
        if not session.leaving:
            self._log("info", f"worker {session.worker} (slot {session.slot}) is to be drained")
            session.leaving = True
            self._balance()
        others = len(self._available())
        return messages.DrainReply(
            self.terms.term, session.slot, session.worker, session.host, session.pid, others
        )

    def _tell_to_leave(self, session: Session) -> None:
        """If an operator wants it; a worker that was told before doesn't mind."""
        if session.worker in self._drained:
            self._send(session.peer, messages.Leave(self.terms.term, session.number))

    def _available(self) -> list[int]:
        """The slots that can be given shards to keep."""
        return [
            slot.number
            for slot in self.slots.values()
            if (slot.session and not slot.session.leaving)
            or (slot.joiner and slot.joiner.hello.worker not in self._drained)
        ]

    def _dismiss_leaving(self) -> None:
        """Nobody can take their shards: who is leaving needn't wait for that."""
        for session in self.sessions.values():
            linked = session.phase is SessionPhase.LIVE and session.unlinked_ms is None
            if session.leaving and linked and not session.dismissed:
                session.dismissed = True
                self._send(session.peer, messages.Dismiss(self.terms.term, session.number))

    # --- dying ----------------------------------------------------------------------------------------

    def _on_disconnected(self, peer: bytes) -> None:
        self.agents.unlinked(peer)
        joiner = self.joiners.pop(peer, None)
        if joiner is not None and joiner.slot is not None:
            slot = self.slots[joiner.slot]
            slot.joiner = None  # it says Hello again if it lives
            self._pursue(slot)
            self._balance()
        session = self._session_of_peer.get(peer)
        if session is not None:
            if session.unlinked_ms is None:
                session.unlinked_ms = self._now
                session.standbys_told = None
                self.rounds.unlinked(session, self._now)
                self._out.effects.append(events.PrepareFence(session.slot, soon=True))
            self._suspect(session)

    def _on_process_ended(self, worker: str) -> None:
        """What the process had said is heard first: the end of its connection comes behind it."""
        session = self._session_of_worker.get(worker)
        if session is not None:
            session.process_ended = True
            self._suspect(session)

    def _suspect(self, session: Session) -> None:
        if session.suspect_until_ms is None:
            session.suspect_until_ms = self._now + SUSPICION_GRACE_MS
            self._suspects[session.number] = session
        if session.process_ended and session.unlinked_ms is not None:
            session.suspect_until_ms = self._now

    def _end_suspects(self) -> None:
        for session in list(self._suspects.values()):
            if session.suspect_until_ms is not None and self._now >= session.suspect_until_ms:
                self.counters.deaths += 1
                reason = "its process has ended" if session.process_ended else "its connection closed"
                self._end_session(session, reason, clean=False)

    def _sweep(self) -> None:
        """Look for silent and stuck workers, a few times within the shortest bound, not at each event."""
        if self._now < self._next_sweep_ms:
            return
        self._next_sweep_ms = self._now + self._sweep_ms
        for session in list(self.sessions.values()):
            if self._now - session.heard_ms >= self.settings.session_timeout_ms:
                self.counters.deaths += 1
                awaited = session.phase is SessionPhase.AWAITED
                reason = "did not come back" if awaited else "sent no sign of life in time"
                self._end_session(session, reason, clean=False)
                continue
            reason = self._stuck(session)
            if reason:
                self._evict(session, reason)

    def _stuck(self, session: Session) -> str:
        """Why the session, though alive, can't be waited for any longer; empty if it can."""
        settings = self.settings
        epoch_age_ms = self._now - session.epoch_phase_ms
        if session.epoch_phase is not EpochPhase.NONE and epoch_age_ms >= settings.checkpoint_timeout_ms:
            return f"is {session.epoch_phase.value} epoch {session.epoch} beyond checkpoint.timeout.ms"
        unheard = session.orders_heard < session.orders
        if unheard and self._now - session.unheard_ms >= settings.checkpoint_timeout_ms:
            return "did not hear which shards to run or to give back"
        if session.unlinked_ms is not None and self._now - session.unlinked_ms >= settings.session_timeout_ms:
            return "lost its connection and never said what it holds"
        return ""

    def _evict(self, session: Session, reason: str, peer: bytes | None = None) -> None:
        self.counters.evictions += 1
        self._send(peer or session.peer, messages.Evicted(self.terms.term, session.number))
        self._end_session(session, reason, clean=False)

    def _end_session(self, session: Session, reason: str, *, clean: bool, rejoins: bool = False) -> None:
        """Nothing is sent to this session from now on. Its slot is fenced unless it left in good order.

        Args:
            session: any but an ended one.
            reason: for the log.
            clean: it has nothing uncommitted and won't begin anything.
            rejoins: its worker, or its successor, asks for the slot at this very moment.
        """
        slot = self.slots[session.slot]
        self._log(
            "info" if clean or rejoins else "warning",
            f"session of worker {session.worker} (slot {slot.number}) is over: {reason}",
        )
        del self.sessions[session.number]
        del self._session_of_worker[session.worker]
        if self._session_of_peer.get(session.peer) is session:
            del self._session_of_peer[session.peer]
        self._suspects.pop(session.number, None)
        self.rounds.ended(session, self._now)
        slot.session, slot.fenced = None, clean
        if clean:
            self._out.effects.append(events.ForgetFence(slot.number))
        waiting: list[ShardId] = []
        for shard in self._shards_of(slot.number):
            if shard.phase is not ShardPhase.ASSIGNING:
                shard.phase, shard.session, shard.target = ShardPhase.WAITING, 0, None
                waiting.append(shard.identity)
        sequence = self._journal_slot(slot)
        if not clean:
            slot.fencing = True
            self._hold("fence", sequence, slot.number)
            since_ms = session.heard_ms if session.unlinked_ms is None else session.unlinked_ms
            self.takeovers.begin(slot.number, waiting, reason, since_ms, self._now)
        if not rejoins:
            self._pursue(slot)
            self._balance()

    def _place_joiners(self) -> None:
        for joiner in list(self.joiners.values()):
            if joiner.slot is None:
                self._place(joiner)

    # --- fences ---------------------------------------------------------------------------------------

    def _fence(self, slot: Slot) -> None:
        """Fence at once: the end of the slot's last session stands in the journal already."""
        slot.fencing, slot.fence_retry_ms = True, None
        self._retrying.pop(slot.number, None)
        self._out.effects.append(events.FenceSlot(slot.number))

    def _on_fenced(self, number: int) -> None:
        slot = self.slots[number]
        if not slot.fencing:
            return
        self.counters.fences += 1
        slot.fencing, slot.fenced, slot.fence_failures = False, True, 0
        self.takeovers.fenced(number, self._now)
        self._journal_slot(slot)
        self._pursue(slot)
        self._balance()

    def _on_fence_failed(self, number: int, reason: str) -> None:
        slot = self.slots[number]
        if not slot.fencing:
            return
        self.counters.fence_failures += 1
        delay_ms = min(FENCE_RETRY_MS_MAX, FENCE_RETRY_MS * 2 ** min(slot.fence_failures, 10))
        slot.fence_failures += 1
        slot.fencing, slot.fence_retry_ms = False, self._now + delay_ms
        self._retrying[number] = slot
        self._log(
            "warning", f"slot {number} can't be fenced, its shards wait: {reason}; again in {delay_ms} ms"
        )

    def _retry_fences(self) -> None:
        for slot in list(self._retrying.values()):
            if slot.fence_retry_ms is not None and self._now >= slot.fence_retry_ms:
                self._fence(slot)

    # --- shards ---------------------------------------------------------------------------------------

    def _shards_of(self, slot: int) -> list[Shard]:
        return [shard for shard in self.shards.values() if shard.slot == slot]

    def _free(self, shard: Shard, target: int | None = None) -> None:
        shard.phase, shard.slot, shard.session, shard.target = ShardPhase.FREE, None, 0, target

    def _begin_assigning(self) -> None:
        """The first assignment waits a while for all expected workers, so that shards don't move twice."""
        if self.assigning or self.phase is not Phase.RUNNING or self._first_join_ms is None:
            return
        if any(session.phase is SessionPhase.AWAITED for session in self.sessions.values()):
            return
        patient = self._now < self._first_join_ms + self.settings.initial_rebalance_delay_ms
        if patient and len(self.sessions) < self.terms.expected_workers:
            return
        if not self.sessions:
            return
        self.assigning = True
        for slot in self.slots.values():
            self._settle(slot)
        self._balance()

    def _settle(self, slot: Slot) -> None:
        """Decide about the shards that wait for this slot: its session gets them, or nobody has them."""
        waiting = [shard for shard in self._shards_of(slot.number) if shard.phase is ShardPhase.WAITING]
        session = slot.session
        if session is not None:
            # One that lost its connection learns of its new shards when it says which it holds.
            if session.phase is not SessionPhase.LIVE or session.unlinked_ms is not None:
                return
            if session.leaving and self.assigning:
                for shard in waiting:  # it was never told of them
                    self._free(shard)
            elif waiting:
                for shard in waiting:
                    shard.phase, shard.session = ShardPhase.RESTORING, session.number
                    self.takeovers.assigned(shard.identity, self._now)
                shards = [shard.identity for shard in waiting]
                self._send_assign(session, shards)
        elif slot.fenced and slot.joiner is None and self.assigning:
            for shard in waiting:
                self._free(shard)

    def _balance(self) -> None:
        """Move as few shards as possible so that all slots have the same, give or take one.

        What nobody has goes to a warm copy first; if that tips the balance, it moves on from there, warm again.
        """
        if not self.assigning or self.phase is not Phase.RUNNING:
            return
        available = self._available()
        if not available:
            self._dismiss_leaving()
        current = {
            shard.identity: slot
            for shard in self.shards.values()
            if (slot := shard.slot if shard.target is None else shard.target) is not None
        }
        self._postponed.clear()
        leaving: list[Shard] = []
        for identity, slot in sorted(plan(self.shards, available, current).items()):
            shard = self.shards[identity]
            if shard.phase is ShardPhase.FREE:
                self._give(shard, slot)
            elif shard.phase is ShardPhase.RELEASING:
                shard.target = slot
            elif shard.phase is ShardPhase.WARMING and slot == shard.slot:
                shard.phase, shard.target = ShardPhase.RUNNING, None
            elif shard.phase is ShardPhase.WARMING:
                shard.target = slot
            elif shard.phase in HELD_PHASES and slot != shard.slot and self._linked(shard):
                self._begin_move(shard, slot, leaving)
        self._warming = [shard for shard in self.shards.values() if shard.phase is ShardPhase.WARMING]
        self.copies.place(self.shards, self.slots.values())
        self.copies.tell(self.shards, self.slots)
        self._release(leaving)
        self._hand_over_warm()

    def _give(self, shard: Shard, slot: int) -> None:
        """Journal the slot of a shard that nobody has: the planned one, or one with a warm copy."""
        if shard.target is None:
            warmest = self.copies.warmest(shard.identity, self.slots.values())
            if warmest is not None:
                slot = warmest
                self.counters.warm_takeovers += 1
        sequence = self._journal(assignment_key(shard.identity), {"slot": slot})
        shard.phase, shard.slot, shard.target = ShardPhase.ASSIGNING, slot, None
        shard.journalled_by = sequence

    def _begin_move(self, shard: Shard, slot: int, leaving: list[Shard]) -> None:
        """Warm the shard's next slot first, if there is state to be copied."""
        if not self.copies.keeps_state(shard.identity):
            shard.target = slot
            leaving.append(shard)
        elif shard.phase is ShardPhase.RESTORING:
            # Its owner can't let go in the midst of that, so it doesn't get there any sooner.
            self._postponed.add(shard.identity)
        else:
            shard.phase, shard.target = ShardPhase.WARMING, slot
            shard.warm_until_ms = self._now + WARMING_MS_MAX

    def _hand_over_warm(self) -> None:
        """Begin to move those whose next slot has a warm copy by now, or was waited for long enough."""
        if not self._warming or self.phase is not Phase.RUNNING:
            return
        leaving: list[Shard] = []
        for shard in self._warming:
            if shard.phase is not ShardPhase.WARMING or shard.target is None or not self._linked(shard):
                continue
            target = self.slots[shard.target]
            warm = self.copies.is_warm(shard.identity, target)
            if warm or (self._now >= shard.warm_until_ms and target.session is not None):
                self.counters.cold_moves += not warm
                leaving.append(shard)
        if leaving:
            self._release(leaving)
            self._warming = [shard for shard in self._warming if shard.phase is ShardPhase.WARMING]

    def _release(self, leaving: Sequence[Shard]) -> None:
        """Ask for shards that are to move to their targets."""
        revoked: dict[int, list[ShardId]] = {}
        for shard in leaving:
            shard.phase = ShardPhase.RELEASING
            self.takeovers.revoked(shard.identity, self._now)
            revoked.setdefault(shard.session, []).append(shard.identity)
        for number, shards in revoked.items():
            self._revoke(self.sessions[number], shards)

    def _send_assign(self, session: Session, shards: list[ShardId]) -> None:
        number = self._next_order(session)
        self._send(session.peer, messages.Assign(self.terms.term, session.number, shards, number))

    def _next_order(self, session: Session) -> int:
        if session.orders_heard == session.orders:
            session.unheard_ms = self._now
        session.orders += 1
        return session.orders

    def _linked(self, shard: Shard) -> bool:
        return self.sessions[shard.session].unlinked_ms is None

    def _revoke(self, session: Session, shards: list[ShardId]) -> None:
        self.counters.moves += len(shards)
        self._log("info", f"moving {len(shards)} shards away from slot {session.slot}")
        number = self._next_order(session)
        self._send(session.peer, messages.Revoke(self.terms.term, session.number, shards, number))
        session.due_ms = self._now  # it is a commit that releases them

    def _on_assignments_written(self, sequence: int) -> None:
        written = [
            shard
            for shard in self.shards.values()
            if shard.phase is ShardPhase.ASSIGNING and shard.journalled_by <= sequence
        ]
        for shard in written:
            shard.phase = ShardPhase.WAITING
        for number in sorted({shard.slot for shard in written if shard.slot is not None}):
            self._settle(self.slots[number])
        if written:
            self._balance()

    def _on_released(self, session: Session, shards: Sequence[ShardId]) -> None:
        held = [
            shard for name in shards if (shard := self.shards.get(name)) and shard.session == session.number
        ]
        if any(shard.phase is not ShardPhase.RELEASING for shard in held):
            # A former leader asked for it. Which of our own requests would count as answered is unknown.
            self._evict(session, "gave back shards that it was not asked for")
            return
        for shard in held:
            self._free(shard, shard.target)
            self.takeovers.released(shard.identity, self._now)
        self._balance()

    # --- leaving the office -----------------------------------------------------------------------------

    def _on_leader_check(self, peer: bytes, check: messages.LeaderCheck) -> None:
        if check.leaves:
            self.standbys.leaves(peer)
            if self.resignation is not None:
                self.resignation.left(peer)
            return
        rank = self.standbys.heard(peer, check.standby, self._now)
        self._tell_alive(peer, rank)

    def _tell_alive(self, peer: bytes, rank: int) -> None:
        resigns = self.resignation is not None and self.resignation.invited == peer
        self._send(peer, messages.LeaderAlive(self.terms.term, self.terms.cluster_id, rank, resigns))

    def _on_resign_requested(self) -> None:
        if self.phase is Phase.RUNNING and self.resignation is None:
            self._log("info", "asked to leave: handing over to a standby, if there is one")
            took_over = self.counters.adoptions or any(
                session.phase is SessionPhase.AWAITED for session in self.sessions.values()
            )
            patient_until_ms = self.started_ms + STANDBYS_COME_MS if took_over else self._now
            self.resignation = Resignation(self.standbys, patient_until_ms, self._now)

    def _follow_resignation(self) -> None:
        """Lead on until a standby has fenced us, which our next write to the journal tells."""
        if self.resignation is None:
            return
        if self.phase is not Phase.RUNNING:
            self.resignation = None
            return
        step = self.resignation.advance(self._now)
        if step.invite is not None:
            self._tell_alive(step.invite, 0)
        if step.check:
            self._check_office()
        if step.give_up:
            self.resignation = None
            self._begin_drain("asked to leave, and no standby took over")

    def _check_office(self) -> None:
        """Write something: the journal refuses it if another one leads. One such write at a time."""
        if self._written_sequence == self._last_sequence:
            self._journal(CHECK_KEY, {"term": self.terms.term})

    def _doubt(self, peer: bytes, hello: messages.Hello) -> None:
        """A worker has heard of a newer leader. It wouldn't obey us; whether it is right the journal knows."""
        if self._now - self._doubted_ms >= DOUBT_INTERVAL_MS:
            self._doubted_ms = self._now
            self._log(
                "warning",
                f"worker {hello.worker} on {hello.host} has heard of term {hello.term}, this one is "
                f"{self.terms.term}: asking the journal",
            )
            self._check_office()
        reason = f"this coordinator is of term {self.terms.term}, you have heard of term {hello.term}"
        self._send(peer, messages.Refused(self.terms.term, reason, retry=True))

    # --- the end --------------------------------------------------------------------------------------

    def _follow_progress(self) -> None:
        if self.phase is not Phase.RUNNING:
            return
        for stage in self.progress.stages_to_read():
            self._out.effects.append(events.ReadEndOffsets(stage))
        if self.progress.caught_up:
            self._begin_drain("everything that was in the sources at start is committed")

    def _on_worker_failed(self, session: Session, reason: str) -> None:
        session.failed = True
        if not self.failure:
            reason = reason[:REASON_CHARACTERS_MAX] or "a worker failed and gave no reason"
            self.failure = reason
            self._log("error", f"the job can't go on: {reason}")
            if self.phase is Phase.DRAINING:
                self.stop_reason = reason
                self._decide_ending()  # it ends in another way than was decided
            self._begin_drain(reason)

    def _on_stop_request(self, peer: bytes) -> None:
        self._begin_drain("asked to stop by an admin client")
        if self._ending_told:
            self._send(peer, messages.StopReply(self.terms.term))
        elif len(self._stop_askers) < STOP_ASKERS_MAX:
            self._stop_askers.append(peer)

    def _begin_drain(self, reason: str) -> None:
        if self.phase is not Phase.RUNNING:
            return
        self._log("info", f"draining: {reason}")
        self.phase, self.stop_reason = Phase.DRAINING, reason
        self._decide_ending()
        self.rounds.hurry()
        self._drain_began_ms = self._now
        self._drain_deadline_ms = self._now + 2 * self.settings.checkpoint_timeout_ms

    def _decide_ending(self) -> None:
        """Journal the decision. Who can't write it has been deposed, and must neither drain nor shut down anybody.

        A successor that stood by goes on with it.
        """
        ending = {"reason": self.stop_reason, "failed": bool(self.failure)}
        self._ending_sequence = self._journal(ENDING_KEY, ending)
        self._hold("drain", self._ending_sequence, 0)

    def _tell_ending(self) -> None:
        """The journal holds the decision: carry it out."""
        self._ending_told = True
        for peer in self._stop_askers:
            self._send(peer, messages.StopReply(self.terms.term))
        self._stop_askers.clear()
        for session in self.sessions.values():
            if session.phase is SessionPhase.LIVE:
                self._send(session.peer, messages.Drain(self.terms.term, session.number))
        for joiner in self.joiners.values():
            self._turn_away(joiner.peer, joiner.hello.slot)
            if joiner.slot is not None:
                self.slots[joiner.slot].joiner = None
        self.joiners.clear()

    def _follow_drain(self) -> None:
        if self.phase is Phase.DRAINING:
            decided = self._ending_told and self._written_sequence >= self._ending_sequence
            undrained = [session for session in self.sessions.values() if not self._is_drained(session)]
            if decided and (not undrained or self._now >= self._drain_deadline_ms):
                self._shut_down()
        if self.phase is Phase.STOPPING:
            fencing = [slot.number for slot in self.slots.values() if not slot.fenced]
            if self._now >= self._drain_deadline_ms:
                self._log(
                    "warning", f"ending although slots {fencing} are not fenced or the journal is silent"
                )
            elif fencing or self._out.journal or self._written_sequence < self._last_sequence:
                return
            self._stop(EXIT_JOB_FAILED if self.failure else EXIT_DONE, self.stop_reason)

    def _is_drained(self, session: Session) -> bool:
        grace_over = self._now >= self._drain_began_ms + FAILED_GRACE_MS
        return session.phase is SessionPhase.DRAINED or (session.failed and grace_over)

    def _shut_down(self) -> None:
        """Everybody has committed what he had, or is past waiting for: let them go, fence the latter."""
        self.phase = Phase.STOPPING
        self._drain_deadline_ms = self._now + STOP_GRACE_MS
        for session in list(self.sessions.values()):
            if session.peer:
                shutdown = messages.Shutdown(
                    self.terms.term, session.number, self.stop_reason, bool(self.failure)
                )
                self._send(session.peer, shutdown)
            drained = session.phase is SessionPhase.DRAINED
            reason = "the job has stopped" if drained else "did not drain in time"
            self._end_session(session, reason, clean=drained)
        for peer in self.agents.peers():
            self._send(peer, messages.Shutdown(self.terms.term, 0, self.stop_reason, bool(self.failure)))

    def _stop(self, exit_code: int, reason: str) -> None:
        self.phase = Phase.STOPPED
        self._out.effects.append(events.StopCoordinator(exit_code, reason))

    # --- looking at it --------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The JSON document that `fcluster status --json` prints."""
        return describe(self, self._now)

    def committed_offsets(self) -> dict[ShardId, int]:
        """The committed offsets that workers have reported, by shard."""
        return {shard: status.committed for shard, status in self.progress.standings.items()}

    def invariants(self) -> None:
        """Assert what must hold after every event (tests and the simulation call it).

        Raises:
            AssertionError: something does not.
        """
        for slot in self.slots.values():
            self._check_slot(slot)
        for session in self.sessions.values():
            assert self.slots[session.slot].session is session, session
            assert self._session_of_worker.get(session.worker) is session, session
            assert session.epoch <= self.epochs.highest, session
            if self.phase is Phase.RUNNING and self.assigning and session.leaving:
                kept = [shard for shard in self.shards.values() if session.slot in shard.standbys]
                assert not kept, f"{session} is leaving, and is to keep copies"
            if self.phase is Phase.RUNNING:
                told = session.standbys_told or ()
                assert not any(self.shards[shard].session == session.number for shard in told), session
        for shard in self.shards.values():
            self._check_shard(shard)
        self._check_round()
        assert self.epochs.highest < self.epochs.reserved_until or self.rounds.current is None
        assert set(self.rounds.wanting) <= set(self.sessions)
        assert set(self._suspects) <= set(self.sessions)
        for joiner in self.joiners.values():
            assert joiner.slot is None or self.slots[joiner.slot].joiner is joiner

    def _check_slot(self, slot: Slot) -> None:
        retrying = slot.fence_retry_ms is not None
        assert (slot.number in self._retrying) == retrying, slot
        assert not (slot.fencing and retrying), slot
        if slot.session is not None:
            assert not any((slot.fenced, slot.fencing, retrying)), slot
            assert self.sessions.get(slot.session.number) is slot.session, slot
            assert slot.joiner is None, slot
        elif not slot.fenced and self._started:
            assert slot.fencing or retrying, f"nobody fences {slot}"
        if slot.joiner is not None:
            assert self.joiners.get(slot.joiner.peer) is slot.joiner, slot

    def _check_shard(self, shard: Shard) -> None:
        assert (shard.slot is None) == (shard.phase is ShardPhase.FREE), shard
        assert len(set(shard.standbys)) == len(shard.standbys) <= self.copies.replicas, shard
        if shard.phase is ShardPhase.WARMING:
            assert shard.target not in (None, shard.slot), shard
            assert shard in self._warming, shard
        elif shard.target is not None:
            assert shard.phase in (ShardPhase.RELEASING, ShardPhase.FREE), shard
        if shard.phase not in HELD_PHASES:
            assert shard.session == 0, shard
            return
        session = self.sessions[shard.session]
        assert session.slot == shard.slot, shard
        assert session.phase in (SessionPhase.LIVE, SessionPhase.DRAINED), shard

    def _check_round(self) -> None:
        current = self.rounds.current
        if current is None:
            return
        assert current.waiting, "a round that nobody holds up is not declared"
        for number, session in (current.waiting | current.prepared).items():
            assert self.sessions[number] is session
            assert session.epoch == current.epoch
        assert all(s.epoch_phase is EpochPhase.PREPARING for s in current.waiting.values())
        assert all(s.epoch_phase is EpochPhase.PREPARED for s in current.prepared.values())
