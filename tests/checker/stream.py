"""The checker for runs that are too long to be kept in memory.

Responsible for: `Fold`, the verdict of `verdict.py` record by record, in the memory of the keys and of what
is under way (pure); `StreamCheck`, one thread that feeds it from Kafka while the job runs, finds what a
read_uncommitted reader saw and never was committed, and at the end reads all of the output once more and
compares it with what was read live, block by block of a hash.

Kinds of findings are those of `verdict`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, end_offsets, new_consumer, partitions_of
from tests.checker.records import (
    InputRecord,
    MalformedRecord,
    OutputRecord,
    decode_input,
    decode_output,
    group_of,
)
from tests.checker.verdict import Verdict

BLOCK_RECORDS = 1000
_BATCH_RECORDS = 1000


@dataclass(slots=True)
class _Key:
    """A key on its way: up to which sequence it was read in the source and in the output, and where."""

    read: int = 0
    seen: int = 0
    source: int = -1
    place: int = -1


@dataclass(slots=True)
class _Group:
    count: int = 0
    sum: int = 0
    place: int = -1


class Fold:
    """The verdict on a totals job, plain or regrouped, record by record.

    Inputs and outputs may come in any interleaving, also outputs before their inputs: each side in its order.

    Args:
        group_count: of the regrouping job; 0 is the plain job, which counts by key.
    """

    def __init__(self, group_count: int = 0) -> None:
        self.verdict = Verdict("soak")
        self._group_count = group_count
        self._keys: dict[str, _Key] = {}
        self._groups: dict[str, _Group] = {}
        self._pending: dict[int, InputRecord] = {}
        self._early: dict[int, deque[OutputRecord]] = {}
        self._inputs: dict[str, _Group] = {}

    def take_input(self, record: InputRecord) -> None:
        """The next record of its source partition."""
        verdict = self.verdict
        verdict.inputs += 1
        key = self._keys.setdefault(record.key, _Key())
        if record.sequence != key.read + 1:
            verdict.found("input", f"key {record.key}: sequence {record.sequence} behind {key.read}")
        if key.source not in (-1, record.partition):
            verdict.found("input", f"key {record.key} in partitions {key.source} and {record.partition}")
        key.read, key.source = record.sequence, record.partition
        totals = self._inputs.setdefault(self._group(record.key), _Group())
        totals.count += 1
        totals.sum += record.value
        self._pending[record.id] = record

    def take_output(self, output: OutputRecord) -> None:
        """The next record of its output partition."""
        early = self._early.get(output.at_partition)
        if early:
            early.append(output)  # behind one that waits for its input: the order is kept
        elif not self._match(output):
            self._early.setdefault(output.at_partition, deque()).append(output)

    def settle(self) -> None:
        """Look again at the outputs whose inputs weren't read yet."""
        for waiting in self._early.values():
            while waiting and self._match(waiting[0]):
                waiting.popleft()

    def finish(self) -> Verdict:
        """Both sides were read to their ends."""
        self.settle()
        verdict = self.verdict
        for record in self._pending.values():
            place = f"at [{record.partition}]@{record.offset}"
            verdict.found(
                "lost", f"input {record.id} (key {record.key}, sequence {record.sequence}, {place})"
            )
        for waiting in self._early.values():
            for output in waiting:
                verdict.found("unexpected", _describe(output))
        verdict.keys = len(self._keys)
        return verdict

    def state(self) -> dict[str, dict[str, int]]:
        """What the job's state must be after all inputs that were taken."""
        return {name: {"count": totals.count, "sum": totals.sum} for name, totals in self._inputs.items()}

    @property
    def under_way(self) -> int:
        """Inputs without an output so far."""
        return len(self._pending)

    def _group(self, key: str) -> str:
        return group_of(key, self._group_count) if self._group_count else key

    def _match(self, output: OutputRecord) -> bool:
        """Judge it; False if its input isn't read yet."""
        key = self._keys.get(output.key)
        if key is None or output.sequence > key.read:
            return False
        verdict = self.verdict
        verdict.outputs += 1
        record = self._pending.pop(output.id, None)
        if record is None:
            kind = "repeated" if output.sequence <= key.seen else "unexpected"
            verdict.found(kind, _describe(output))
            return True
        if output.sequence != key.seen + 1:
            verdict.found("sequence", f"{_describe(output)} behind sequence {key.seen}")
        key.seen = max(key.seen, output.sequence)
        self._judge(output, record)
        return True

    def _judge(self, output: OutputRecord, record: InputRecord) -> None:
        name = self._group(record.key)
        group = self._groups.setdefault(name, _Group())
        wanted = (record.key, record.sequence, name, group.count + 1, group.sum + record.value)
        got = (output.key, output.sequence, output.group, output.count, output.sum)
        if wanted != got:
            self.verdict.found("wrong", f"{_describe(output)}: {got}, should be {wanted}")
        if output.partition >= 0 and (output.partition, output.offset) != (record.partition, record.offset):
            self.verdict.found("wrong", f"{_describe(output)}: its input is at {record.partition}")
        if group.place not in (-1, output.at_partition):
            self.verdict.found("misplaced", f"{_describe(output)}: {name} was in {group.place} before")
        # From what it says: one wrong sum is one finding.
        group.count, group.sum, group.place = output.count, output.sum, output.at_partition


def _describe(output: OutputRecord) -> str:
    at = f"[{output.at_partition}]@{output.at_offset}"
    return f"output of {output.id} (key {output.key}, sequence {output.sequence}) at {at}"


@dataclass
class Blocks:
    """What was read of a partition, in order: a hash for each block of records, and where each block ends."""

    ends: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    count: int = 0
    _hash: blake2b = field(default_factory=lambda: blake2b(digest_size=16))

    def take(self, offset: int, value: bytes | None) -> None:
        """The next record."""
        self._hash.update(b"%d:%d:" % (offset, len(value or b"")))
        self._hash.update(value or b"")
        self.count += 1
        if self.count % BLOCK_RECORDS == 0:
            self.ends.append((offset, self._hash.digest()))

    def whole(self) -> list[tuple[int, bytes]]:
        """All blocks and the hash of everything."""
        return [*self.ends, (self.count, self._hash.digest())]


def judge_blocks(live: Mapping[int, Blocks], final: Mapping[int, Blocks]) -> Verdict:
    """Whether a live reader saw what a later one sees, record by record."""
    verdict = Verdict("live reader")
    for partition, later in final.items():
        seen = live.get(partition, Blocks())
        pairs = zip(seen.whole(), later.whole(), strict=False)
        differing = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
        if differing is not None or seen.count != later.count:
            where = f"[{partition}] near record {(differing or 0) * BLOCK_RECORDS}"
            kind = "skipped" if seen.count < later.count else "vanished"
            verdict.found(kind, f"{where}: {seen.count} were seen live, {later.count} are there later")
    verdict.notes.append("the live reader saw what a later one sees, compared by hashes of blocks")
    return verdict


class Aborted:
    """Outputs that a read_uncommitted reader saw and a read_committed one passed over: when each was seen."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []
        self._uncommitted: dict[int, deque[tuple[int, int]]] = {}

    def saw(self, partition: int, offset: int, seen_ns: int) -> None:
        """By the read_uncommitted reader, in order."""
        self._uncommitted.setdefault(partition, deque()).append((offset, seen_ns))

    def committed(self, partition: int, offset: int) -> None:
        """By the read_committed reader, in order: what it passed over before this offset was aborted."""
        waiting = self._uncommitted.get(partition, deque())
        while waiting and waiting[0][0] < offset:
            self.times_ns.append(waiting.popleft()[1])
        if waiting and waiting[0][0] == offset:
            waiting.popleft()

    def finish(self) -> None:
        """Nothing is under way any more: what is left was aborted."""
        for waiting in self._uncommitted.values():
            self.times_ns.extend(seen_ns for _offset, seen_ns in waiting)
            waiting.clear()

    def between(self, begin_ns: float, end_ns: float) -> int:
        """How many were seen in that time."""
        return sum(begin_ns <= seen_ns <= end_ns for seen_ns in self.times_ns)


class StreamCheck:
    """Reads source and output of a job beside it, and judges at once.

    Args:
        brokers: bootstrap servers.
        source: the job's source topic.
        output: its output topic.
        group_count: as in `Fold`.
    """

    def __init__(self, brokers: str, source: str, output: str, group_count: int = 0) -> None:
        self.fold = Fold(group_count)
        self.aborted = Aborted()
        self.newest_ns: dict[int, int] = {}
        self.blocks: dict[int, Blocks] = {}
        self._brokers, self._source, self._output = brokers, source, output
        self._reached: dict[tuple[str, int], int] = {}
        self._committed_to: dict[int, int] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stream check", daemon=True)

    def start(self) -> StreamCheck:
        """Begin to read, from the beginning of the topics."""
        self.newest_ns = dict.fromkeys(partitions_of(self._brokers, self._output), 0)
        self.blocks = {partition: Blocks() for partition in self.newest_ns}
        self._thread.start()
        return self

    def check(self) -> None:
        """Raises AssertionError as soon as something was found, and what the thread failed with."""
        if self._error is not None:
            raise self._error
        assert self.fold.verdict.ok, self.fold.verdict.report()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream check doesn't end"

    def finish(self, timeout_s: float = 60) -> Verdict:
        """The job has come to rest: read everything to its end, and judge.

        Raises:
            TimeoutError: the ends aren't reached in time.
        """
        ends = {
            (*at, isolation): end
            for topic, isolation in self._sides
            for at, end in end_offsets(self._brokers, [topic], isolation).items()
        }
        deadline = time.monotonic() + timeout_s
        while any(self._reached.get(_side(*at), 0) < end for at, end in ends.items()):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the stream check is at {self._reached}, not at {ends}")
            time.sleep(0.05)
        self.stop()
        self.check()
        self.aborted.finish()
        verdict = self.fold.finish()
        return verdict.merge(judge_blocks(self.blocks, read_blocks(self._brokers, self._output)))

    @property
    def _sides(self) -> tuple[tuple[str, str], ...]:
        return (
            (self._source, READ_COMMITTED),
            (self._output, READ_COMMITTED),
            (self._output, READ_UNCOMMITTED),
        )

    def _run(self) -> None:
        consumers: list[Consumer] = []
        try:
            for topic, isolation in self._sides:
                consumer = new_consumer(
                    self._brokers, isolation, **{"auto.offset.reset": "earliest", "fetch.wait.max.ms": 50}
                )
                consumers.append(consumer)
                partitions = partitions_of(self._brokers, topic)
                consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
            takers = (self._take_input, self._take_output, self._take_uncommitted)
            while not self._stop.is_set():
                for (topic, isolation), consumer, take in zip(self._sides, consumers, takers, strict=True):
                    for message in consumer.consume(_BATCH_RECORDS, 0.02):
                        self._take(message, topic, isolation, take)
                self.fold.settle()
        except BaseException as error:  # noqa: BLE001 - handed to the next caller
            self._error = error
        finally:
            for consumer in consumers:
                consumer.close()

    def _take(self, message: Message, topic: str, isolation: str, take: object) -> None:
        partition, offset = message.partition(), message.offset()
        assert partition is not None
        assert offset is not None
        error = message.error()
        at = _side(topic, partition, isolation)
        if error is None:
            take(partition, offset, message.value())  # type: ignore[operator]
            self._reached[at] = offset + 1
        elif error.code() == KafkaError._PARTITION_EOF:
            self._reached[at] = max(offset, self._reached.get(at, 0))
        elif error.code() not in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT) and (
            error.fatal() or not error.retriable()
        ):
            raise KafkaException(error)

    def _take_input(self, partition: int, offset: int, value: bytes | None) -> None:
        self.fold.take_input(decode_input(value, partition, offset))

    def _take_output(self, partition: int, offset: int, value: bytes | None) -> None:
        self.blocks[partition].take(offset, value)
        self.aborted.committed(partition, offset)
        try:
            output = decode_output(value, partition, offset)
        except MalformedRecord as error:
            self.fold.verdict.found("malformed", str(error))
            return
        self.newest_ns[partition] = output.produced_at_ns
        self.fold.take_output(output)
        self._committed_to[partition] = offset

    def _take_uncommitted(self, partition: int, offset: int, value: bytes | None) -> None:
        if offset > self._committed_to.get(partition, -1):
            self.aborted.saw(partition, offset, time.time_ns())


def _side(topic: str, partition: int, isolation: str) -> tuple[str, int]:
    return f"{topic} {isolation}", partition


def read_blocks(brokers: str, topic: str, timeout_s: float = 600) -> dict[int, Blocks]:
    """The hashes of all that a read_committed reader finds in `topic` now, from its beginning to its end.

    Raises:
        TimeoutError: the end was not reached in time.
    """
    ends = {at[1]: end for at, end in end_offsets(brokers, [topic], READ_COMMITTED).items()}
    found = {partition: Blocks() for partition in ends}
    unread = {partition for partition, end in ends.items() if end > 0}
    consumer = new_consumer(brokers, READ_COMMITTED, **{"auto.offset.reset": "earliest"})
    deadline = time.monotonic() + timeout_s
    try:
        consumer.assign([TopicPartition(topic, partition, 0) for partition in sorted(unread)])
        while unread:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} {sorted(unread)} not read to {ends} in {timeout_s} s")
            for message in consumer.consume(5000, 0.2):
                partition, offset, error = message.partition(), message.offset(), message.error()
                assert partition is not None
                assert offset is not None
                if error is None:
                    found[partition].take(offset, message.value())
                elif error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                if offset + (error is None) >= ends[partition]:
                    unread.discard(partition)
    finally:
        consumer.close()
    return found
