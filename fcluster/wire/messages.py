"""The control messages between coordinator, workers, standby coordinators and admin clients.

Responsible for: their types, their encoding (a version byte, then MessagePack), and their validation on
receipt. Rule: nothing is ever unpickled. A frame is either one of the structs below, with fields of the
declared types, or `decode` raises `MalformedMessageError` (invariant 18).

Every message of the coordinator carries its `term`; workers reject messages of an older term. Every message
about work carries the worker's `session`. A session begins with a `Welcome` and ends when the worker is
declared dead, is fenced, or sends another `Hello`. A worker initialises its transactional producers exactly
once in a session, and commits only on a `Complete` of that same session. So a worker that was fenced can't
come back to life by initialising its producers again.

`Assign`, `Revoke` and `Released` transfer shards, so they must not be carried out twice: a repeated one that
arrives after later messages would give a shard two owners. Their senders number them, increasing within a
session (and a term), and a number that isn't newer than the last one is dropped. All other messages name the
epoch or session that they are about, and have no effect once that is over.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from fcluster.common.failures import Failure, bounded_text
from fcluster.common.ids import ShardId

PROTOCOL_VERSION = 1

AGENT_WORKERS_MAX = 1_000
"""The most workers of one agent. A typo in the number must not bring a host down."""

_M = TypeVar("_M")

REASON_CHARACTERS_MAX = 8_000
"""The longest reason that is sent to other processes."""

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""Larger frames are dropped by the sockets (ZMQ_MAXMSGSIZE) and rejected by `decode`."""


# Limits that no honest sender exceeds. Without them, an absurd number of the right type would get into the
# journal, into committed offsets or into the clock of an epoch.
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Session = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Slot = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
_Offset = Annotated[int, msgspec.Meta(ge=-1001, le=2**63 - 1)]  # -1001 is Kafka's own value for "none"
_InputNumber = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
TIME_MS_MAX = 2**63 - 1
_Timestamp = Annotated[int, msgspec.Meta(ge=-(2**63), le=TIME_MS_MAX)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
# Names are shown on terminals and in logs, so they must not move the cursor or start a new line.
_PRINTABLE = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
_Name = Annotated[str, msgspec.Meta(max_length=255, pattern=_PRINTABLE)]
_TopicName = Annotated[str, msgspec.Meta(max_length=249, pattern=_PRINTABLE)]
_Address = Annotated[str, msgspec.Meta(max_length=4096, pattern=_PRINTABLE)]
# Reasons, which may contain text from a user. `encode` shortens long ones.
_Reason = Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
_Workers = Annotated[int, msgspec.Meta(ge=0, le=AGENT_WORKERS_MAX)]


class MalformedMessageError(Exception):
    """A frame that is not a message of this protocol. It is counted and dropped, never fatal."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all control messages. The subclass's name is sent as its tag."""


class TimeStatus(msgspec.Struct, frozen=True, array_like=True):
    """The event time of a shard (`now_ms`), and the part that one of its inputs has in it.

    `watermark_ms` is the input's watermark, None if it hasn't begun. `idle`: the shard doesn't wait for this
    input. For a repartition topic, `slowest` is the number of the upstream shard that holds it back (-1:
    none), and `idle_upstream` is how many are idle. `wall_ms`: the worker's own clock when it sent this; 0:
    unknown. `timers`: how many are set in the shard; -1: its handlers have none, or it isn't known. `ended`:
    event time has ended, everything that waited for it has fired, and all of that is committed. `ahead_ms`:
    the shard isn't read on, because it is so far ahead of the partition `ahead_of`; 0: that one hasn't begun;
    -1: it is read.
    """

    now_ms: _Timestamp | None
    watermark_ms: _Timestamp | None
    idle: bool
    slowest: _Slot = -1
    idle_upstream: _Number = 0
    wall_ms: _Number = 0
    timers: _Offset = -1
    ended: bool = False
    ahead_ms: _Offset = -1
    ahead_of: _Name = ""


class SlowestInput(msgspec.Struct, frozen=True, array_like=True):
    """The partition whose event time is the farthest behind, of those that a worker reads in a group of
    stages (see `graph.drift`). Others wait for it.

    `time_ms` is its watermark; None: it hasn't begun.
    """

    group: _Name
    time_ms: _Timestamp | None
    partition: _Name


class ShardStatus(msgspec.Struct, frozen=True, array_like=True):
    """The progress of one of a worker's shards in one of its inputs; `input` is the input's number.

    `position` is the next offset to read; everything before it is processed (including control records).
    `committed` is the committed offset. `end` is the last known end of the source partition (the last stable
    offset for read-committed sources), -1 if unknown. `dirty` says that records up to `position` are not all
    committed yet. `time`: None if the job doesn't use event time. `letters`: with the first input, how many
    dead letters the shard has committed; see `letter_counts`.
    """

    shard: ShardId
    position: _Offset
    committed: _Offset
    end: _Offset
    dirty: bool
    epoch: _Number
    input: _InputNumber = 0
    time: TimeStatus | None = None
    letters: Annotated[str, msgspec.Meta(max_length=1_000)] = ""


class StandbyStatus(msgspec.Struct, frozen=True, array_like=True):
    """How far a worker's warm copy of another worker's shard has come.

    `state_epoch` is the last epoch whose changes it has. `lag` is how many offsets it is behind the committed
    end of the changelog, -1 if unknown (it is being set up, or can't be).
    """

    shard: ShardId
    state_epoch: _Number
    lag: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]


class RunningRecord(msgspec.Struct, frozen=True, array_like=True):
    """The record that a handler has been processing for at least `running_ms`."""

    topic: _Name
    partition: _Number
    offset: _Number
    running_ms: _Number


OVERDUE_TIMES_MAX = 2
"""A record at which handlers have hung this often is condemned."""
SUSPECT_TIMES_MAX = 3
"""A record at which processes have ended this often is condemned."""


class OverdueRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record at which a handler has hung longer than `record.timeout.ms`, `times` in a row.

    `step`: the handler's name. Empty if it isn't known.
    """

    shard: ShardId
    offset: _Number
    times: _Number
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
    step: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    input: _InputNumber = 0


class CommittedOffset(msgspec.Struct, frozen=True, array_like=True):
    """An offset that a worker has reported as committed, for an input of `shard`."""

    shard: ShardId
    offset: _Offset
    input: _InputNumber = 0


class EndOffset(msgspec.Struct, frozen=True, array_like=True):
    """The end of a bounded run in an input of `shard`: the first offset that it doesn't read."""

    shard: ShardId
    offset: _Offset
    input: _InputNumber = 0


class SuspectRecord(msgspec.Struct, frozen=True, array_like=True):
    """The record of `shard` at which worker processes have ended, `times` in a row.

    `step` began last. `record` describes the record for people. With `times` 0 it isn't known yet which one
    it is: processes have ended, and nothing of the shard was committed in between. If `span` is above 1, it
    is one of those from `offset` on, as many as `span` says.
    """

    shard: ShardId
    offset: _Number = 0
    times: _Number = 0
    step: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    record: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    input: _InputNumber = 0
    span: _Number = 1


class PhaseTimes(msgspec.Struct, frozen=True):
    """How long a phase of a worker's newest epochs took; see `worker.epoch_trace`."""

    name: _Name
    ms_p50: _Milliseconds
    ms_p99: _Milliseconds


class WorkerStats(msgspec.Struct, frozen=True):
    """What a heartbeat reports about a worker. Rates and totals count from the start of the process.

    While shards are being restored (`restoring` of them), `restore_bytes` says how much has been read for
    them; `restore_bytes_left` and `restore_ms_left` estimate the rest. -1 is unknown. `record` is a record
    that a handler has been processing for some time, if there is one; then the worker can't react to a
    barrier. `kafka_wait` says what in Kafka the worker's epochs wait for, and `kafka_wait_ms` for how long.
    They are empty and 0 if that is no longer than usual. `calls_wait` says which calls to other services hold
    records up. It is empty if that is no longer than usual. `table_waits` are the shards that process no
    records because they wait for global tables. `slowest`: an entry for each group of stages with a
    `max_drift`.
    """

    records_in: _Number = 0
    records_out: _Number = 0
    records_skipped: _Number = 0
    records_late: _Number = 0
    epochs_committed: _Number = 0
    commit_latency_ms_p50: _Milliseconds = 0.0
    commit_latency_ms_p99: _Milliseconds = 0.0
    restoring: _Number = 0
    resident_bytes: _Number = 0
    snapshot_epoch_min: Annotated[int, msgspec.Meta(ge=-1, le=2**53)] = -1
    shards: list[ShardStatus] = []
    standbys: list[StandbyStatus] = []
    restore_bytes: _Number = 0
    restore_bytes_left: Annotated[int, msgspec.Meta(ge=-1, le=2**53)] = -1
    restore_ms_left: Annotated[int, msgspec.Meta(ge=-1, le=2**53)] = -1
    record: RunningRecord | None = None
    kafka_wait: _Name = ""
    kafka_wait_ms: _Number = 0
    epoch_phases: list[PhaseTimes] = []
    calls_wait: _Name = ""
    table_waits: list[ShardId] = []
    slowest: list[SlowestInput] = []


# --- worker to coordinator ---------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Join, or join again after a reset. `worker` is random for each process.

    `session` is 0 for a new session. A worker that lost its coordinator, but not its session, names its
    session. The coordinator then answers with an adopting `Welcome` for that session, or with `Evicted`.
    `slot` is the wanted slot (-1: any). `epoch` is the highest epoch that the worker knows. `prepared_epoch`
    is one that it has prepared and whose outcome it doesn't know yet (0: none). `in_flight_epoch` is one that
    it has frozen and not yet committed, prepared or not (0: none). `process_space` names the space in which
    `pid` is unique (see `processes.process_space`), empty if unknown. `leaving` has the meaning of `Leaving`.
    Messages may have been lost with the connection, so this one has everything that the coordinator needs:
    the worker doesn't hold a shard that is not in `owned`.

    `term` is the newest term in which a coordinator has sent a message to this process (0: none yet). A
    receiver with an older term has been deposed, or is being lied to. `draining`: the worker processes no
    more records because it was told to `Drain`.
    """

    worker: _Name
    host: _Name
    pid: _Number
    slot: _Slot
    session: _Session
    owned: list[ShardId]
    epoch: _Number
    prepared_epoch: _Number
    dirty: bool
    topology: _Name
    snapshot_store: _Address
    version: _Name
    in_flight_epoch: _Number = 0
    process_space: _Name = ""
    leaving: bool = False
    term: _Number = 0
    draining: bool = False


class Heartbeat(Message, frozen=True):
    """The worker is alive. Sent every `heartbeat.interval.ms`.

    `orders_heard`: the number of the last `Assign` or `Revoke` of this term.
    """

    session: _Session
    stats: WorkerStats
    orders_heard: _Number


class Dirty(Message, frozen=True):
    """The worker has its first uncommitted record since its last barrier: it asks for an epoch."""

    session: _Session
    backlog: bool


class Prepared(Message, frozen=True):
    """Outputs, deltas and offsets of `epoch` are flushed and pending in the worker's transaction."""

    session: _Session
    epoch: _Number
    records: _Number
    prepare_ms: _Milliseconds
    backlog: bool


class Committed(Message, frozen=True):
    """The worker's transaction for `epoch` is committed. `dirty`: it already has records of the next epoch.
    `letter`: the error of its last dead letter, if these are counted.
    """

    session: _Session
    epoch: _Number
    commit_ms: _Milliseconds
    dirty: bool
    shards: list[ShardStatus]
    letter: Annotated[str, msgspec.Meta(max_length=1_000)] = ""


class ShardsRunning(Message, frozen=True):
    """These shards are restored, checked against their committed epoch, and process records."""

    session: _Session
    shards: list[ShardStatus]


class TornTransaction(Message, frozen=True):
    """Kafka has torn a transaction of this shard. `failure` says what happened, and what a person can do.

    `stopped`: the shard doesn't run, and the worker holds it until a person has chosen how it continues. This
    is repeated to a new leader. If not stopped, the shard continues in the way that was chosen.
    """

    session: _Session
    shard: ShardId
    stopped: bool
    failure: Failure


class Released(Message, frozen=True):
    """These shards' last epoch is committed (or they had nothing to commit), and the worker has released
    them.
    """

    session: _Session
    shards: list[ShardId]
    number: _Number


class Drained(Message, frozen=True):
    """Everything that the worker had processed is committed, and it processes no more records."""

    session: _Session


class WorkerFailed(Message, frozen=True):
    """The job can't continue on any worker: a bad record, incompatible state, a gap in a source."""

    session: _Session
    failure: Failure


class RecordOverdue(Message, frozen=True):
    """A handler has hung at the record at `offset` longer than `record.timeout.ms`, so the worker's process
    ends now.

    This is the last message of that process. The shard's next owner learns it with `Assign`.
    """

    session: _Session
    shard: ShardId
    offset: _Number
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
    step: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    input: _InputNumber = 0


class RecordBegun(Message, frozen=True):
    """`step` begins to process the record at `offset`, and may end the process. Sent only if a
    `SuspectRecord` gives reason to. The worker waits a moment for the answer, `RecordNoted`. If `span` is
    above 1, it is about the records from `offset` on, as many as `span` says, until another message follows.
    """

    session: _Session
    shard: ShardId
    offset: _Number
    step: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    record: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    input: _InputNumber = 0
    span: _Number = 1


class RecordEnded(Message, frozen=True):
    """The process has survived the record that `RecordBegun` was about, whatever the result."""

    session: _Session


class Leaving(Message, frozen=True):
    """The worker was asked to leave: its shards have to move away. It keeps processing until it has none.

    Repeated until the worker is gone. A new leader, or the same one after a lost connection, learns it from
    `Hello`.
    """

    session: _Session


class Goodbye(Message, frozen=True):
    """The worker leaves cleanly: it has nothing uncommitted and its producers are closed."""

    session: _Session


# --- agents ---------------------------------------------------------------------------------------------


class AgentReport(Message, frozen=True):
    """What an agent reports about itself, every `heartbeat.interval.ms` and when it changes.

    An agent runs workers on a host, and connects with a worker's key. `agent` is random for each process.
    `running` are the process ids of its workers, and `target` is their intended number. `taken_term` and
    `taken_order` identify the last `AgentOrder` that it confirmed. Answered with `AgentOrder`, or with
    `Shutdown` when the job ends. `slots_wanted`: it asks for the slots of its workers.
    """

    agent: _Name
    job: _Name
    host: _Name
    pid: _Number
    target: _Workers
    running: Annotated[list[_Number], msgspec.Meta(max_length=2 * AGENT_WORKERS_MAX)]
    taken_term: _Number
    taken_order: _Number
    slots_wanted: bool = False


class AgentOrder(Message, frozen=True):
    """The coordinator is alive, and orders the agent to run `target` workers, unless `order` is 0.

    Repeated until the agent confirms it, and carried out once: orders increase within a term. `slots` are the
    slots of the agent's workers by process id, if it asked for them.
    """

    term: _Number
    order: _Number
    target: _Workers
    slots: dict[int, int] = {}


# --- coordinator to worker ---------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """Opens session `session` on `slot`, or adopts it (`adopted`) under a new leader's term.

    It is journalled before it is sent. Unless the session is adopted, the slot's transactional ids were
    fenced before that, the worker initialises its producers, and it owns no shard yet.

    `internal_topics` has the names of internal topics that differ from those in the job's topology, because
    they are older than the present naming scheme (see `topology.former_names`).
    """

    term: _Number
    session: _Session
    slot: _Slot
    epoch: _Number
    adopted: bool
    internal_topics: dict[_TopicName, _TopicName] = {}


class Refused(Message, frozen=True):
    """The worker can't join. `retry` says whether trying again later may help.

    The reason stays a text: processes of another version must be able to read this message, because it tells
    them that their version doesn't fit.
    """

    term: _Number
    reason: _Reason
    retry: bool


class Evicted(Message, frozen=True):
    """`session` is over: drop everything that belongs to it, then join as a new worker."""

    term: _Number
    session: _Session


class Assign(Message, frozen=True):
    """Restore and run these shards. Their previous owner released them or was fenced.

    `overdue`: the records of these shards at which a handler has hung. `suspects`: the shards at which
    processes have ended again and again. `committed`: offsets that are known to be committed for these
    shards; later ones may be committed too. A broker that is cut off from the others may answer with earlier
    ones. `stages`: how many shards each stage of the job has; empty if the job uses neither event time nor
    global tables. `ends`: in a bounded run, where these shards stop reading, as far as that is known.
    `job_start`: the number of the job's start, the same for all workers; 0 if the job has no global tables
    and no limit on dead letters.
    """

    term: _Number
    session: _Session
    shards: list[ShardId]
    number: _Number
    overdue: list[OverdueRecord] = []
    suspects: list[SuspectRecord] = []
    committed: list[CommittedOffset] = []
    stages: dict[_TopicName, _Number] = {}
    ends: list[EndOffset] = []
    job_start: _Number = 0


class Revoke(Message, frozen=True):
    """Stop reading these shards, commit what was processed, then answer `Released`."""

    term: _Number
    session: _Session
    shards: list[ShardId]
    number: _Number


class Standby(Message, frozen=True):
    """Keep warm copies of these shards, which other workers own, and of no others.

    It always has the whole set, so it can be repeated. It ignores a shard that the worker owns when this
    arrives: an `Assign` makes a warm copy the worker's own.
    """

    term: _Number
    session: _Session
    shards: list[ShardId]


class Barrier(Message, frozen=True):
    """Freeze the open epoch under the number `epoch`, flush it, and answer `Prepared`.

    A worker with nothing open answers `Prepared` with 0 records at once and commits nothing.
    """

    term: _Number
    session: _Session
    epoch: _Number


class Complete(Message, frozen=True):
    """`epoch` is declared complete: commit it."""

    term: _Number
    session: _Session
    epoch: _Number


class Drain(Message, frozen=True):
    """Stop processing, commit what was processed, answer `Drained`, and wait for `Shutdown`."""

    term: _Number
    session: _Session


class Leave(Message, frozen=True):
    """An operator drains this worker: answer `Leaving`, and don't come back."""

    term: _Number
    session: _Session


class Dismiss(Message, frozen=True):
    """To a worker that is leaving: no other worker can take its shards, so commit what was processed and
    exit.
    """

    term: _Number
    session: _Session


class Shutdown(Message, frozen=True):
    """Exit: the job ends, for this `reason`. `failure`: set if the job can't continue."""

    term: _Number
    session: _Session
    reason: _Reason
    failure: Failure | None = None


class HeartbeatAck(Message, frozen=True):
    """The coordinator is alive. A worker that misses this looks for a new leader.

    `ends`: in a bounded run, the ends of inputs that became known after these shards were assigned.
    `slowest`: of the partitions that other workers read, the slowest in each group of stages with a
    `max_drift`.
    """

    term: _Number
    session: _Session
    ends: list[EndOffset] = []
    slowest: list[SlowestInput] = []


class RecordNoted(Message, frozen=True):
    """The coordinator knows what `RecordBegun` said: if the process ends now, it is known which record it was
    processing.
    """

    term: _Number
    session: _Session
    shard: ShardId
    offset: _Number


# --- admin ---------------------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True):
    """Ask for the coordinator's view of the cluster."""


class StatusReply(Message, frozen=True):
    """`status` is the JSON document that `fcluster status --json` prints."""

    term: _Number
    status: msgspec.Raw


class StopRequest(Message, frozen=True):
    """Drain all workers, then stop the job. Answered with `StopReply` once it is draining."""


class StopReply(Message, frozen=True):
    """The job is draining."""

    term: _Number


class DrainRequest(Message, frozen=True):
    """Let one worker leave: `worker` is its slot, its id, or HOST:PID. Answered with `DrainReply`.

    May be repeated. The status shows whether the worker is gone.
    """

    worker: _Name


class DrainReply(Message, frozen=True):
    """That worker is leaving. `others` workers remain that can take its shards."""

    term: _Number
    slot: _Slot
    worker: _Name
    host: _Name
    pid: _Number
    others: _Number


class ScaleRequest(Message, frozen=True):
    """Run `total` workers, spread over all agents; or, if that is -1, the given number at each of `places`.

    A place is an agent's host, HOST:PID, or its id. Answered with `ScaleReply`.
    """

    total: Annotated[int, msgspec.Meta(ge=-1, le=1_000_000)] = -1
    places: Annotated[dict[_Name, _Workers], msgspec.Meta(max_length=1_000)] = {}


class AgentTarget(msgspec.Struct, frozen=True, array_like=True):
    """How many workers an agent should run."""

    agent: _Name
    host: _Name
    pid: _Number
    target: _Workers


class ScaleReply(Message, frozen=True):
    """The orders to the agents. The status shows whether they have carried them out."""

    term: _Number
    targets: list[AgentTarget]


# --- standby coordinators ------------------------------------------------------------------------------


class LeaderCheck(Message, frozen=True):
    """Ask whether the leader is alive. `standby` names the sender, for people to read. Answered with
    `LeaderAlive`.

    `leaves`: this standby will no longer take over. Then there is no answer.
    """

    standby: _Name
    leaves: bool = False


class LeaderAlive(Message, frozen=True):
    """`cluster_id` is that of the leader's record in the journal. `rank` is the standby's place in the order
    of takeover, from 0.

    `resigns`: the leader asks this standby to take over now. It keeps leading until that has happened.
    """

    term: _Number
    cluster_id: _Name
    rank: _Number
    resigns: bool = False


FromWorker = (
    Hello
    | Heartbeat
    | Dirty
    | Prepared
    | Committed
    | ShardsRunning
    | TornTransaction
    | Released
    | Drained
    | WorkerFailed
    | RecordOverdue
    | RecordBegun
    | RecordEnded
    | Leaving
    | Goodbye
)
FromAgent = AgentReport
FromAdmin = StatusRequest | StopRequest | DrainRequest | ScaleRequest
FromStandby = LeaderCheck
ToWorker = (
    Welcome
    | Refused
    | Evicted
    | Assign
    | Revoke
    | Standby
    | Barrier
    | Complete
    | Drain
    | Leave
    | Dismiss
    | Shutdown
    | HeartbeatAck
    | RecordNoted
)
ToAgent = AgentOrder | Shutdown | Refused
ToAdmin = StatusReply | StopReply | DrainReply | ScaleReply | Refused
ToStandby = LeaderAlive

ToCoordinator = FromWorker | FromAgent | FromAdmin | FromStandby
FromCoordinator = ToWorker | ToAgent | ToAdmin | ToStandby

_encoder = msgspec.msgpack.Encoder()
_to_coordinator = msgspec.msgpack.Decoder(ToCoordinator)
_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator)
_VERSION_BYTE = bytes([PROTOCOL_VERSION])


def encode(message: Message) -> bytes:
    """The frame for `message`: one version byte, then MessagePack.

    Reasons are shortened and made printable: a user's text must never keep a message from being sent or read.
    """
    return _VERSION_BYTE + _encoder.encode(_fitted(message))


_WITH_TEXTS: Final = (RecordOverdue, Refused, Shutdown, WorkerFailed, TornTransaction)


def _fitted(message: _M) -> _M:
    """The message with reasons and failures that are printable and not too long."""
    if not isinstance(message, _WITH_TEXTS):
        return message  # nearly all of them
    if isinstance(message, RecordOverdue | Refused | Shutdown):
        reason = bounded_text(message.reason, REASON_CHARACTERS_MAX)
        if reason != message.reason:
            message = msgspec.structs.replace(message, reason=reason)
    if isinstance(message, WorkerFailed | TornTransaction | Shutdown) and message.failure is not None:
        failure = message.failure.fitted()
        if failure is not message.failure:
            message = msgspec.structs.replace(message, failure=failure)
    return message


def decode_for_coordinator(frame: bytes) -> ToCoordinator:
    """The message in `frame`, sent by a worker, an admin client or a standby.

    Raises:
        MalformedMessageError: the frame is not a message of this protocol version.
    """
    return _decode(frame, _to_coordinator)


def decode_from_coordinator(frame: bytes) -> FromCoordinator:
    """The message in `frame`, sent by a coordinator.

    Raises:
        MalformedMessageError: the frame is not a message of this protocol version.
    """
    return _decode(frame, _from_coordinator)


def _decode(frame: bytes, decoder: msgspec.msgpack.Decoder[_M]) -> _M:
    if len(frame) > MESSAGE_BYTES_MAX:
        raise MalformedMessageError(f"a frame of {len(frame)} bytes is over the limit of {MESSAGE_BYTES_MAX}")
    if frame[:1] != _VERSION_BYTE:
        raise MalformedMessageError(
            f"protocol version {frame[:1].hex() or 'missing'} instead of {PROTOCOL_VERSION}"
        )
    try:
        # The texts of failures and reasons are shown on terminals, whoever sent them.
        return _fitted(decoder.decode(memoryview(frame)[1:]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from error
