"""The coordinator's data types: slots, sessions, shards, and the terms of its leadership.

Responsible for: these types and their phases. The parts of the core and `rounds` change them; `invariants`
checks the rules between them. Must not hold logic. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.common.transitions import Transitions
from fcluster.coordinator.core.run_end import RunEnd
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from fcluster.wire.messages import WorkerStats

LONG_AGO_MS = float("-inf")


class Phase(Enum):
    """The coordinator's phases."""

    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"
    """All workers were told to exit; the last fences and journal writes are in progress."""
    STOPPED = "stopped"


PHASES = Transitions(
    [Phase.RUNNING],
    {
        Phase.RUNNING: [Phase.DRAINING, Phase.STOPPED],  # deposed
        Phase.DRAINING: [Phase.STOPPING, Phase.STOPPED],
        Phase.STOPPING: [Phase.STOPPED],
        Phase.STOPPED: [],
    },
)


class SessionPhase(Enum):
    """Phases of a worker's session."""

    AWAITED = "awaited"
    """It is in the journal of a previous term; its worker hasn't returned yet."""
    OPENING = "opening"
    """It is being journalled; its worker doesn't know it yet."""
    LIVE = "live"
    DRAINED = "drained"
    """All its work is committed, and it processes no more records."""


SESSION_PHASES = Transitions(
    [SessionPhase.AWAITED, SessionPhase.OPENING],
    {
        SessionPhase.AWAITED: [SessionPhase.LIVE],
        SessionPhase.OPENING: [SessionPhase.LIVE],
        SessionPhase.LIVE: [SessionPhase.DRAINED],
        SessionPhase.DRAINED: [SessionPhase.LIVE],  # it has returned, and is told to drain once more
    },
)


class EpochPhase(Enum):
    """Phases of the epoch that a session has in flight."""

    NONE = "none"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTING = "committing"


EPOCH_PHASES = Transitions(
    [EpochPhase.NONE],
    {
        EpochPhase.NONE: [EpochPhase.PREPARING],
        EpochPhase.PREPARING: [
            EpochPhase.PREPARED,
            EpochPhase.COMMITTING,  # a straggler: the epoch is already complete
            EpochPhase.NONE,
        ],
        EpochPhase.PREPARED: [EpochPhase.COMMITTING, EpochPhase.NONE],
        EpochPhase.COMMITTING: [EpochPhase.NONE],
    },
)


class ShardPhase(Enum):
    """Phases of a shard. It has a slot in all phases except FREE. From RESTORING on it has a session,
    which may write.
    """

    FREE = "free"
    """It has no owner, and its last owner was fenced or has released it."""
    ASSIGNING = "assigning"
    """Its new slot is being journalled."""
    WAITING = "waiting"
    """It waits for its slot's next session, or for its slot to be fenced."""
    RESTORING = "restoring"
    RUNNING = "running"
    WARMING = "warming"
    """It runs on its present slot while its next slot sets up a warm copy."""
    RELEASING = "releasing"
    STOPPED = "stopped"
    """Its session owns it but doesn't run it: Kafka has torn a transaction, and a person has to choose how it
    continues.
    """


SHARD_PHASES = Transitions(
    [ShardPhase.FREE],
    {
        ShardPhase.FREE: [ShardPhase.ASSIGNING, ShardPhase.WAITING],  # the latter from the journal
        ShardPhase.ASSIGNING: [ShardPhase.WAITING],
        ShardPhase.WAITING: [ShardPhase.RESTORING, ShardPhase.RUNNING, ShardPhase.FREE],
        ShardPhase.RESTORING: [
            ShardPhase.RUNNING,
            ShardPhase.STOPPED,
            ShardPhase.RELEASING,
            ShardPhase.WAITING,
        ],
        ShardPhase.RUNNING: [
            ShardPhase.WARMING,
            ShardPhase.RELEASING,
            ShardPhase.STOPPED,
            ShardPhase.RESTORING,  # its session has returned without it
            ShardPhase.WAITING,
        ],
        ShardPhase.WARMING: [
            ShardPhase.RUNNING,
            ShardPhase.RELEASING,
            ShardPhase.RESTORING,
            ShardPhase.WAITING,
        ],
        ShardPhase.RELEASING: [ShardPhase.FREE, ShardPhase.WAITING],
        ShardPhase.STOPPED: [ShardPhase.RELEASING, ShardPhase.RESTORING, ShardPhase.WAITING],
    },
)

HELD_PHASES = (
    ShardPhase.RESTORING,
    ShardPhase.RUNNING,
    ShardPhase.WARMING,
    ShardPhase.RELEASING,
    ShardPhase.STOPPED,
)
"""A session was told to run the shard and hasn't released it."""


@dataclass(slots=True)
class Session:
    """One worker's membership.

    Attributes:
        peer: its connection.
        heard_ms: when it last sent a message. `spoken`: it has sent one in this session.
        welcomed_ms: when it was told of this session.
        suspect_until_ms: its connection closed; it counts as dead if it sends nothing until then.
        process_ended: its host says that its process is gone.
        unlinked_ms: since when messages to it may get lost: its connection closed, and it hasn't reported its
            shards since. None: nothing can have been lost.
        interval_ms: the time between its barriers. `due_ms` is when it may get the next one.
        epoch: the one in flight, or the last one. `committed_epoch` is the last one that it reported as
            committed.
        epoch_phase_ms: since when the epoch is in this phase.
        begun: the record that it has announced, but not survived yet.
        busy_ms: when it last reported that a handler is busy with one record. Until then it can't react to a
            barrier.
        failed: it reported that the job can't continue.
        orders: the number of the last `Assign` or `Revoke` that this leader sent it. `orders_heard` is the
            last one that it acknowledged. While others are outstanding, `unheard_ms` is when the first one
            was sent.
        released_number: the number of the last `Released` that it sent.
        leaving: its shards move away, and it gets none. `leaving_said`: its worker knows.
        dismissed: its worker was told to leave without waiting until its shards have moved.
        standbys_told: the shards of which it was last told to keep warm copies. None: it may not have heard.
        standbys: the warm copies that it reports.
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
    begun: messages.RecordBegun | None = None
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
    """A worker that asked for a session, but hasn't got one yet. `slot` is None until a slot is chosen."""

    peer: bytes
    hello: messages.Hello
    slot: int | None = None


@dataclass(slots=True)
class Slot:
    """A stable identity. It names the transactional ids of the worker that has it.

    `fenced`: its ids have no open transaction, and can't get one without a new session. While a slot has no
    session and isn't fenced, either a fence is running (`fencing`) or `fence_retry_ms` says when to retry.
    """

    number: int
    fenced: bool = True
    session: Session | None = None
    joiner: Joiner | None = None
    fencing: bool = False
    fence_retry_ms: float | None = None
    fence_failures: int = 0


@dataclass(slots=True)
class Deaths:
    """Sessions of one shard that were lost one after another, with nothing of it committed in between.

    Attributes:
        committed: the shard's committed offset in each input, by input number, at the first of these losses.
        times: how many sessions were lost since the last record was condemned.
        suspects: the records that were being processed, as far as sessions had announced them. The last one
            is counted; those before it are condemned, and come again as long as they aren't committed.
    """

    committed: Mapping[int, int]
    times: int
    suspects: tuple[messages.SuspectRecord, ...] = ()


@dataclass(slots=True)
class Shard:
    """Who owns a shard.

    Attributes:
        target: the slot to which it goes once it is released. A free shard comes from there and returns to
            it. None: the best slot.
        journalled_by: the write that holds its slot.
        standbys: the slots that should keep a warm copy of it.
        warm_until_ms: when it moves even if the target's copy isn't warm.
        stopped_by: why it is stopped, and what can be done.
    """

    identity: ShardId
    phase: ShardPhase = ShardPhase.FREE
    slot: int | None = None
    session: int = 0
    target: int | None = None
    journalled_by: int = 0
    standbys: tuple[int, ...] = ()
    warm_until_ms: float = 0.0
    stopped_by: Failure | None = None


@dataclass(slots=True)
class Counters:
    """What has happened since this coordinator became leader."""

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
    """What the coordinator is told about itself and the job when it becomes leader.

    Attributes:
        term: the number of its leadership, higher than all before.
        topology: the job.
        partitions: partition count of each stage's source topic, by topic name.
        settings: the resolved settings.
        expected_workers: the first assignment waits for this many, for a while.
        version: the version of fcluster. Workers must have the same.
        until_caught_up: stop once all records that were in the sources at the start are committed.
        run_end: where the run ends. The journal holds it. None: the run isn't bounded.
        snapshot_store: identity of the snapshot store that all workers must see. Empty: that of the first.
        highest_committed_epoch: the highest epoch in the group's committed offsets.
        cluster_id: the id of this leadership, as in the journal's leader record.
        topic_ids: ids of the topics that the job depends on, as far as they are known. The journal holds
            them.
    """

    term: int
    topology: Topology
    partitions: Mapping[str, int]
    settings: Settings
    expected_workers: int
    version: str
    until_caught_up: bool = False
    run_end: RunEnd | None = None
    snapshot_store: str = ""
    highest_committed_epoch: int = 0
    cluster_id: str = ""
    topic_ids: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
