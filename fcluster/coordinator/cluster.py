"""What all parts of the coordinator's core share: slots, sessions, shards, who waits to join, and the clock.

Responsible for: holding that state in one place, and questions and answers about it that more than one part
has. Each part changes what it is responsible for (see there); `invariants` checks that it all fits together.
Must not: decide anything, or give anything out. Pure.
"""

from __future__ import annotations

from fcluster.common import messages
from fcluster.common.ids import ShardId
from fcluster.coordinator.model import Counters, Joiner, Phase, Session, SessionPhase, Shard, Slot, Terms


class Cluster:
    """The state of the cluster.

    Attributes:
        now_ms: the time of the event at hand.
        started: fences that a former leader left undone are under way.
        assigning: the first assignment has been made.
        first_join_ms: when a worker first came, of those that this leader has seen.
        drained_workers: whom an operator wants gone; a new session doesn't change that. An ordered set.
        ending_told: the journal holds the decision to end the job.
        overdue: the records at which a handler has hung, by shard, until they are committed. In memory only:
            a new leader counts anew.
        kafka_troubles: what of Kafka the job waits for, a sentence each.
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
        self.failure = ""
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
        self.overdue: dict[ShardId, messages.OverdueRecord] = {}
        self.counters = Counters()
        self.kafka_troubles: tuple[str, ...] = ()

    def shards_of(self, slot: int) -> list[Shard]:
        """The shards that have this slot."""
        return [shard for shard in self.shards.values() if shard.slot == slot]

    def awaits_sessions(self) -> bool:
        """Whether workers of a former leader haven't returned yet."""
        return any(session.phase is SessionPhase.AWAITED for session in self.sessions.values())

    def available_slots(self) -> list[int]:
        """The slots that can be given shards to keep."""
        return [
            slot.number
            for slot in self.slots.values()
            if (slot.session and not slot.session.leaving)
            or (slot.joiner and slot.joiner.hello.worker not in self.drained_workers)
        ]

    def refused(self, reason: str) -> messages.Refused:
        """The word that somebody doesn't get what he wants, and needn't ask again."""
        return messages.Refused(self.term, reason, retry=False)

    def shutdown(self, session: int = 0) -> messages.Shutdown:
        """The word that the job is over, to a session or to somebody who has none."""
        return messages.Shutdown(self.term, session, self.stop_reason, bool(self.failure))

    def note_join(self) -> None:
        """A worker has come."""
        if self.first_join_ms is None:
            self.first_join_ms = self.now_ms
