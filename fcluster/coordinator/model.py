"""What the coordinator remembers: slots, sessions, shards, and what it was told when it began to lead.

Responsible for: these types, and which phases there are. The parts of the core and `rounds` change them;
the rules that bind them are checked by `invariants`. Must not hold logic. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fcluster.common import messages
from fcluster.common.ids import ShardId
from fcluster.common.messages import WorkerStats
from fcluster.common.settings import Settings
from fcluster.common.topology import Topology

LONG_AGO_MS = float("-inf")


class Phase(Enum):
    """Of the coordinator."""

    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"
    """All workers are told to exit; last fences and journal writes are under way."""
    STOPPED = "stopped"


class SessionPhase(Enum):
    """Of a worker's session."""

    AWAITED = "awaited"
    """In the journal of a former term; its worker hasn't returned yet."""
    OPENING = "opening"
    """Being journalled; its worker doesn't know of it yet."""
    LIVE = "live"
    DRAINED = "drained"
    """Everything is committed, nothing is processed any more."""


class EpochPhase(Enum):
    """Of the epoch that a session has in flight."""

    NONE = "none"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTING = "committing"


class ShardPhase(Enum):
    """Of a shard. In all phases but FREE it has a slot, from RESTORING on a session too, which may write."""

    FREE = "free"
    """Nobody has it, and whoever had it is fenced or gave it back."""
    ASSIGNING = "assigning"
    """Its new slot is being journalled."""
    WAITING = "waiting"
    """For its slot's next session, or for its slot to be fenced."""
    RESTORING = "restoring"
    RUNNING = "running"
    WARMING = "warming"
    """Runs where it is, while the slot it is going to move to sets up a warm copy."""
    RELEASING = "releasing"
    STOPPED = "stopped"
    """Its session has it and doesn't run it: Kafka has torn a transaction, and a person has to choose."""


HELD_PHASES = (
    ShardPhase.RESTORING,
    ShardPhase.RUNNING,
    ShardPhase.WARMING,
    ShardPhase.RELEASING,
    ShardPhase.STOPPED,
)
"""A session was told to run the shard and hasn't given it back."""


@dataclass(slots=True)
class Session:
    """One worker's membership.

    Attributes:
        peer: the connection over which it speaks.
        heard_ms: when it last gave a sign of life. `spoken`: it said something in this session.
        welcomed_ms: when it was told of this session.
        suspect_until_ms: its connection closed; it is dead if nothing is heard of it until then.
        process_ended: its host says that its process is gone.
        unlinked_ms: since when what we send may get lost: its connection closed, and it hasn't said since
            what it holds. None: all is well.
        interval_ms: between its barriers. `due_ms` is when it may get the next one.
        epoch: the one in flight, or the last one. `committed_epoch` is the last that it said is committed.
        epoch_phase_ms: since when the epoch is in this phase.
        busy_ms: when it last said that a handler is busy with one record: it serves no barrier meanwhile.
        failed: it said that the job can't go on.
        orders: the number of the last `Assign` or `Revoke` that this leader sent it. `orders_heard` is the
        last that
            it said it has got; while there are others, `unheard_ms` is when the first of them was sent.
        released_number: that of the last `Released` that it sent.
        leaving: its shards move away, and it gets none. `leaving_said`: its worker knows.
        dismissed: its worker was told to go without waiting for that.
        standbys_told: of which shards it was last told to keep warm copies; None: it may not have heard.
        standbys: the warm copies that it says it has.
    """

    number: int
    slot: int
    worker: str
    host: str
    pid: int
    peer: bytes
    phase: SessionPhase
    heard_ms: float
    spoken: bool = False
    welcomed_ms: float = LONG_AGO_MS
    suspect_until_ms: float | None = None
    process_ended: bool = False
    unlinked_ms: float | None = None
    backlog: bool = False
    interval_ms: float = 0.0
    barrier_ms: float = LONG_AGO_MS
    due_ms: float = LONG_AGO_MS
    epoch: int = 0
    epoch_phase: EpochPhase = EpochPhase.NONE
    epoch_phase_ms: float = 0.0
    committed_epoch: int = 0
    epochs_committed: int = 0
    commit_ms: float = 0.0
    stats: WorkerStats | None = None
    stats_ms: float = 0.0
    records_in_per_second: float = 0.0
    records_out_per_second: float = 0.0
    busy_ms: float = LONG_AGO_MS
    failed: bool = False
    orders: int = 0
    orders_heard: int = 0
    unheard_ms: float = 0.0
    released_number: int = 0
    leaving: bool = False
    leaving_said: bool = False
    dismissed: bool = False
    standbys_told: tuple[ShardId, ...] | None = ()
    standbys: dict[ShardId, messages.StandbyStatus] = field(
        default_factory=lambda: dict[ShardId, messages.StandbyStatus]()
    )


@dataclass(slots=True)
class Joiner:
    """A worker that asked for a session and hasn't got it yet. `slot` is None while it has no place."""

    peer: bytes
    hello: messages.Hello
    slot: int | None = None


@dataclass(slots=True)
class Slot:
    """A stable identity: it names the transactional ids of whoever has it.

    `fenced`: no transaction of its ids is open, nor can be without a new session. While a slot has no
    session and isn't fenced, either `fencing` is under way or `fence_retry_ms` says when to try again.
    """

    number: int
    fenced: bool = True
    session: Session | None = None
    joiner: Joiner | None = None
    fencing: bool = False
    fence_retry_ms: float | None = None
    fence_failures: int = 0


@dataclass(slots=True)
class Shard:
    """Who has it.

    Attributes:
        target: where it goes once released; a free one comes from there and goes to it. None: wherever is
        best.
        journalled_by: the write that holds its slot.
        standbys: the slots that are to keep a warm copy of it.
        warm_until_ms: when it moves even if the target's copy isn't warm.
        stopped_reason: why it is stopped, and what can be done; empty if it isn't.
    """

    identity: ShardId
    phase: ShardPhase = ShardPhase.FREE
    slot: int | None = None
    session: int = 0
    target: int | None = None
    journalled_by: int = 0
    standbys: tuple[int, ...] = ()
    warm_until_ms: float = 0.0
    stopped_reason: str = ""


@dataclass(slots=True)
class Counters:
    """What happened since this coordinator leads."""

    joins: int = 0
    adoptions: int = 0
    deaths: int = 0
    evictions: int = 0
    leaves: int = 0
    resets: int = 0
    fences: int = 0
    fence_failures: int = 0
    moves: int = 0
    cold_moves: int = 0
    warm_takeovers: int = 0
    epochs: int = 0
    stragglers: int = 0
    malformed_frames: int = 0
    unauthorised_frames: int = 0
    failed_handshakes: int = 0
    torn_transactions: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What the coordinator is told about itself and the job when it begins to lead.

    Attributes:
        term: the number of its leadership, higher than any before.
        topology: the job.
        partitions: partition count of each stage's source topic, by topic name.
        settings: resolved.
        expected_workers: the first assignment waits for so many, for a while.
        version: of fcluster, which workers must share.
        until_caught_up: stop once everything that was in the sources at start is committed.
        snapshot_store: identity of the snapshot store that all workers must see; empty: that of the first.
        highest_committed_epoch: found in the group's committed offsets.
        cluster_id: of this leadership, as in the journal's leader record.
        topic_ids: of the topics that the job hangs on, as far as they are known; the journal holds them.
    """

    term: int
    topology: Topology
    partitions: Mapping[str, int]
    settings: Settings
    expected_workers: int
    version: str
    until_caught_up: bool = False
    snapshot_store: str = ""
    highest_committed_epoch: int = 0
    cluster_id: str = ""
    topic_ids: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
