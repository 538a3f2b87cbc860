"""The control messages between coordinator, workers, standby coordinators and admin clients.

Responsible for: their types, their encoding (a version byte, then MessagePack), and their validation on
receipt. Keeps the rule that nothing is ever unpickled: a frame either is one of the structs below, with
fields of the declared types, or `decode` raises `MalformedMessageError`.

Every message of the coordinator carries its `term`; messages of an older term are refused by workers.
Every message about work carries the worker's `session`. A session begins with a `Welcome` and ends when
the worker is declared dead, is fenced, or says `Hello` anew. A worker initialises its transactional
producers exactly once in a session, and commits only on a `Complete` of that same session: a worker that
was fenced therefore can't come back to life by initialising its producers again.

`Assign`, `Revoke` and `Released` pass shards on, so they must not be obeyed twice: one that comes once more,
behind what was sent after it, would give a shard two owners. Their senders number them, rising within a
session (and a term), and what isn't newer than the last one is dropped. All other messages name the epoch or
the session that they are about, and mean nothing once that is over.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from fcluster.common.failures import bounded_text
from fcluster.common.ids import ShardId

PROTOCOL_VERSION = 1

AGENT_WORKERS_MAX = 1_000
"""Workers of one agent: a number that is mistyped shall not bring a host down."""

_M = TypeVar("_M")

REASON_CHARACTERS_MAX = 8_000
"""Of a reason that is sent on to other processes."""

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""Larger frames are dropped by the sockets (ZMQ_MAXMSGSIZE) and refused by `decode`."""


# What no honest sender exceeds. A number that fits its type and nothing else would otherwise travel on into
# the journal, into committed offsets or into the clock of an epoch.
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Session = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Slot = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
_Offset = Annotated[int, msgspec.Meta(ge=-1001, le=2**63 - 1)]  # -1001 is Kafka's own "none"
_InputNumber = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
# Names are shown on terminals and stand in logs: without what moves a cursor or begins a new line.
_PRINTABLE = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
_Name = Annotated[str, msgspec.Meta(max_length=255, pattern=_PRINTABLE)]
_TopicName = Annotated[str, msgspec.Meta(max_length=249, pattern=_PRINTABLE)]
_Address = Annotated[str, msgspec.Meta(max_length=4096, pattern=_PRINTABLE)]
# What went wrong, in words that may be a user's. `encode` cuts what is longer.
_Reason = Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
_Workers = Annotated[int, msgspec.Meta(ge=0, le=AGENT_WORKERS_MAX)]


class MalformedMessageError(Exception):
    """A frame that is not a message of this protocol: counted and dropped, never fatal."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all control messages; the subclass's name travels as its tag."""


class ShardStatus(msgspec.Struct, frozen=True, array_like=True):
    """Where one shard of a worker stands in one of its inputs; `input` is the number of that.

    `position` is the next offset to read, with everything before it processed (control records
    counted); `committed` the committed offset; `end` the last known end of the source partition (the last
    stable offset for read-committed sources), -1 if unknown. `dirty` says that records up to `position`
    are not all committed yet.
    """

    shard: ShardId
    position: _Offset
    committed: _Offset
    end: _Offset
    dirty: bool
    epoch: _Number
    input: _InputNumber = 0


class StandbyStatus(msgspec.Struct, frozen=True, array_like=True):
    """How far a worker's warm copy of another's shard is.

    `state_epoch` is the last epoch whose changes it has; `lag` how many offsets of the changelog it is behind
    what is committed there, -1 if unknown (it is being set up, or can't be).
    """

    shard: ShardId
    state_epoch: _Number
    lag: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]


class RunningRecord(msgspec.Struct, frozen=True, array_like=True):
    """The record that a handler has been working on for `running_ms`, at least."""

    topic: _Name
    partition: _Number
    offset: _Number
    running_ms: _Number


class OverdueRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record at which a handler has hung beyond `record.timeout.ms`, `times` in a row.

    `step`: the handler's name, empty if it isn't known.
    """

    shard: ShardId
    offset: _Number
    times: _Number
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
    step: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    input: _InputNumber = 0


class WorkerStats(msgspec.Struct, frozen=True):
    """What a heartbeat tells about a worker; rates and totals count from the process's start.

    While shards are being restored (`restoring` of them), `restore_bytes` says how much has been read for
    them, `restore_bytes_left` and `restore_ms_left` estimate the rest; -1 is unknown.
    `record` is the one that a handler is busy with, if it has been for some time: no barrier is served then.
    `kafka_wait` says for whom in Kafka the worker's epochs wait, and `kafka_wait_ms` for how long; empty and
    0 if that is no longer than usual.
    """

    records_in: _Number = 0
    records_out: _Number = 0
    records_skipped: _Number = 0
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


# --- worker to coordinator ---------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Join, or join anew after a reset. `worker` is random for each process.

    `session` is 0 for a fresh session. A worker that lost its coordinator, not its session, names the
    session it holds; the coordinator then answers with an adopting `Welcome` for that session, or with
    `Evicted`. `slot` is the wanted slot (-1: any). `epoch` is the highest epoch the worker knows of,
    `prepared_epoch` one it has prepared and not yet been told the outcome of (0: none), `in_flight_epoch` one
    that it has frozen and not yet committed, prepared or not (0: none). `process_space` names the space in
    which `pid` is unique (see `processes.process_space`), empty if unknown; `leaving` says what `Leaving`
    says. Messages may have been lost with the connection, so this one tells all that the coordinator needs: a
    shard that is not in `owned` is not held.

    `term` is the newest in which a coordinator has spoken to this process (0: none yet): one of an
    older term, to whom this is said, has been deposed, or is lied to. `draining`: it processes no more
    because it was told to `Drain`.
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
    """Alive, every `heartbeat.interval.ms`.

    `orders_heard`: the number of the last `Assign` or `Revoke` of this term.
    """

    session: _Session
    stats: WorkerStats
    orders_heard: _Number


class Dirty(Message, frozen=True):
    """The worker has its first uncommitted record since its last barrier: an epoch is wanted."""

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
    """The worker's transaction for `epoch` is committed. `dirty`: it already holds records of the next."""

    session: _Session
    epoch: _Number
    commit_ms: _Milliseconds
    dirty: bool
    shards: list[ShardStatus]


class ShardsRunning(Message, frozen=True):
    """These shards are restored, checked against their committed epoch, and process records."""

    session: _Session
    shards: list[ShardStatus]


class TornTransaction(Message, frozen=True):
    """Kafka has torn a transaction of this shard. `reason` says what it did, and what a person can do.

    `stopped`: the shard isn't run, and is held until a person has chosen how it goes on; said again to a new
    leader. Otherwise it goes on as was chosen.
    """

    session: _Session
    shard: ShardId
    stopped: bool
    reason: _Address


class Released(Message, frozen=True):
    """These shards' last epoch is committed (or they had nothing to commit); the worker let go of them."""

    session: _Session
    shards: list[ShardId]
    number: _Number


class Drained(Message, frozen=True):
    """Everything the worker had processed is committed and it processes no more."""

    session: _Session


class WorkerFailed(Message, frozen=True):
    """The job can't go on, on any worker: bad record, incompatible state, gap in a source."""

    session: _Session
    reason: _Reason


class RecordOverdue(Message, frozen=True):
    """A handler hangs at the record at `offset` beyond `record.timeout.ms`: the worker's process ends now.

    The last word of that process. Whoever gets the shard next is told of it with `Assign`.
    """

    session: _Session
    shard: ShardId
    offset: _Number
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
    step: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    input: _InputNumber = 0


class Leaving(Message, frozen=True):
    """The worker was asked to leave: its shards are to move away. It works on until it has none.

    Said again until the worker is gone, for a new leader or after a lost connection `Hello` says it.
    """

    session: _Session


class Goodbye(Message, frozen=True):
    """The worker leaves in good order: it holds nothing uncommitted and its producers are closed."""

    session: _Session


# --- agents ---------------------------------------------------------------------------------------------


class AgentReport(Message, frozen=True):
    """What an agent says of itself, every `heartbeat.interval.ms` and when it changes.

    An agent runs workers on a host, and connects with a worker's key. `agent` is random for each process,
    `running` the process ids of its workers, `target` how many it means to have. `taken_term` and
    `taken_order` name the last `AgentOrder` that it took. Answered with `AgentOrder`, or with `Shutdown` when
    the job ends. `slots_wanted`: it wants to be told which slots its workers have.
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
    """The coordinator is alive, and wants the agent to have `target` workers, unless `order` is 0.

    Repeated until the agent says that it took it, and taken once: orders rise within a term. `slots` are
    those of the agent's workers by process id, if it asked.
    """

    term: _Number
    order: _Number
    target: _Workers
    slots: dict[int, int] = {}


# --- coordinator to worker ---------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """Opens session `session` on `slot`, or adopts it (`adopted`) under a new leader's term.

    It is journalled before it is sent, and the slot's transactional ids were fenced before that unless
    adopted: on an unadopted Welcome the worker initialises its producers, and owns no shard yet.

    `internal_topics` says how internal topics are called that aren't called as the job's file would have it,
    because they are older than the present names (see `topology.former_names`).
    """

    term: _Number
    session: _Session
    slot: _Slot
    epoch: _Number
    adopted: bool
    internal_topics: dict[_TopicName, _TopicName] = {}


class Refused(Message, frozen=True):
    """The worker can't join; `retry` says whether asking again later may help."""

    term: _Number
    reason: _Reason
    retry: bool


class Evicted(Message, frozen=True):
    """`session` is over: drop everything it held, then join as a fresh worker."""

    term: _Number
    session: _Session


class Assign(Message, frozen=True):
    """Restore and run these shards. Their former owner released them or was fenced.

    `overdue`: the records of these shards at which a handler has hung.
    """

    term: _Number
    session: _Session
    shards: list[ShardId]
    number: _Number
    overdue: list[OverdueRecord] = []


class Revoke(Message, frozen=True):
    """Stop reading these shards, commit what they processed, then answer `Released`."""

    term: _Number
    session: _Session
    shards: list[ShardId]
    number: _Number


class Standby(Message, frozen=True):
    """Keep warm copies of these shards of others, and of no others.

    The whole set each time, so that it may be said again. A shard that the worker owns when this comes is not
    meant: an `Assign` makes a warm copy its own.
    """

    term: _Number
    session: _Session
    shards: list[ShardId]


class Barrier(Message, frozen=True):
    """Freeze the open epoch under the number `epoch`, flush it, answer `Prepared`.

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
    """Process no more, commit what is processed, answer `Drained`, and wait for `Shutdown`."""

    term: _Number
    session: _Session


class Leave(Message, frozen=True):
    """An operator wants this worker gone: answer `Leaving`, and don't come back."""

    term: _Number
    session: _Session


class Dismiss(Message, frozen=True):
    """To a worker that is leaving: nobody can take its shards, so commit what is processed and go."""

    term: _Number
    session: _Session


class Shutdown(Message, frozen=True):
    """Exit. `failed` says that the job stopped on an error, `reason` names it."""

    term: _Number
    session: _Session
    reason: _Reason
    failed: bool


class HeartbeatAck(Message, frozen=True):
    """The coordinator is alive; a worker that misses it looks for a new leader."""

    term: _Number
    session: _Session


# --- admin ---------------------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True):
    """Ask for the coordinator's view of the cluster."""


class StatusReply(Message, frozen=True):
    """`status` is the JSON document that `fcluster status --json` prints."""

    term: _Number
    status: msgspec.Raw


class StopRequest(Message, frozen=True):
    """Drain all workers, then stop the job; answered with `StopReply` once it is draining."""


class StopReply(Message, frozen=True):
    """The job is draining."""

    term: _Number


class DrainRequest(Message, frozen=True):
    """Let one worker leave: `worker` is its slot, its id, or HOST:PID. Answered with `DrainReply`.

    May be repeated; whether it is gone shows in the status.
    """

    worker: _Name


class DrainReply(Message, frozen=True):
    """That worker leaves. `others` workers remain that can take its shards."""

    term: _Number
    slot: _Slot
    worker: _Name
    host: _Name
    pid: _Number
    others: _Number


class ScaleRequest(Message, frozen=True):
    """Have `total` workers, spread over all agents; or, if that is -1, so many at each of `places`.

    A place is an agent's host, HOST:PID, or its id. Answered with `ScaleReply`.
    """

    total: Annotated[int, msgspec.Meta(ge=-1, le=1_000_000)] = -1
    places: Annotated[dict[_Name, _Workers], msgspec.Meta(max_length=1_000)] = {}


class AgentTarget(msgspec.Struct, frozen=True, array_like=True):
    """How many workers an agent is to have."""

    agent: _Name
    host: _Name
    pid: _Number
    target: _Workers


class ScaleReply(Message, frozen=True):
    """What the agents were told; whether they have done it shows in the status."""

    term: _Number
    targets: list[AgentTarget]


# --- standby coordinators ------------------------------------------------------------------------------


class LeaderCheck(Message, frozen=True):
    """Ask whether the leader lives; `standby` names who asks, for people. Answered with `LeaderAlive`.

    `leaves`: don't count on this standby any more. Not answered then.
    """

    standby: _Name
    leaves: bool = False


class LeaderAlive(Message, frozen=True):
    """`cluster_id` is that of the leader's record in the journal; `rank` the asker's turn, from 0.

    `resigns`: the leader asks this standby to take over now. It goes on leading until that has happened.
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

    Reasons are cut, and made printable: no text of a user's may keep a message from being sent or read.
    """
    if isinstance(message, WorkerFailed | RecordOverdue | Refused | Shutdown):
        reason = bounded_text(message.reason, REASON_CHARACTERS_MAX)
        if reason != message.reason:
            message = msgspec.structs.replace(message, reason=reason)
    return _VERSION_BYTE + _encoder.encode(message)


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
        return decoder.decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from error
