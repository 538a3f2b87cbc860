"""`fcluster reset`: sets a job to given offsets, with empty state or with its state unchanged.

Responsible for: planning what is changed (`plan_reset`), describing it, and carrying it out (`carry_out`).
Rules: nothing is changed before the plan is complete; nothing that belongs to another job is touched; no
process that still runs can write afterwards. Because of the order of the steps, a kill at any point is
harmless:

1. The journal is taken over, which deposes a coordinator, and the reset is recorded in it as begun. Until the
   reset is complete, no coordinator starts the job (`coordinator.checks.check_reset`).
2. The transactional ids of all slots are fenced, so that no worker can commit any longer.
3. Topics, snapshots and local files are deleted. It is no error if something is already gone, so this can be
   repeated.
4. The offsets are committed.
5. The journal forgets the job's topology, partitions and assignment. It keeps the slots, because their ids
   always have to be fenced, and the term and the epoch numbers, which never go back.

Must not parse options or ask the user.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from fcluster.cli.connection import open_admin_client
from fcluster.common import failpoints
from fcluster.common.errors import (
    ClusterConflict,
    DirectoryInUse,
    FclusterError,
    IncompatibleState,
    KafkaUnavailable,
)
from fcluster.common.ids import ShardId, journal_topic, transactional_ids
from fcluster.common.offset_targets import SourcePartition, Target, chosen_offsets
from fcluster.common.positions import (
    RESET_FINGERPRINT,
    CommittedPosition,
    UnreadableMetadataError,
    decode_position,
)
from fcluster.common.settings import Settings, with_settings
from fcluster.coordinator.checks import RESETTING_KEY
from fcluster.coordinator.core.outbox import LOSS_PREFIXES
from fcluster.coordinator.core.run_end import RUN_END_KEY
from fcluster.coordinator.journal import Journal, JournalLostError, open_journal
from fcluster.coordinator.owned_topics import Found, found_names
from fcluster.coordinator.topic_watch import GroupMembers
from fcluster.engine.changelog import parse_record
from fcluster.graph.stages import Stage
from fcluster.graph.topology import Topology
from fcluster.host.data_directory import DirectoryLock
from fcluster.kafka.asking import cause_of, reason_of, remedy_for
from fcluster.kafka.brokers import connect_or_raise
from fcluster.kafka.clients import Admin, make_admin, make_consumer
from fcluster.kafka.fencing import fence_transactional_id
from fcluster.kafka.offsets import begin_offsets, end_offsets, offsets_at_time
from fcluster.kafka.topic_ids import TopicSeen
from fcluster.kafka.topic_looks import look_at_topics
from fcluster.kafka.topics import partition_counts
from fcluster.storage.snapshot_store import OBJECT_STORE_SCHEMES, SnapshotStore, open_snapshot_store
from fcluster.storage.snapshots import same_changelog, usable_manifests
from fcluster.wire.admin_client import CoordinatorSilent, KeyRefused
from fcluster.wire.discovery import leader_in, read_journal

STATUS_TIMEOUT_MS: Final = 1_500
KAFKA_TIMEOUT_S: Final = 15.0
GONE_TIMEOUT_S: Final = 15.0
POLL_S: Final = 0.2
FENCES_AT_ONCE: Final = 8
LAST_RECORDS: Final = 500
"""How many offsets of a changelog are read at once to find its last delta."""
_FORGOTTEN: Final = ("topic/", *LOSS_PREFIXES)
"""Prefixes of journal keys that are removed for the job's next start: what is about offsets of before."""
_FORGOTTEN_WITH_STATE: Final = ("assignment/", "partitions/")
"""The same, unless state is kept."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Move:
    """The change of one source partition's offset.

    Attributes:
        committed: the next record at present. -1: no offset is committed.
        kept: what the new position keeps of the old one, if the state is kept.
        foreign: whether the offset was committed by another program.
        to: the next record after the reset.
        end: the end of the partition.
    """

    topic: str
    partition: int
    committed: int
    kept: CommittedPosition | None
    foreign: bool
    to: int
    end: int


@dataclass(frozen=True, slots=True)
class ResetPlan:
    """Everything that a reset changes.

    Attributes:
        job: the job's name.
        target: the target, in words.
        keeps_state: whether only offsets change.
        moves: the changes of the offsets.
        topic_ids: the topic ids of the sources.
        topics: internal topics to delete.
        shards: the shards whose snapshots are deleted.
        snapshots: the store of these snapshots. Empty: there are none.
        local: directories of local state to delete.
        slots: the slots whose transactional ids are fenced.
        epoch: the epoch of the new positions.
        notes: notes for the user.
    """

    job: str
    target: str
    keeps_state: bool
    moves: Sequence[Move]
    topic_ids: Mapping[str, str]
    topics: Sequence[str]
    shards: Sequence[ShardId]
    snapshots: str
    local: Sequence[Path]
    slots: Sequence[int]
    epoch: int
    notes: Sequence[str] = field(default_factory=tuple[str, ...])

    def describe(self) -> list[str]:
        """The plan in lines."""
        kept = "keeping the state" if self.keeps_state else "with empty state"
        lines = [f"reset of job {self.job!r} to {self.target}, {kept}:"]
        lines += [f"  offset of {move.topic}/{move.partition}: {_from_to(move)}" for move in self.moves]
        lines += [f"  topic {topic}: deleted, created again at the next start" for topic in self.topics]
        if self.snapshots:
            lines.append(f"  snapshots of the job in {self.snapshots}: deleted")
        lines += [f"  local state {path}: deleted" for path in self.local]
        return [*lines, *(f"  note: {note}" for note in self.notes)]


def _from_to(move: Move) -> str:
    former = "none" if move.committed < 0 else str(move.committed)
    foreign = " (not committed by fcluster)" if move.foreign else ""
    return f"{former}{foreign} -> {move.to}, of {move.end}"


# --- the plan ------------------------------------------------------------------------------------------


def plan_reset(settings: Settings, topology: Topology, target: Target, *, keep_state: bool) -> ResetPlan:
    """Plan what a reset would change. This changes nothing.

    Args:
        settings: the resolved settings, with brokers.
        topology: the job's topology.
        target: the target of the offsets.
        keep_state: change only the offsets.

    Raises:
        ClusterConflict: a cluster of the job runs, or another program is in its consumer group.
        DirectoryInUse: a cluster runs in the data directory.
        MissingTopic: a source doesn't exist.
        IncompatibleState: the state can't be kept.
        FclusterError: the brokers or the snapshot store can't be reached.
    """
    settings = with_settings(settings, reading_group=topology.job)
    admin = make_admin(settings)
    connect_or_raise(admin, settings)
    check_directory(settings)
    journal = read_journal(settings, topology.job)
    notes = _check_nobody_leads(settings, topology.job, journal)
    found = found_names(settings, admin, topology, journal)
    topology = found.topology
    notes += _notes_on(found)
    _check_group(admin, topology.job)

    counts = partition_counts(admin, [topic.name for topic in topology.sources])
    sources = [
        TopicPartition(topic, partition) for topic, count in counts.items() for partition in range(count)
    ]
    begins, ends = begin_offsets(admin, sources), end_offsets(admin, sources, "read-uncommitted")
    consumer = make_consumer(settings, "read-uncommitted", **{"group.id": topology.job})
    try:
        by_time = offsets_at_time(consumer, sources, target.time_ms) if target.kind == "time" else {}
        committed = _committed(consumer, topology.job, sources)
    finally:
        consumer.close()
    tables = frozenset[str]() if keep_state else topology.table_topics
    to = chosen_offsets(target, _plain(begins), _plain(ends), _plain(by_time), tables)
    if tables and target.kind in ("latest", "time"):
        notes.append(f"tables are read from the beginning of their topics ({', '.join(sorted(tables))})")
    moves = [_move(at, committed[at], to[at.topic, at.partition], ends[at]) for at in sources]

    internal = [source.topic.name for source in topology.inputs if source.internal]
    internal += [stage.changelog for stage in topology.stages if stage.changelog is not None]
    seen = look_at_topics(admin, [*counts, *internal, journal_topic(topology.job)])
    unknown = sorted({*counts, *internal} - seen.keys())
    if unknown:
        raise KafkaUnavailable(
            f"Kafka doesn't say whether {', '.join(unknown)} exist.",
            remedy="Check that the brokers are up, and that this user may describe these topics.",
        )
    if keep_state:
        _check_state_can_stay(topology, seen)
        moves = [_with_state(move, admin, settings, topology, seen) for move in moves]
        moves = _with_one_epoch(moves, topology)
    outputs = ", ".join(sorted(topic.name for topic in topology.outputs))
    if outputs and not keep_state:
        notes.append(
            f"output topics stay as they are ({outputs}): results of records that are read again are "
            "written again"
        )
    local = [] if keep_state else _local_state(settings, topology.job)
    if not keep_state and local:
        notes.append("local state on other hosts is recognised as outdated there, and replaced automatically")
    shards = [] if keep_state else _shards_with_snapshots(settings, topology, journal, seen)
    own = [
        topic for topic in dict.fromkeys(internal) if seen[topic] is not None and topic not in found.shared
    ]
    slots = sorted({int(key.partition("/")[2]) for key in journal if key.startswith("slot/")})
    if not journal:
        # Somebody has deleted the journal, so nobody knows any more which slots there were.
        slots = list(range(settings.workers))
    return ResetPlan(
        job=topology.job,
        target=str(target),
        keeps_state=keep_state,
        moves=moves,
        topic_ids={topic: now.topic_id for topic in counts if (now := seen[topic]) is not None},
        topics=[] if keep_state else own,
        shards=shards,
        snapshots=settings.snapshots if shards else "",
        local=local,
        slots=slots,
        epoch=max([1, *(move.kept.epoch for move in moves if move.kept is not None)]),
        notes=notes,
    )


def check_directory(settings: Settings) -> None:
    """Raises DirectoryInUse if a cluster runs in the data directory, or a worker uses the state in it."""
    directory = Path(settings.state_dir)
    if directory.is_dir() and (holder := DirectoryLock(directory).holder()) is not None:
        raise DirectoryInUse(
            f"the data directory {directory} is in use by process {holder or '(unknown)'}",
            remedy="Stop that cluster first (Ctrl-C in its `fcluster up`).",
        )


def _check_nobody_leads(settings: Settings, job: str, journal: Mapping[str, Any]) -> list[str]:
    """Raises ClusterConflict if the job's coordinator answers, or another process at its address. Otherwise
    returns notes about it.
    """
    leader = leader_in(journal, job)
    if leader is None or not leader.address:
        return []
    where = f"process {leader.pid} on {leader.host}, at {leader.address}"
    try:
        with open_admin_client(settings, leader.address, leader.public_key) as client:
            found = client.status(timeout_ms=STATUS_TIMEOUT_MS).get("job")
    except KeyRefused as error:
        raise ClusterConflict(
            f"a process listens where the coordinator of job {job!r} was last ({where}), and rejects this "
            f"command: {error.message}",
            remedy=error.remedy,
        ) from error
    except CoordinatorSilent:
        return [f"the last coordinator ({where}) doesn't answer; it will be deposed, and its workers fenced"]
    if found == job:
        raise ClusterConflict(
            f"a cluster of job {job!r} is running: its coordinator is {where}",
            remedy="Stop it first: end its `fcluster up` or `fcluster coordinator` with Ctrl-C.",
        )
    return []


def _check_group(admin: Admin, job: str) -> None:
    """Check that the job's consumer group has no members: fcluster's own clients never join.

    Raises:
        ClusterConflict: it has members.
        KafkaUnavailable: not all brokers answer.
    """
    members = GroupMembers(admin, job).now()
    if members is None:
        raise KafkaUnavailable(
            f"the brokers don't say whether the consumer group {job!r} has members",
            remedy="See that all brokers run and that this user may describe the group, then try again.",
        )
    if members:
        raise ClusterConflict(
            f"the job's consumer group {job!r} has members that don't belong to fcluster: "
            f"{', '.join(members)}",
            remedy="Stop these programs, or give them a group.id of their own.",
        )


def _notes_on(found: Found) -> list[str]:
    """What the user should know about the internal topics.

    Raises:
        IncompatibleState: a topic has unprocessed records of two jobs.
    """
    notes: list[str] = []
    changelogs = {stage.changelog for stage in found.topology.stages}
    for topic, claim in found.shared.items():
        if topic not in changelogs:
            raise IncompatibleState(
                f"The topic {topic!r} contains unprocessed records of two jobs, {found.topology.job!r} and "
                f"{claim.job!r}: an older version of fcluster gave both jobs the same topic name.",
                remedy="Run this job under another name, which leaves the topic as it is.",
            )
        notes.append(
            f"topic {topic} is kept, because job {claim.job!r} writes to it too; this job gets its own topic"
        )
    notes += [
        f"only its name suggests that {topic} belongs to this job: check that first"
        for topic in found.unowned
    ]
    return notes


def _plain(offsets: Mapping[TopicPartition, int]) -> dict[SourcePartition, int]:
    return {(at.topic, at.partition): offset for at, offset in offsets.items()}


def _committed(
    consumer: Consumer, group: str, sources: Sequence[TopicPartition]
) -> dict[TopicPartition, TopicPartition]:
    try:
        found = consumer.committed(
            [TopicPartition(at.topic, at.partition) for at in sources], timeout=KAFKA_TIMEOUT_S
        )
    except KafkaException as error:
        raise _unavailable(f"reading the committed offsets of the group {group!r}", error) from error
    for at in found:
        if at.error is not None:
            raise _unavailable(
                f"reading the committed offset of {at.topic}/{at.partition}", KafkaException(at.error)
            )
    return {TopicPartition(at.topic, at.partition): at for at in found}


def _move(at: TopicPartition, committed: TopicPartition, to: int, end: int) -> Move:
    offset, kept, foreign = committed.offset, None, False
    if offset >= 0:
        try:
            kept = decode_position(offset, committed.metadata)
        except UnreadableMetadataError:
            foreign = True
    return Move(at.topic, at.partition, offset if offset >= 0 else -1, kept, foreign, to, end)


def _check_state_can_stay(topology: Topology, seen: Mapping[str, TopicSeen | None]) -> None:
    for stage in topology.stages:
        changelog = seen.get(stage.changelog) if stage.changelog is not None else None
        for topic in stage.topics:
            source = seen[topic]
            if changelog is not None and source is not None and source.partitions != changelog.partitions:
                raise IncompatibleState(
                    f"The state can't be kept: {topic!r} has {source.partitions} partitions now, "
                    f"but had {changelog.partitions} when the state was written. Keys would meet the state "
                    "of other shards.",
                    remedy="Reset without --keep-state, to start with empty state.",
                )


def _with_state(
    move: Move, admin: Admin, settings: Settings, topology: Topology, seen: Mapping[str, TopicSeen | None]
) -> Move:
    """The move, with the epochs of the state that is kept.

    The committed offset may not have them, because it was lost or was committed by another program. Then the
    changelog has them: a delta is committed together with its offset, so the last delta has the epoch of the
    state.
    """
    stage = topology.stages_by_topic[move.topic]
    changelog = seen.get(stage.changelog) if stage.changelog is not None else None
    if move.kept is not None or changelog is None or stage.changelog is None:
        return move
    epoch = _last_epoch(settings, admin, TopicPartition(stage.changelog, move.partition))
    store = _snapshot_store(settings, topology.job)
    if not epoch and store is not None:
        epochs = [
            manifest.state_epoch
            for manifest in usable_manifests(store, ShardId(stage.name, move.partition))
            if same_changelog(manifest.changelog_id, changelog.topic_id)
        ]
        epoch = max(epochs, default=0)
    kept = CommittedPosition(move.to, epoch, epoch, _fingerprint(topology, stage))
    return replace(move, kept=kept if epoch else None)


def _fingerprint(topology: Topology, stage: Stage) -> str:
    """The fingerprint of a position that no transaction of the job has committed. (The job itself commits all
    inputs of a shard in one transaction, and checks that.)
    """
    return topology.fingerprint if len(stage.inputs) == 1 else RESET_FINGERPRINT


def _with_one_epoch(moves: Sequence[Move], topology: Topology) -> list[Move]:
    """The moves. Those of one shard get the epochs that its first input keeps, because they belong to one
    state.

    A repartition topic isn't among the moves. If it is the first input, the next one counts.
    """
    stages = topology.stages_by_topic
    kept: dict[tuple[str, int], CommittedPosition | None] = {}
    order = {topic: number for stage in topology.stages for number, topic in enumerate(stage.topics)}
    for move in sorted(moves, key=lambda move: order[move.topic]):
        shard = (stages[move.topic].name, move.partition)
        if kept.get(shard) is None:
            kept[shard] = move.kept
    return [replace(move, kept=kept[stages[move.topic].name, move.partition]) for move in moves]


def _last_epoch(settings: Settings, admin: Admin, at: TopicPartition) -> int:
    """The epoch of the last committed delta in a partition of a changelog. 0 if there is none."""
    begin = begin_offsets(admin, [at])[at]
    end = end_offsets(admin, [at], "read-committed")[at]
    consumer = make_consumer(settings, "read-committed", **{"enable.partition.eof": True})
    try:
        start = end
        while start > begin:
            start, before = max(begin, start - LAST_RECORDS), start
            consumer.assign([TopicPartition(at.topic, at.partition, start)])
            epoch = _last_epoch_between(consumer, before)
            if epoch:
                return epoch
    except KafkaException as error:
        raise _unavailable(f"reading {at.topic}/{at.partition}", error) from error
    finally:
        consumer.close()
    return 0


def _last_epoch_between(consumer: Consumer, before: int) -> int:
    epoch = 0
    deadline_s = time.monotonic() + KAFKA_TIMEOUT_S
    while time.monotonic() < deadline_s:
        message = consumer.poll(POLL_S)
        if message is None:
            continue
        error = message.error()
        if error is not None and error.code() == KafkaError._PARTITION_EOF:
            return epoch
        if error is not None:
            raise KafkaException(error)
        offset = message.offset()
        if offset is None or offset >= before:
            return epoch
        with suppress(ValueError):  # the restore will report what is wrong with it
            epoch = parse_record(message.value()).epoch
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "its end was not reached in time"))


def _local_state(settings: Settings, job: str) -> list[Path]:
    path = Path(settings.state_dir) / "state" / job
    return [path] if path.is_dir() and not path.is_symlink() else []


def _shards_with_snapshots(
    settings: Settings, topology: Topology, journal: Mapping[str, Any], seen: Mapping[str, TopicSeen | None]
) -> list[ShardId]:
    """The shards that may have snapshots: for as many partitions as the topics have, or ever had."""
    store = _snapshot_store(settings, topology.job)
    found: list[ShardId] = []
    for stage in topology.stages:
        if store is None or stage.changelog is None:
            continue
        counts = [int(journal.get(f"partitions/{topic}", {}).get("count", 0)) for topic in stage.topics]
        counts += [now.partitions for topic in (stage.changelog, *stage.topics) if (now := seen.get(topic))]
        shards = [ShardId(stage.name, partition) for partition in range(max(counts))]
        found += [shard for shard in shards if store.manifest_names(shard)]
    return found


def _snapshot_store(settings: Settings, job: str) -> SnapshotStore | None:
    """The snapshot store. None if there can't be any snapshots, because a plan creates no directories."""
    scheme, separator, rest = settings.snapshots.partition("://")
    if separator and scheme in OBJECT_STORE_SCHEMES:
        return open_snapshot_store(settings.snapshots, job)
    path = Path(rest if separator else settings.snapshots).expanduser()
    return open_snapshot_store(settings.snapshots, job) if (path / job).is_dir() else None


# --- doing it ------------------------------------------------------------------------------------------


def carry_out(plan: ResetPlan, settings: Settings, topology: Topology, say: Say) -> None:
    """Carry out the plan. It can be repeated if it was interrupted, at whatever point.

    Args:
        plan: the result of `plan_reset`, which was called just before.
        settings: the same settings.
        topology: the same topology.
        say: called with a line for each step.

    Raises:
        FclusterError: a step failed. The message says which.
    """
    settings = with_settings(settings, reading_group=topology.job)
    admin = make_admin(settings)
    with ExitStack() as stack:
        directory = Path(settings.state_dir)
        if directory.is_dir():
            lock = DirectoryLock(directory)
            lock.acquire()
            stack.callback(lock.release)
        seen = look_at_topics(admin, [journal_topic(plan.job)])
        journal: Journal | None = None
        past: dict[str, Any] = {}
        if seen.get(journal_topic(plan.job)) is not None:
            journal, past = open_journal(settings, plan.job)
            stack.callback(journal.close)
            _write(journal, {RESETTING_KEY: {"to": plan.target, "since_ms": round(time.time() * 1000)}})
        failpoints.reach("reset.noted")
        _fence(settings, plan, say)
        failpoints.reach("reset.fenced")
        _delete_topics(admin, plan.topics, say)
        failpoints.reach("reset.topics-deleted")
        _delete_snapshots(settings, plan, say)
        for path in plan.local:
            _delete_local(path)
            say(f"deleted the local state {path}")
        failpoints.reach("reset.state-deleted")
        _commit_offsets(settings, topology, plan)
        say(f"set the offsets of {len(plan.moves)} partitions")
        failpoints.reach("reset.offsets-set")
        if journal is not None:
            keeps_time = plan.keeps_state and topology.keeps_time
            _write(journal, _last_entries(past, keeps_state=plan.keeps_state, keeps_time=keeps_time))


def _write(journal: Journal, entries: Mapping[str, Any]) -> None:
    try:
        journal.write(entries)
    except JournalLostError as error:
        raise ClusterConflict(
            f"the reset was interrupted: {error}",
            remedy="If the job was started meanwhile, stop it. Then run the reset again.",
        ) from error


def _last_entries(past: Mapping[str, Any], *, keeps_state: bool, keeps_time: bool = False) -> dict[str, Any]:
    """The journal entries that are removed.

    Args:
        keeps_time: event time goes on where the offsets stay, so if it has ended, it stays so.
    """
    single = ["leader", "ended", "ending", RESETTING_KEY, *([] if keeps_state else ["topology"])]
    prefixes = _FORGOTTEN if keeps_state else (*_FORGOTTEN, *_FORGOTTEN_WITH_STATE)
    keys = [key for key in past if key.startswith(prefixes)]
    keys += [] if keeps_time else [RUN_END_KEY]
    return dict.fromkeys([*keys, *single])


def _fence(settings: Settings, plan: ResetPlan, say: Say) -> None:
    if settings.processing_guarantee != "exactly-once" or not plan.slots:
        return
    ids = [name for slot in plan.slots for name in transactional_ids(plan.job, slot)]
    with ThreadPoolExecutor(min(FENCES_AT_ONCE, len(ids))) as pool:
        for _ in pool.map(partial(fence_transactional_id, settings), ids):
            pass
    say(f"fenced {len(ids)} transactional ids")


def _delete_topics(admin: Admin, topics: Sequence[str], say: Say) -> None:
    if not topics:
        return
    client: Any = admin
    futures: dict[str, Future[None]] = client.delete_topics(
        list(topics), request_timeout=KAFKA_TIMEOUT_S, operation_timeout=KAFKA_TIMEOUT_S
    )
    for topic, future in futures.items():
        try:
            future.result(2 * KAFKA_TIMEOUT_S)
        except KafkaException as error:
            if cause_of(error).code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise _unavailable(f"deleting the topic {topic!r}", error) from error
    deadline_s = time.monotonic() + GONE_TIMEOUT_S
    while any(seen is not None for seen in look_at_topics(admin, topics).values()):
        if time.monotonic() >= deadline_s:
            raise KafkaUnavailable(
                f"Some of these topics still exist {GONE_TIMEOUT_S:g} s after they were deleted: "
                f"{', '.join(topics)}.",
                remedy="Check the brokers' logs, then run the reset again.",
            )
        time.sleep(POLL_S)
    for topic in topics:
        say(f"deleted the topic {topic}")


def _delete_snapshots(settings: Settings, plan: ResetPlan, say: Say) -> None:
    store = _snapshot_store(settings, plan.job) if plan.shards else None
    if store is None:
        return
    for shard in plan.shards:
        for name in store.manifest_names(shard):
            store.delete_manifest(shard, name)
        store.delete_unreferenced(shard, set(), 0)
    say(f"deleted the snapshots of {len(plan.shards)} shards in {settings.snapshots}")


def _delete_local(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FclusterError(
            f"can't delete the local state {path}: {error.strerror or error}",
            remedy="Correct its permissions or delete it yourself, then run the reset again.",
        ) from error


def commit_start(
    settings: Settings, topology: Topology, to: Mapping[SourcePartition, int], admin: Admin
) -> None:
    """Commit the offsets at which a job begins that has committed none.

    Args:
        settings: the resolved settings.
        topology: the job's topology.
        to: the offset of the next record of each partition.
        admin: a connected client.

    Raises:
        FclusterError: the request failed, and nothing was committed.
    """
    topics = sorted({topic for topic, _partition in to})
    seen = look_at_topics(admin, topics)
    ids = {topic: now.topic_id for topic in topics if (now := seen.get(topic)) is not None}
    moves = [Move(*at, -1, None, False, offset, offset) for at, offset in to.items()]
    plan = ResetPlan(topology.job, "", False, moves, ids, (), (), "", (), (), epoch=1)
    _commit_offsets(settings, topology, plan)


def _commit_offsets(settings: Settings, topology: Topology, plan: ResetPlan) -> None:
    """All are committed in one request, which Kafka accepts as a whole."""
    offsets = [_new_offset(move, topology, plan) for move in plan.moves]
    consumer = make_consumer(settings, "read-uncommitted", **{"group.id": plan.job})
    try:
        answers = consumer.commit(offsets=offsets, asynchronous=False) or []
    except KafkaException as error:
        raise _unavailable(f"committing the offsets of the group {plan.job!r}", error) from error
    finally:
        consumer.close()
    for at in answers:
        if at.error is not None:
            raise _unavailable(
                f"committing the offset of {at.topic}/{at.partition}", KafkaException(at.error)
            )


def _new_offset(move: Move, topology: Topology, plan: ResetPlan) -> TopicPartition:
    kept = move.kept if plan.keeps_state else None
    stage = topology.stages_by_topic[move.topic]
    position = CommittedPosition(
        offset=move.to,
        # Not 0: workers refresh the offsets of idle shards only if they have an epoch. Otherwise Kafka would
        # expire them.
        epoch=kept.epoch if kept is not None else plan.epoch,
        state_epoch=kept.state_epoch if kept is not None else 0,
        fingerprint=kept.fingerprint if kept is not None else _fingerprint(topology, stage),
        topic_id=plan.topic_ids.get(move.topic, ""),
    )
    return TopicPartition(move.topic, move.partition, move.to, metadata=position.encode_metadata())


def _unavailable(what: str, error: KafkaException) -> KafkaUnavailable:
    return KafkaUnavailable(
        f"A request to Kafka failed ({what}): {reason_of(error)}.", remedy=remedy_for(cause_of(error))
    )
