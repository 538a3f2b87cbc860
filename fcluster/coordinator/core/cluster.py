"""The state that all parts of the coordinator's core share: slots, sessions, shards, joiners and the clock.

Responsible for: holding that state in one place, and answering questions about it that several parts need.
Each part changes only what it is responsible for; `invariants` checks that everything fits together. Must not
decide anything or produce effects. Pure.
"""

from __future__ import annotations

from collections import defaultdict

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.coordinator.core.model import (
    Counters,
    Deaths,
    Joiner,
    Phase,
    Session,
    SessionPhase,
    Shard,
    Slot,
    Terms,
)
from fcluster.wire import messages


class Cluster:
    """The state of the cluster.

    Attributes:
        now_ms: the time of the current event.
        started: fences that a previous leader left incomplete have begun.
        assigning: the first assignment has been made.
        first_join_ms: when the first worker joined this leader.
        drained_workers: workers that an operator is draining. A new session doesn't change that. An ordered
            set.
        ending_told: the journal holds the decision to end the job.
        overdue: the records at which a handler has hung, by shard, until they are committed. The journal
            holds them, too.
        deaths: how often in a row sessions were lost with nothing of a shard committed in between, and at
            which of its records. The journal holds them, too.
        committed: the highest offsets that workers have reported as committed, by shard and by input number.
            In memory only: a new leader starts without them.
        job_start: the number of the job's start; see `starts`. None: it isn't known yet, and no shard is
            assigned before. 0: the job has neither global tables nor a limit on dead letters, and doesn't
            need it.
        run_end: where a bounded run ends, as far as the journal holds it. None: the run isn't bounded.
        kafka_troubles: what the job is waiting for in Kafka, one sentence each.
        session_of_worker: by the worker's id. `session_of_peer`: by the connection, if it has one.
    """

    def __init__(self, terms: Terms, now_ms: float) -> None:
        self.terms = terms
        self.term = terms.term
        self.settings = terms.settings
        self.now_ms = now_ms
        self.started_ms = now_ms
        self.started = False
        self.phase = Phase.RUNNING
        self.stop_reason = ""
        self.failure: Failure | None = None
        self.ending_told = False
        self.assigning = False
        self.first_join_ms: float | None = None
        self.slots: dict[int, Slot] = {}
        self.sessions: dict[int, Session] = {}
        self.session_of_worker: dict[str, Session] = {}
        self.session_of_peer: dict[bytes, Session] = {}
        self.shards = {identity: Shard(identity) for identity in terms.topology.shards(terms.partitions)}
        self.joiners: dict[bytes, Joiner] = {}
        self.drained_workers: dict[str, None] = {}
        self.overdue: dict[ShardId, tuple[messages.OverdueRecord, ...]] = {}
        self.deaths: dict[ShardId, Deaths] = {}
        self.committed: dict[ShardId, dict[int, int]] = {}
        self.counters = Counters()
        needs_start = terms.topology.has_global_tables or terms.settings.dead_letters_max > 0
        self.job_start: int | None = None if needs_start else 0
        self.run_end = terms.run_end
        self.kafka_troubles: tuple[str, ...] = ()
        self._awaited = True
        """False once there are none: no session becomes awaited later."""
        self._by_slot: defaultdict[int, set[ShardId]] = defaultdict(set)

    def shards_of(self, slot: int) -> list[Shard]:
        """The shards on this slot, in order."""
        return [self.shards[identity] for identity in sorted(self._by_slot.get(slot, ()))]

    def put(self, shard: Shard, slot: int | None) -> None:
        """The shard is on this slot from now on, or on none."""
        if shard.slot is not None:
            self._by_slot[shard.slot].discard(shard.identity)
        if slot is not None:
            self._by_slot[slot].add(shard.identity)
        shard.slot = slot

    def awaits_sessions(self) -> bool:
        """Whether there are sessions of a previous leader that haven't returned yet."""
        if self._awaited:
            self._awaited = any(session.phase is SessionPhase.AWAITED for session in self.sessions.values())
        return self._awaited

    def available_slots(self) -> list[int]:
        """The slots that can be given shards."""
        return [
            slot.number
            for slot in self.slots.values()
            if (slot.session and not slot.session.leaving)
            or (slot.joiner and slot.joiner.hello.worker not in self.drained_workers)
        ]

    def refused(self, reason: str) -> messages.Refused:
        """A final refusal: the sender need not ask again."""
        return messages.Refused(self.term, reason, retry=False)

    def shutdown(self, session: int = 0) -> messages.Shutdown:
        """Tells a session, or a process without one, that the job is over."""
        return messages.Shutdown(self.term, session, self.stop_reason, self.failure)

    def note_join(self) -> None:
        """Record that a worker has joined."""
        if self.first_join_ms is None:
            self.first_join_ms = self.now_ms
