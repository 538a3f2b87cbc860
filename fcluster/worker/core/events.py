"""The inputs of the worker's core (events, past tense) and its outputs (effects, imperative).

Responsible for: these types. The shell in `server` turns what happens into events, carries out effects in
order, and feeds their results back as events. Must not hold logic. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.engine.failure import Condemnation
from fcluster.wire import messages
from fcluster.worker.core.model import Condemned, RecordAt, StopRecord

# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection to the coordinator is open, for the first time or again."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A valid message from a coordinator."""

    message: messages.FromCoordinator


@dataclass(frozen=True, slots=True)
class ProducersOpened:
    """Both transactional producers are initialised. Open transactions of their ids are aborted."""

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

    `stopped`: the shard isn't restored; the user has to choose how it continues. Otherwise the user has
    chosen, and `ShardRestored` follows, with a position that Kafka hasn't committed yet.
    """

    session: int
    shard: ShardId
    failure: Failure
    stopped: bool


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """A shard can't be restored. `fatal`: no worker could; otherwise a retry may help."""

    session: int
    failure: Failure
    fatal: bool


@dataclass(frozen=True, slots=True)
class RecordsProcessed:
    """A batch was processed in the open epoch. `shards` are those that it touched.

    `newest`: the newest record, if `shards` is one shard and epochs are limited by `pieces`.
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
    """The transaction was committed. `positions` are the shards' new committed positions. `letter`: the error
    of the worker's last dead letter, if these are counted.
    """

    session: int
    epoch: int
    commit_ms: float
    positions: dict[ShardId, CommittedPosition]
    letter: str = ""


@dataclass(frozen=True, slots=True)
class TransactionFailed:
    """A producer, a transaction or its outcome is lost.

    `unexpected`: the reason isn't known to be temporary. `abortable`: the transaction isn't committed, and
    its producer can abort it and go on. So the session can go on, too.
    """

    session: int
    reason: str
    unexpected: bool = False
    abortable: bool = False


@dataclass(frozen=True, slots=True)
class EpochsAborted:
    """The transactions of both producers are aborted, and everything committed is in the stores."""

    session: int


@dataclass(frozen=True, slots=True)
class EpochFailed:
    """An epoch can't be committed because of one of its records: an output that Kafka refuses, or state that
    can't be stored.

    `record`: the record, if the shell already knows it.
    """

    session: int
    condemnation: Condemnation
    record: RecordAt | None = None


@dataclass(frozen=True, slots=True)
class HandlerFailed:
    """A handler raised in the middle of a record, so the open epoch contains part of that record's effects.

    `condemnation`: the record's condemnation, if it says more than `failure`.
    """

    session: int
    shard: ShardId
    offset: int
    failure: Failure
    condemnation: Condemnation | None = None
    input: int = 0


@dataclass(frozen=True, slots=True)
class StopRecordReached:
    """The shard has reached a record that it can't process, and has processed no part of it."""

    session: int
    shard: ShardId
    offset: int
    failure: Failure
    input: int = 0


@dataclass(frozen=True, slots=True)
class JobBroken:
    """A problem that no restart fixes: the job can't continue."""

    session: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class WorkerBroken:
    """A problem of this worker alone: its disk is full, or fails."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The journal says that the run of the job for which this worker was started is over. `failure`: the job
    can't continue.
    """

    reason: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class TerminationRequested:
    """The process was asked to leave cleanly (SIGTERM): its shards first move to warm copies.

    On a second request it commits what it has processed and exits. On a third one it exits at once.
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
    | EpochsAborted
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
    """Create both producers of `slot` and initialise them. Answer `ProducersOpened`.

    `internal_topics`: see `messages.Welcome`.
    """

    session: int
    slot: int
    internal_topics: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class DestroyProducers:
    """Destroy both producers at once, whatever they are doing. Commit or abort nothing."""


@dataclass(frozen=True, slots=True)
class RestoreShards:
    """Read the committed positions of these shards and restore exactly those. Answer `ShardRestored` for
    each.

    `committed`: offsets that are known to be committed. An answer with lower ones comes from a broker that is
    cut off.
    """

    session: int
    shards: tuple[ShardId, ...]
    committed: tuple[messages.CommittedOffset, ...] = ()


@dataclass(frozen=True, slots=True)
class KeepStandbys:
    """Keep warm copies of these shards, which other workers own, and of no others.

    A shard that is being restored is no longer a copy.
    """

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class StartReading:
    """Process the shard's records, starting at its position, but not `stop_record`, if one is given.

    `condemned`: records that fail, by the rule of the responsible step. `announced`: the records that are
    announced before they are processed, because one of them may end the process: a range for each input.
    `ends`: in a bounded run, the end of each input that has one, by the input's number.
    """

    shard: ShardId
    position: CommittedPosition
    stop_record: StopRecord | None
    condemned: tuple[Condemned, ...] = ()
    announced: tuple[range, ...] = ()
    ends: Mapping[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True, slots=True)
class EndInput:
    """A shard that is being read ends there in one of its inputs."""

    end: messages.EndOffset


@dataclass(frozen=True, slots=True)
class StopReading:
    """Process no more records of these shards, including those already fetched."""

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class DropLayers:
    """Drop everything that isn't known to be committed: open and prepared layers of all shards."""


@dataclass(frozen=True, slots=True)
class AbortEpochs:
    """Abort the transactions of both producers, and write everything committed to the stores. Answer
    `EpochsAborted`.
    """

    session: int


@dataclass(frozen=True, slots=True)
class RewindShards:
    """Drop everything of these shards that isn't committed. They aren't read, and no epoch is under way."""

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class CloseShards:
    """Close the stores of these shards. Another worker owns them from now on."""

    shards: tuple[ShardId, ...]


@dataclass(frozen=True, slots=True)
class PrepareEpoch:
    """Freeze the open layers as `epoch`, then flush outputs, deltas and offsets. Answer `EpochFlushed`."""

    session: int
    epoch: int
    shards: frozenset[ShardId]


@dataclass(frozen=True, slots=True)
class CommitEpoch:
    """Commit the transaction of `epoch`, then apply its layers. Answer `EpochCommitted`."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True)
class PauseReading:
    """Pause all shards: the open epoch has reached its limit, or there is no coordinator that could let it
    commit.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class ResumeReading:
    """Continue after `PauseReading`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process.

    `code` 0: it left cleanly; 3: the job failed; 1: this worker can't continue; 4: it was drained.
    """

    code: int
    reason: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the log. `level` is as in the standard library's logging."""

    level: str
    text: str


Effect = (
    Send
    | OpenProducers
    | DestroyProducers
    | RestoreShards
    | KeepStandbys
    | StartReading
    | EndInput
    | StopReading
    | DropLayers
    | AbortEpochs
    | RewindShards
    | CloseShards
    | PrepareEpoch
    | CommitEpoch
    | PauseReading
    | ResumeReading
    | Exit
    | Log
)
