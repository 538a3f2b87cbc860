"""The checker for runs that are too long to be kept in memory.

Responsible for: `Fold`, the verdict of `verdict.py` record by record, which keeps only the keys and what is
in flight in memory (pure); and `StreamCheck`, one thread that feeds it from Kafka while the job runs, and
finds what a read_uncommitted reader saw that was never committed. At the end it reads the whole output again
and compares it with what was read live, by hashes of blocks.

The kinds of findings are those of `verdict`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from tests.checker.reading import (
    READ_COMMITTED,
    READ_UNCOMMITTED,
    end_offsets,
    known_partitions,
    new_consumer,
)
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
GIVEN_UP_S = 30.0
"""An input, if there is one, is read long before that."""


@dataclass(slots=True)
class _Key:
    """The progress of a key: up to which sequence it was read in the source, where, and which inputs have no
    output so far.

    `waiting` has inputs in the order of the source. `passed` has those that the output of a later input
    overtook.
    """

    read: int = 0
    source: int = -1
    waiting: deque[InputRecord] = field(default_factory=deque[InputRecord])
    passed: list[InputRecord] = field(default_factory=list[InputRecord])


@dataclass(slots=True)
class _Group:
    count: int = 0
    sum: int = 0
    place: int = -1


class Fold:
    """The verdict on a totals job, plain or regrouped, record by record.

    Inputs and outputs may be interleaved in any way, and outputs may come before their inputs, but each side
    keeps its own order. A record may be in the source more than once, because the test's producer wrote it
    again (see `repeats`). Each time counts as its own input, with its own output.

    Args:
        group_count: the number of groups of the regrouping job. 0: the plain job, which counts by key.
    """

    def __init__(self, group_count: int = 0) -> None:
        self.verdict = Verdict("soak")
        self._group_count = group_count
        self._keys: dict[str, _Key] = {}
        self._groups: dict[str, _Group] = {}
        self._read_to: dict[int, int] = {}
        self._early: dict[int, deque[OutputRecord]] = {}
        self._inputs: dict[str, _Group] = {}

    def take_input(self, record: InputRecord) -> None:
        """Take the next record of its source partition."""
        verdict = self.verdict
        verdict.inputs += 1
        key = self._keys.setdefault(record.key, _Key())
        if record.sequence > key.read + 1:
            verdict.found("input", f"key {record.key}: sequence {record.sequence} behind {key.read}")
        if record.sequence <= key.read:
            verdict.repeated_inputs += 1
        if key.source not in (-1, record.partition):
            verdict.found("input", f"key {record.key} in partitions {key.source} and {record.partition}")
        key.read, key.source = max(key.read, record.sequence), record.partition
        totals = self._inputs.setdefault(self._group(record.key), _Group())
        totals.count += 1
        totals.sum += record.value
        key.waiting.append(record)
        self._read_to[record.partition] = record.offset

    def take_output(self, output: OutputRecord) -> None:
        """Take the next record of its output partition."""
        early = self._early.get(output.at_partition)
        if early:
            early.append(output)  # after one that waits for its input, to keep the order
        elif not self._match(output):
            self._early.setdefault(output.at_partition, deque()).append(output)

    def settle(self, given_up: Iterable[int] = ()) -> None:
        """Check again the outputs whose inputs hadn't been read yet.

        Args:
            given_up: output partitions whose first waiting output is judged without its input.
        """
        for partition in given_up:
            self._match(self._early[partition].popleft(), is_final=True)
        for waiting in self._early.values():
            while waiting and self._match(waiting[0]):
                waiting.popleft()

    def early(self) -> dict[int, int]:
        """By output partition, the offset of the first output that waits for its input."""
        return {partition: waiting[0].at_offset for partition, waiting in self._early.items() if waiting}

    def finish(self) -> Verdict:
        """Both sides have been read to their ends."""
        while early := self.early():
            self.settle(early)
        verdict = self.verdict
        for record in sorted(self._lacking(), key=lambda record: record.id):
            place = f"at [{record.partition}]@{record.offset}"
            verdict.found(
                "lost", f"input {record.id} (key {record.key}, sequence {record.sequence}, {place})"
            )
        if verdict.repeated_inputs:
            verdict.notes.append(
                f"{verdict.repeated_inputs} records stand in the source again: its producer had to begin a "
                "new epoch"
            )
        verdict.keys = len(self._keys)
        return verdict

    def state(self) -> dict[str, dict[str, int]]:
        """What the job's state must be after all inputs so far."""
        return {name: {"count": totals.count, "sum": totals.sum} for name, totals in self._inputs.items()}

    @property
    def under_way(self) -> int:
        """Inputs without an output so far. Another thread may add keys meanwhile."""
        return sum(len(key.waiting) + len(key.passed) for key in list(self._keys.values()))

    def _lacking(self) -> Iterator[InputRecord]:
        for key in self._keys.values():
            yield from key.passed
            yield from key.waiting

    def _group(self, key: str) -> str:
        return group_of(key, self._group_count) if self._group_count else key

    def _match(self, output: OutputRecord, is_final: bool = False) -> bool:
        """Judge it. Returns False if its input may not have been read yet."""
        key = self._keys.get(output.key)
        if not is_final and (key is None or output.sequence > key.read or self._is_ahead(output)):
            return False
        record = self._take_waiting(key, output) if key is not None else None
        if record is None and not is_final and output.partition < 0:
            return False  # it doesn't say which input it belongs to, which may be one that was written again
        verdict = self.verdict
        verdict.outputs += 1
        if record is None:
            kind = "repeated" if key is not None and output.sequence <= key.read else "unexpected"
            verdict.found(kind, _describe(output))
        else:
            self._judge(output, record)
        return True

    def _is_ahead(self, output: OutputRecord) -> bool:
        return output.partition >= 0 and output.offset > self._read_to.get(output.partition, -1)

    def _take_waiting(self, key: _Key, output: OutputRecord) -> InputRecord | None:
        """The first input without an output that has this id. It is a finding if that isn't the key's next
        one.
        """
        waiting = key.waiting
        for nth, record in enumerate(waiting):
            if record.id == output.id:
                if nth:
                    first = waiting[0].sequence
                    self.verdict.found("sequence", f"{_describe(output)} before that of sequence {first}")
                for _ in range(nth):
                    key.passed.append(waiting.popleft())
                return waiting.popleft()
        for record in key.passed:
            if record.id == output.id:
                key.passed.remove(record)
                return record
        return None

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
        # Continue with the output's own numbers, so that one wrong sum is one finding.
        group.count, group.sum, group.place = output.count, output.sum, output.at_partition


def _describe(output: OutputRecord) -> str:
    at = f"[{output.at_partition}]@{output.at_offset}"
    return f"output of {output.id} (key {output.key}, sequence {output.sequence}) at {at}"


@dataclass
class Blocks:
    """What was read from a partition, in order: a hash for each block of records, and the end of each
    block.
    """

    ends: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    count: int = 0
    _hash: blake2b = field(default_factory=lambda: blake2b(digest_size=16))

    def take(self, offset: int, value: bytes | None) -> None:
        """Take the next record."""
        self._hash.update(b"%d:%d:" % (offset, len(value or b"")))
        self._hash.update(value or b"")
        self.count += 1
        if self.count % BLOCK_RECORDS == 0:
            self.ends.append((offset, self._hash.digest()))

    def whole(self) -> list[tuple[int, bytes]]:
        """All blocks, and the hash of everything."""
        return [*self.ends, (self.count, self._hash.digest())]


def judge_blocks(live: Mapping[int, Blocks], final: Mapping[int, Blocks]) -> Verdict:
    """Whether a live reader saw what a later reader sees, record by record."""
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
    """Outputs that a read_uncommitted reader saw and a read_committed reader didn't: when each was seen."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []
        self._uncommitted: dict[int, deque[tuple[int, int]]] = {}

    def saw(self, partition: int, offset: int, seen_ns: int) -> None:
        """Note what the read_uncommitted reader saw, in order."""
        self._uncommitted.setdefault(partition, deque()).append((offset, seen_ns))

    def committed(self, partition: int, offset: int) -> None:
        """Note what the read_committed reader saw, in order. What it passed over before this offset was
        aborted.
        """
        waiting = self._uncommitted.get(partition, deque())
        while waiting and waiting[0][0] < offset:
            self.times_ns.append(waiting.popleft()[1])
        if waiting and waiting[0][0] == offset:
            waiting.popleft()

    def finish(self) -> None:
        """Nothing is in flight any more, so what is left was aborted."""
        for waiting in self._uncommitted.values():
            self.times_ns.extend(seen_ns for _offset, seen_ns in waiting)
            waiting.clear()

    def between(self, begin_ns: float, end_ns: float) -> int:
        """How many were seen in that time."""
        return sum(begin_ns <= seen_ns <= end_ns for seen_ns in self.times_ns)


class StreamCheck:
    """Reads source and output of a job while it runs, and judges at once.

    Args:
        brokers: bootstrap servers.
        source: the job's source topic.
        output: the job's output topic.
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
        self._early_since_s: dict[tuple[int, int], float] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stream check", daemon=True)

    def start(self) -> StreamCheck:
        """Begin to read, from the beginning of the topics."""
        self.newest_ns = dict.fromkeys(known_partitions(self._brokers, self._output), 0)
        self.blocks = {partition: Blocks() for partition in self.newest_ns}
        self._thread.start()
        return self

    def check(self) -> None:
        """Raises AssertionError as soon as something was found, and raises the thread's own error."""
        if self._error is not None:
            raise self._error
        assert self.fold.verdict.ok, self.fold.verdict.report()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream check doesn't end"

    def finish(self, timeout_s: float = 60) -> Verdict:
        """The job has stopped. Read everything to its end, and judge.

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
                partitions = known_partitions(self._brokers, topic)
                consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
            takers = (self._take_input, self._take_output, self._take_uncommitted)
            while not self._stop.is_set():
                for (topic, isolation), consumer, take in zip(self._sides, consumers, takers, strict=True):
                    for message in consumer.consume(_BATCH_RECORDS, 0.02):
                        self._take(message, topic, isolation, take)
                self.fold.settle(self._given_up())
        except BaseException as error:  # noqa: BLE001 - raised in the next caller
            self._error = error
        finally:
            for consumer in consumers:
                consumer.close()

    def _given_up(self) -> list[int]:
        """Output partitions whose next output has waited for its input for too long."""
        now_s, early = time.monotonic(), self.fold.early()
        known = self._early_since_s
        self._early_since_s = {at: known.get(at, now_s) for at in early.items()}
        return [
            partition
            for (partition, _), since_s in self._early_since_s.items()
            if now_s - since_s > GIVEN_UP_S
        ]

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
    """The hashes of everything that a read_committed reader finds in `topic` now, from its beginning to its
    end.

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
