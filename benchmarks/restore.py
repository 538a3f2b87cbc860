"""How long a host takes to get the state of 5,000,000 keys back, compared with copying files and with
replaying records.

    python -m benchmarks.restore [--brokers HOST:PORT] [--keys 5000000] [--shards 8] [--rounds 3]

A job's state is written through the product's own layers: every epoch's delta to a changelog in a
transaction, the deltas to RocksDB, then a snapshot of each shard, and some more deltas after the snapshots.
Then a host without any local files restores all shards as a worker does (`storage/restore.py`). The following
are measured in turn with it:

- `cp` of the same snapshot files, and `cp` followed by `sync` of them: the speed of copying,
- the restore from the changelog alone, as if there were no snapshot,
- Kafka Streams' way: a changelog topic with one record for each key (compacted: the best case), read from
  the beginning by plain consumers, one process for each core, that put batches into RocksDB with the same
  options.

Everything was written a moment ago, so all of them read from the page cache. Medians are printed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.support import delete_topics, median, parser, workplace
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings, resolve
from fcluster.engine.changelog import Delta, encode_delta
from fcluster.engine.memory import StateMemory
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.kafka.clients import make_admin, make_producer
from fcluster.storage.restore import RestoreProgress, RestoreRequest, changelog_consumer, restore_shards
from fcluster.storage.snapshot_store import DirectorySnapshotStore
from fcluster.storage.snapshots import take_snapshot, usable_manifests
from fcluster.storage.store import StoreDirectory
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, end_offsets

STAGE = "accounts"
TABLE = "totals"
JOB = "bench-restore"
KEYS_AN_EPOCH = 25_000
CACHED_BYTES = 32 * 1024 * 1024
READ_AT_A_TIME = 10_000
TIMEOUT_S = 300.0

_V = TypeVar("_V")


@dataclass(frozen=True)
class Plan:
    """What has to be prepared.

    Attributes:
        keys: the number of keys in all shards together. Values are encoded to `value_bytes`.
        deltas: epochs of each shard after its snapshot, each with `delta_keys` keys.
        replay_topic: gets one record for each key. Empty: it isn't written.
    """

    brokers: str
    directory: Path
    changelog: str
    replay_topic: str
    keys: int
    shards: int
    value_bytes: int
    deltas: int
    delta_keys: int

    @property
    def settings(self) -> Settings:
        """The cluster's settings."""
        return resolve({}, None, {}, {"bootstrap.servers": self.brokers})

    @property
    def snapshots(self) -> DirectorySnapshotStore:
        """The directory of the snapshots."""
        return DirectorySnapshotStore(self.directory / "snapshots", JOB)


@dataclass(frozen=True)
class Prepared:
    """One shard, as it is in Kafka and in the snapshot store.

    Attributes:
        snapshot_files: paths and sizes in the snapshot store.
        records_behind: changelog records after the snapshot, `bytes_behind` in all.
        records_before: changelog records that the snapshot makes unnecessary.
        digest: the digest of all entries (see `digest_of`).
    """

    request: RestoreRequest
    snapshot_files: list[tuple[str, int]]
    records_before: int
    records_behind: int
    bytes_behind: int
    digest: str


# --- preparing ----------------------------------------------------------------------------------------


def prepare(plan: Plan) -> list[Prepared]:
    """Write all shards, several at a time."""
    create_topic(plan.brokers, plan.changelog, plan.shards)
    if plan.replay_topic:
        create_topic(plan.brokers, plan.replay_topic, plan.shards)
    with _processes() as pool:
        return list(pool.map(prepare_shard, [plan] * plan.shards, range(plan.shards)))


def prepare_shard(plan: Plan, partition: int) -> Prepared:
    """Write one shard. Runs in its own process."""
    root = plan.directory / f"writing-{partition}"
    directory = StoreDirectory(root)
    try:
        writer = _ShardWriter(plan, directory, partition)
        keys = [b"k%07d" % number for number in range(partition, plan.keys, plan.shards)]
        for begin in range(0, len(keys), KEYS_AN_EPOCH):
            writer.write(keys[begin : begin + KEYS_AN_EPOCH])
        writer.state.flush()
        before = writer.records
        take_snapshot(directory.open(writer.shard), writer.shard, plan.snapshots)
        written = writer.bytes
        for number in range(plan.deltas):
            begin = number * plan.delta_keys % max(1, len(keys) - plan.delta_keys)
            writer.write(keys[begin : begin + plan.delta_keys])
        writer.state.flush()
        entries = directory.open(writer.shard).items()
        if plan.replay_topic:
            write_replay_topic(plan, partition, entries)
        epoch = writer.state.state_epoch
        position = CommittedPosition(len(keys), epoch, epoch, "bench")
        return Prepared(
            RestoreRequest(writer.shard, plan.changelog, position),
            _snapshot_files(plan, writer.shard),
            before,
            writer.records - before,
            writer.bytes - written,
            digest_of(entries),
        )
    finally:
        directory.close_all()
        shutil.rmtree(root)


class _ShardWriter:
    """Runs epochs as a worker does: layers, delta, transaction, store."""

    def __init__(self, plan: Plan, directory: StoreDirectory, partition: int) -> None:
        self.shard = ShardId(STAGE, partition)
        self.records = self.bytes = 0
        self.state = ShardState(directory.open(self.shard), (TABLE,), StateMemory(CACHED_BYTES))
        self._plan = plan
        self._random = random.Random(partition)
        self._offset = 0
        self._producer = make_producer(plan.settings, f"{plan.changelog}-{partition}")
        self._producer.list_topics(timeout=TIMEOUT_S)
        self._producer.init_transactions(TIMEOUT_S)

    def write(self, keys: Sequence[bytes]) -> None:
        """One committed epoch that changes these keys."""
        epoch = self.state.state_epoch + 1
        get, randbytes = self.state.tables[TABLE].get, self._random.randbytes
        # {"n":1,"text":"..."}: random digits, because a text that compresses well would make the files too
        # small.
        text_bytes = self._plan.value_bytes - len(orjson.dumps({"n": epoch, "text": ""}))
        for key in keys:
            state = get(key)
            state["n"] = epoch
            state["text"] = randbytes(text_bytes // 2 + 1).hex()[:text_bytes]
        delta = self.state.freeze(epoch)
        assert delta is not None
        self._commit(delta)
        self.state.commit(epoch, self._offset, time.monotonic() * 1000)

    def _commit(self, delta: Delta) -> None:
        self._producer.begin_transaction()
        for record in encode_delta(delta):
            self._producer.produce(
                self._plan.changelog, record, partition=self.shard.partition, on_delivery=self._delivered
            )
            self.records += 1
            self.bytes += len(record)
        self._producer.flush(TIMEOUT_S)
        self._producer.commit_transaction(TIMEOUT_S)

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            raise RuntimeError(str(error))
        self._offset = max(self._offset, message.offset() + 1)


def write_replay_topic(plan: Plan, partition: int, entries: Sequence[tuple[bytes, bytes]]) -> None:
    """One record for each key, as in Kafka Streams' changelog after compaction."""
    producer = Producer(
        {
            "bootstrap.servers": plan.brokers,
            "linger.ms": 5,
            "batch.size": 1_000_000,
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    for key, value in entries:
        while True:
            try:
                producer.produce(plan.replay_topic, value, key, partition)
                break
            except BufferError:
                producer.poll(0.05)
    if producer.flush(TIMEOUT_S):
        raise TimeoutError("the topic to be replayed isn't written")


def digest_of(entries: Iterable[tuple[bytes, bytes]]) -> str:
    """The digest of all keys and values, in their order."""
    digest = sha256()
    for key, value in entries:
        digest.update(b"%d:%d:%b%b" % (len(key), len(value), key, value))
    return digest.hexdigest()


def _snapshot_files(plan: Plan, shard: ShardId) -> list[tuple[str, int]]:
    manifest = next(usable_manifests(plan.snapshots, shard))
    folder = plan.directory / "snapshots" / JOB / shard.stage / str(shard.partition) / "files"
    return [(str(folder / file.hash), file.size_bytes) for file in manifest.files]


def _processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


# --- restoring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """One restore of all shards, on a host that had nothing.

    Attributes:
        base: the base of each shard.
        progress: the last progress.
    """

    seconds: float
    bases: dict[int, str]
    progress: RestoreProgress


def restore(
    plan: Plan,
    prepared: Sequence[Prepared],
    snapshots: DirectorySnapshotStore,
    told: Callable[[RestoreProgress], None] | None = None,
    *,
    checked: bool = False,
) -> Restored:
    """Restore all shards into an empty state directory, which is removed afterwards.

    Args:
        told: called with the progress.
        checked: whether to compare every entry with what was written. This isn't measured.
    """
    progress: list[RestoreProgress] = []
    root = plan.directory / f"restored-{uuid.uuid4().hex[:6]}"
    directory = StoreDirectory(root)
    # A worker has connected these when it joined.
    admin, consumer = make_admin(plan.settings), changelog_consumer(plan.settings)
    admin.list_topics(plan.changelog, timeout=TIMEOUT_S)
    consumer.list_topics(plan.changelog, timeout=TIMEOUT_S)
    try:
        started_s = time.monotonic()
        answers = list(
            restore_shards(
                [one.request for one in prepared],
                directory=directory,
                snapshots=snapshots,
                settings=plan.settings,
                stop=threading.Event(),
                admin=admin,
                consumer=consumer,
                progress=progress.append,
            )
        )
        seconds = time.monotonic() - started_s
        assert len(answers) == len(prepared), "not all shards were restored"
        for answer in answers if checked else ():
            expected = prepared[answer.shard.partition].digest
            assert digest_of(answer.store.items()) == expected, f"{answer.shard} has other entries"
        for one in progress:
            if told is not None:
                told(one)
        return Restored(
            seconds, {answer.shard.partition: answer.base.value for answer in answers}, progress[-1]
        )
    finally:
        consumer.close()
        directory.close_all()
        shutil.rmtree(root)


def copy_files(plan: Plan, *, durably: bool) -> float:
    """`cp` the snapshot store's files. Returns the seconds."""
    target = plan.directory / f"copied-{uuid.uuid4().hex[:6]}"
    try:
        started_s = time.monotonic()
        subprocess.run(["cp", "-r", str(plan.directory / "snapshots" / JOB / STAGE), str(target)], check=True)
        if durably:
            copies = [str(path) for path in target.rglob("*") if path.is_file()]
            subprocess.run(["sync", *copies], check=True)
        return time.monotonic() - started_s
    finally:
        shutil.rmtree(target)


def replay(plan: Plan) -> tuple[float, int]:
    """Kafka Streams' way, with one process for each core. Returns the seconds, and how many records were
    put.
    """
    root = plan.directory / f"replayed-{uuid.uuid4().hex[:6]}"
    cores = os.cpu_count() or 1
    shares = [list(range(first, plan.shards, cores)) for first in range(min(cores, plan.shards))]
    ends = {at[1]: end for at, end in end_offsets(plan.brokers, [plan.replay_topic], READ_COMMITTED).items()}
    context = multiprocessing.get_context("spawn")
    begin, answer = context.Event(), context.Queue()
    processes = [
        context.Process(
            target=replay_share, args=(plan, root / str(number), share, ends, begin, answer), daemon=True
        )
        for number, share in enumerate(shares)
    ]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            assert answer.get(timeout=TIMEOUT_S) == "ready"
        started_s = time.monotonic()
        begin.set()
        records = sum(answer.get(timeout=TIMEOUT_S) for _ in processes)
        return time.monotonic() - started_s, records
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(root, ignore_errors=True)


def replay_share(
    plan: Plan, root: Path, partitions: Sequence[int], ends: dict[int, int], begin: Any, answer: Any
) -> None:
    """Read these partitions to their ends into RocksDB. Runs in its own process."""
    consumer = Consumer(
        {
            "bootstrap.servers": plan.brokers,
            "group.id": "fcluster-bench-replay",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.queue.backoff.ms": 10,
        }
    )
    directory = StoreDirectory(root)
    stores = {partition: directory.open(ShardId(STAGE, partition)) for partition in partitions}
    answer.put("ready")
    begin.wait()
    consumer.assign([TopicPartition(plan.replay_topic, partition, 0) for partition in partitions])
    missing, records = set(partitions), 0
    while missing:
        changes: dict[int, dict[bytes, bytes]] = {partition: {} for partition in partitions}
        for message in consumer.consume(READ_AT_A_TIME, 1.0):
            if message.error() is None:
                changes[message.partition()][message.key()] = message.value()
        for partition, batch in changes.items():
            if batch:
                records += len(batch)
                stores[partition].apply(batch, StoreMeta(1, records, ""))
        for at in consumer.position([TopicPartition(plan.replay_topic, partition) for partition in missing]):
            if at.offset >= ends[at.partition]:
                missing.discard(at.partition)
    consumer.close()
    answer.put(records)
    directory.close_all()


# --- the whole ----------------------------------------------------------------------------------------


def quietly(measure: Callable[[], _V]) -> _V:
    """Measure once what was written before is on the disk and doesn't compete any more."""
    os.sync()
    return measure()


def rounds(plan: Plan, prepared: Sequence[Prepared], number: int) -> Iterator[tuple[str, float]]:
    """Names and seconds. All ways run in turn."""
    empty = DirectorySnapshotStore(plan.directory / "no-snapshots", JOB)
    behind = sum(one.records_behind for one in prepared)
    for count in range(number):
        yield "cp", quietly(lambda: copy_files(plan, durably=False))
        yield "cp and sync", quietly(lambda: copy_files(plan, durably=True))
        restored = quietly(lambda: restore(plan, prepared, plan.snapshots, checked=not count))  # noqa: B023
        assert set(restored.bases.values()) == {"snapshot"}, restored.bases
        assert restored.progress.records == behind, restored.progress
        yield "restore", restored.seconds
    restored = quietly(lambda: restore(plan, prepared, empty))
    assert set(restored.bases.values()) == {"nothing"}, restored.bases
    yield "restore without snapshots", restored.seconds
    seconds, records = quietly(lambda: replay(plan))
    assert records == plan.keys, records
    yield "replay of every key", seconds


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.add_argument("--keys", type=int, default=5_000_000)
    made.add_argument("--value-bytes", type=int, default=100)
    made.add_argument("--shards", type=int, default=8)
    made.add_argument("--deltas", type=int, default=20, help="Epochs of each shard behind its snapshot.")
    made.add_argument("--delta-keys", type=int, default=500, help="Changed in each of them.")
    made.add_argument("--rounds", type=int, default=3)
    arguments = made.parse_args()
    with workplace(arguments.brokers) as (brokers, directory):
        name = f"bench-{uuid.uuid4().hex[:8]}"
        plan = Plan(
            brokers=brokers,
            directory=directory,
            changelog=f"{name}-changelog",
            replay_topic=f"{name}-replay",
            keys=arguments.keys,
            shards=arguments.shards,
            value_bytes=arguments.value_bytes,
            deltas=arguments.deltas,
            delta_keys=arguments.delta_keys,
        )
        try:
            started_s = time.monotonic()
            prepared = prepare(plan)
            describe(plan, prepared, time.monotonic() - started_s)
            found: dict[str, list[float]] = {}
            for way, seconds in rounds(plan, prepared, arguments.rounds):
                found.setdefault(way, []).append(seconds)
                print(f"  {way:<26} {seconds:6.2f} s", flush=True)
        finally:
            delete_topics(brokers, name)
    summarise(plan, prepared, found)
    return 0


def describe(plan: Plan, prepared: Sequence[Prepared], seconds: float) -> None:
    """A description of what has to be restored."""
    size_bytes = sum(size for one in prepared for _, size in one.snapshot_files)
    print(
        f"{plan.keys:,} keys of {plan.value_bytes} bytes in {plan.shards} shards: "
        f"snapshots of {size_bytes / 1e6:,.0f} MB in "
        f"{sum(len(one.snapshot_files) for one in prepared)} files, "
        f"{sum(one.records_behind for one in prepared):,} changelog records behind them "
        f"({sum(one.bytes_behind for one in prepared) / 1e6:.1f} MB), "
        f"{sum(one.records_before for one in prepared):,} before; "
        f"written in {seconds:.0f} s, {os.cpu_count()} cores shared with the broker",
        flush=True,
    )


def summarise(plan: Plan, prepared: Sequence[Prepared], found: dict[str, list[float]]) -> None:
    """Print medians and their ratios."""
    size_mb = sum(size for one in prepared for _, size in one.snapshot_files) / 1e6
    print(f"medians of {len(found['restore'])}:")
    middle = {way: median(seconds) for way, seconds in found.items()}
    for way, seconds in middle.items():
        print(
            f"  {way:<26} {seconds:6.2f} s   {size_mb / seconds:7,.0f} MB/s of snapshot"
            f"   {plan.keys / seconds / 1e6:6.2f} million keys/s"
        )
    for way in ("cp", "cp and sync"):
        print(f"restore / {way}: {middle['restore'] / middle[way]:.2f}")
    print(f"replay of every key / restore: {middle['replay of every key'] / middle['restore']:.1f}")


if __name__ == "__main__":
    sys.exit(main())
