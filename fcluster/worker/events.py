"""What the worker's core is told (events, past tense) and what it wants done (effects, imperative).

Responsible for: the two vocabularies of `WorkerCore`. The shell in `server` makes events of whatever happens
to it, carries effects out in their order, and feeds their results back as events. Must not hold logic. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fcluster.common import messages
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.engine.failure import Failure
from fcluster.worker.model import Condemned, RecordAt, StopRecord

# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection to the coordinator is up, for the first time or again."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A validated message of a coordinator."""

    message: messages.FromCoordinator


@dataclass(frozen=True, slots=True)
class ProducersOpened:
    """Both transactional producers are initialised; what their ids had open is aborted."""

    session: int


@dataclass(frozen=True, slots=True)
class ShardRestored:
    """The shard's state is exactly at its committed position (`offset` resolved if none was committed)."""

    session: int
    shard: ShardId
    position: CommittedPosition


@dataclass(frozen=True, slots=True)
class TransactionTorn:
    """Kafka has torn a transaction of a shard.

    `stopped`: the shard isn't restored; the user has to choose how it goes on. Otherwise the user has chosen,
    and `ShardRestored` follows, with a position that Kafka hasn't committed yet.
    """

    session: int
    shard: ShardId
    reason: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """A shard can't be restored. `fatal`: no worker could; otherwise trying anew may help."""

    session: int
    reason: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class RecordsProcessed:
    """A batch was processed in the open epoch; `shards` are those it touched.

    `newest`: the newest record, if `shards` is one shard and epochs are bounded by `pieces`.
    """

    shards: frozenset[ShardId]
    records: int
    backlog: bool
    newest: RecordAt | None = None


@dataclass(frozen=True, slots=True)
class EpochFlushed:
    """Outputs, deltas and offsets of `epoch` are acknowledged and pending in its transaction."""

    session: int
    epoch: int
    records: int
    prepare_ms: float


@dataclass(frozen=True, slots=True)
class EpochCommitted:
    """The transaction is committed. `positions` are the shards' new committed positions."""

    session: int
    epoch: int
    commit_ms: float
    positions: dict[ShardId, CommittedPosition]


@dataclass(frozen=True, slots=True)
class TransactionFailed:
    """A producer, a transaction or its outcome is lost. Why doesn't matter: the remedy is the same.

    `unexpected`: nothing that is known to pass by itself.
    """

    session: int
    reason: str
    unexpected: bool = False


@dataclass(frozen=True, slots=True)
class EpochFailed:
    """An epoch can't be committed because of what one of its records did: an output that Kafka refuses, a
    state that can't be kept.

    `record`: where the shell knows it already.
    """

    session: int
    failure: Failure
    record: RecordAt | None = None


@dataclass(frozen=True, slots=True)
class HandlerFailed:
    """A handler raised in the midst of a record, so the open epoch holds a part of that record's effects.

    `failure`: what the record is to be condemned with, if that is more than `reason`.
    """

    session: int
    shard: ShardId
    offset: int
    reason: str
    failure: Failure | None = None
    input: int = 0


@dataclass(frozen=True, slots=True)
class StopRecordReached:
    """The shard stands before a record that it can't process, and has processed nothing of it."""

    session: int
    shard: ShardId
    offset: int
    reason: str
    input: int = 0


@dataclass(frozen=True, slots=True)
class JobBroken:
    """Something that no restart mends: the job can't go on."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerBroken:
    """Something that keeps only this worker from going on: its disk is full, or fails."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The journal says that the run of the job in which this worker was started is over."""

    failed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class TerminationRequested:
    """The process was asked to leave in good order (SIGTERM): first its shards move away, warm.

    Asked again, it commits what it has processed and goes; a third time, it goes.
    """


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Connected
    | MessageReceived
    | ProducersOpened
    | ShardRestored
    | TransactionTorn
    | RestoreFailed
    | RecordsProcessed
    | EpochFlushed
    | EpochCommitted
    | TransactionFailed
    | EpochFailed
    | HandlerFailed
    | StopRecordReached
    | JobBroken
    | WorkerBroken
    | JobEnded
    | TerminationRequested
    | Tick
)

# --- effects ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the coordinator."""

    message: messages.FromWorker


@dataclass(frozen=True, slots=True)
class OpenProducers:
    """Create both producers of `slot` and initialise them; answer `ProducersOpened`.

    `internal_topics`: see `messages.Welcome`.
    """

    session: int
    slot: int
    internal_topics: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class DestroyProducers:
    """Destroy both producers at once, whatever they are doing; commit or abort nothing."""


@dataclass(frozen=True, slots=True)
class RestoreShards:
    """Read these shards' committed positions, restore exactly those; answer `ShardRestored` for each."""

    session: int
    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class KeepStandbys:
    """Keep warm copies of these shards of others, and of no others.

    One that is restored isn't a copy any more.
    """

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class StartReading:
    """Process the shard's records from its position on; not `stop_record`, if it is given.

    `condemned`: records that fail, by the rule of the step responsible.
    """

    shard: ShardId
    position: CommittedPosition
    stop_record: StopRecord | None
    condemned: tuple[Condemned, ...] = ()


@dataclass(frozen=True, slots=True)
class StopReading:
    """Process no further record of these shards, those already fetched included."""

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class DropLayers:
    """Forget all that is not known to be committed: open and prepared layers of all shards."""


@dataclass(frozen=True, slots=True)
class CloseShards:
    """Close the stores of these shards. They belong to somebody else from now on."""

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class PrepareEpoch:
    """Freeze the open layers as `epoch`; flush outputs, deltas and offsets; answer `EpochFlushed`."""

    session: int
    epoch: int
    shards: frozenset[ShardId]


@dataclass(frozen=True, slots=True)
class CommitEpoch:
    """Commit the transaction of `epoch`, then apply its layers; answer `EpochCommitted`."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True)
class PauseReading:
    """Hold all shards still: the open epoch is as large as it may be, or nobody is heard who could have it
    committed."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResumeReading:
    """Go on after `PauseReading`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process.

    `code` 0: in good order; 3: the job failed; 1: this worker can't go on; 4: it was drained.
    """

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the log; `level` as in the standard library's logging."""

    level: str
    text: str


Effect = (
    Send
    | OpenProducers
    | DestroyProducers
    | RestoreShards
    | KeepStandbys
    | StartReading
    | StopReading
    | DropLayers
    | CloseShards
    | PrepareEpoch
    | CommitEpoch
    | PauseReading
    | ResumeReading
    | Exit
    | Log
)
