"""The data types of the worker's core: its phases, shards, epochs, identity and limits.

Responsible for: these types. The parts of the core change them; `WorkerCore.invariants` checks the rules
between them. Must not hold logic. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.transitions import Transitions
from fcluster.engine.failure import Condemnation


class Phase(Enum):
    """The worker's phases."""

    JOINING = "joining"
    """It has asked for a session, or is about to."""
    STARTING = "starting"
    """It has a session; its producers are being initialised."""
    ACTIVE = "active"
    DRAINING = "draining"
    """It processes no more records, and commits those that it has processed."""
    DRAINED = "drained"
    STOPPED = "stopped"


PHASES = Transitions(
    [Phase.JOINING],
    {
        Phase.JOINING: [Phase.STARTING, Phase.STOPPED],
        Phase.STARTING: [Phase.ACTIVE, Phase.DRAINING, Phase.JOINING, Phase.STOPPED],
        Phase.ACTIVE: [Phase.DRAINING, Phase.JOINING, Phase.STOPPED],
        Phase.DRAINING: [Phase.DRAINED, Phase.JOINING, Phase.STOPPED],
        Phase.DRAINED: [Phase.JOINING, Phase.STOPPED],
        Phase.STOPPED: [],
    },
)


class ShardPhase(Enum):
    """Phases of a shard that this worker owns."""

    RESTORING = "restoring"
    RESTORED = "restored"
    """Restored, but the producers aren't ready yet."""
    RUNNING = "running"
    RELEASING = "releasing"
    """Revoked: it processes no more records. Its last ones wait for their commit, or its restore has to end
    first.
    """
    BLOCKED = "blocked"
    """It has reached a record that it can't process."""
    STOPPED = "stopped"
    """Kafka has torn its last transaction. It doesn't run until a person has chosen how it continues."""


SHARD_PHASES = Transitions(
    [ShardPhase.RESTORING],
    {
        ShardPhase.RESTORING: [ShardPhase.RESTORED, ShardPhase.STOPPED, ShardPhase.RELEASING],
        ShardPhase.RESTORED: [ShardPhase.RUNNING, ShardPhase.RELEASING],
        ShardPhase.RUNNING: [ShardPhase.BLOCKED, ShardPhase.RELEASING, ShardPhase.RESTORED],
        ShardPhase.BLOCKED: [ShardPhase.RELEASING, ShardPhase.RESTORED],
        ShardPhase.STOPPED: [ShardPhase.RELEASING],
        ShardPhase.RELEASING: [],
    },
)


class EpochPhase(Enum):
    """Phases of the epoch in flight."""

    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTING = "committing"


EPOCH_PHASES = Transitions(
    [EpochPhase.PREPARING],
    {
        EpochPhase.PREPARING: [EpochPhase.PREPARED],
        EpochPhase.PREPARED: [EpochPhase.COMMITTING],
        EpochPhase.COMMITTING: [],
    },
)


class RecordAt(NamedTuple):
    """A record of a shard: the `offset` in the shard's input with the number `input`.

    `timer`: set if this is a timer and not a record: the name of its step. It fires before the record at that
    offset.
    """

    shard: ShardId
    offset: int
    input: int = 0
    timer: str = ""


class Condemned(NamedTuple):
    """A record that fails when it comes."""

    offset: int
    condemnation: Condemnation
    input: int = 0


@dataclass(frozen=True, slots=True)
class StopRecord:
    """A record that can't be processed: its shard stops before it."""

    offset: int
    failure: Failure
    input: int = 0


@dataclass(slots=True)
class OwnedShard:
    """A shard of this worker.

    Attributes:
        position: the committed position. None until it is restored.
        restoring: a restore of it is running, whether or not it is still wanted.
        unsettled: Kafka hasn't committed its position yet: it continues after a torn transaction.
        stopped_by: why it is STOPPED.
    """

    phase: ShardPhase
    position: CommittedPosition | None = None
    restoring: bool = False
    unsettled: bool = False
    stopped_by: Failure | None = None


@dataclass(slots=True)
class InFlight:
    """The epoch between its barrier and its commit. `shards` are the shards with changes in it.

    `records` and `lone`: see `OpenEpoch`.
    """

    epoch: int
    phase: EpochPhase
    shards: frozenset[ShardId]
    records: int = 0
    lone: RecordAt | None = None


@dataclass(slots=True)
class OpenEpoch:
    """The records processed since the last barrier. `lone`: the only one, if that is known."""

    shards: set[ShardId] = field(default_factory=lambda: set[ShardId]())
    records: int = 0
    lone: RecordAt | None = None
    reported: bool = False

    @property
    def dirty(self) -> bool:
        """Whether there is something to commit."""
        return bool(self.shards)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the worker is. It doesn't change while the process lives."""

    worker: str
    host: str
    pid: int
    wanted_slot: int
    topology: str
    snapshot_store: str
    version: str
    process_space: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The settings that the protocol needs."""

    epoch_records_max: int
    coordinator_loss_ms: int
    offset_refresh_ms: int
    hello_retry_ms: int = 1000
    epoch_failures_max: int = 10
    leave_timeout_ms: int = 20_000
    """How long a leaving worker waits for its shards to move away."""
    last_commit_timeout_ms: int = 30_000
    """How long it waits for the last commit after that."""
    leader_patience_ms: int = 3_000
    """How long a leaving worker waits for a coordinator. It can't commit without one."""
