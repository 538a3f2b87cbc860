"""Reads source topics: one thread for each consumer, the only user of that consumer.

Responsible for: passing batches of records to the main thread, with the generation of the assignment under
which they were read. Changes of the assignment are queued, and the reading thread carries them out between
two reads. So a batch's generation tells exactly which changes came before it, and records fetched before a
rewind can't be mistaken for records after it.

Every queue is bounded. At most `BATCHES_AHEAD_MAX` batches wait for the main thread. Then reading stops, and
librdkafka's own queue fills up to its limit. Records that then wait elsewhere (`merges`) are bounded there,
by pausing single partitions.

There are two ways to fetch. Each has its own consumer, since a consumer's settings can't be changed.
*Patient*: the broker answers with the first record, or after a tenth of a second. This costs next to nothing
while there is nothing to read. *Gathering*: the broker collects records for some milliseconds. This costs a
constant number of requests, which is far less than one for each record once records come in steadily. The
reader switches between them depending on what arrives. See docs/decisions/0031-two-ways-to-fetch.md.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from fcluster.common.offsets import Offset, offset_or_none

BATCH_RECORDS_MAX = 5_000
BATCHES_AHEAD_MAX = 3
POLL_TIMEOUT_S = 0.05
"""How long a read waits for a first record. A change of the assignment may wait as long."""

PATIENT_FETCH: Final[Mapping[str, int]] = {"fetch.min.bytes": 1, "fetch.wait.max.ms": 100}
"""A partition that is added has to wait for the answer that is under way for partitions without records."""
GATHERING_FETCH: Final[Mapping[str, int]] = {"fetch.min.bytes": 100_000, "fetch.wait.max.ms": 5}
GATHER_ABOVE_READS_PER_S = 150
BE_PATIENT_AFTER_S = 2.0
"""Without a record, a read waits this long."""
LOOK_INTERVAL_S = 1.0
"""How often the reader reports its positions while records come, and looks for changes of positions without
records.
"""
CONNECT_TIMEOUT_S = 2.0
LOOK_FOR_TOPIC_INTERVAL_S = 0.5

SourcePartition = tuple[str, int]
Hold = Literal["full", "ahead"]
"""Why a partition is paused: enough of it waits to be processed (or it is read to the end of a bounded run),
or it is too far ahead of others in event time. It is read again once there is no reason left.
"""


class BatchSource(Protocol):
    """A source of batches: a reader, or a merge that puts the readers' records in order."""

    @property
    def newest_generation(self) -> int:
        """Records of older batches may belong to partitions that were rewound or released."""
        ...

    def done(self) -> None:
        """A batch was processed or dropped, so there is room for another one."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of the partitions assigned in `generation`. `full`: there are certainly more.

    `standings`: for watched partitions, up to where they are read with this batch, and where they end. None:
    unknown.
    """

    reader: BatchSource
    generation: int
    messages: list[Message]
    full: bool
    standings: Mapping[SourcePartition, tuple[int, Offset | None]] = field(
        default_factory=dict[SourcePartition, tuple[int, Offset | None]]
    )


@dataclass(frozen=True, slots=True)
class ReadUpTo:
    """The consumer's positions, including control records. It is sent when no more records came for a while,
    and from time to time.

    It comes after all batches read before it. `ends` leaves out partitions whose end isn't known (yet, or
    while their leader moves).
    """

    reader: SourceReader
    generation: int
    positions: dict[SourcePartition, int]
    ends: dict[SourcePartition, Offset]


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """The consumer reported an error that continued reading doesn't fix. `partition` is -1 if the error
    doesn't belong to one.
    """

    topic: str
    partition: int
    offset: int
    error: KafkaError


@dataclass(frozen=True, slots=True)
class ReaderDied:
    """The reading thread has ended with an unexpected error: nothing more will be read."""

    reason: str


ReaderEvent = Batch | ReadUpTo | ReadFailed | ReaderDied

_TRANSIENT_ERRORS = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError._RESOLVE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError._PARTITION_EOF,
    }
)


_UNKNOWN_TOPIC = frozenset(
    {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC}
)


class SourceReader:
    """The records of some source partitions, read by its own thread.

    Args:
        make_consumer: creates a consumer that fetches as its argument says. Only this reader assigns
            partitions to it.
        emit: called in the reading thread with each event. It must not block.
        name: the thread's name.
        topics: the topics that it will be told to read. Consumers connect to their leaders in advance.
    """

    def __init__(
        self,
        make_consumer: Callable[[Mapping[str, int]], Consumer],
        emit: Callable[[ReaderEvent], None],
        name: str,
        topics: Sequence[str] = (),
    ) -> None:
        self._make_consumer = make_consumer
        self._consumer = make_consumer(PATIENT_FETCH)
        self._topics = tuple(topics)
        self._resting: Consumer | None = None  # the consumer for the other way to fetch, once there was need
        self._connecting: threading.Thread | None = None  # the thread that creates it
        self._gathering = False
        self._last_record_s = 0.0
        self._reads_since_s = 0.0
        self._reads = 0
        self._emit = emit
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._commanded = threading.Event()
        self._room = threading.Semaphore(BATCHES_AHEAD_MAX)
        self._generation = 0
        self._assigned: dict[SourcePartition, int] = {}
        self._told: tuple[dict[SourcePartition, int], dict[SourcePartition, Offset]] = ({}, {})
        self._paused = False
        self._closed = False
        self._told_s = 0.0
        self._looked_s = float("-inf")
        self._may_have_moved = True
        self._commands_given = 0
        self._watched: set[SourcePartition] = set()
        self._held: dict[SourcePartition, set[Hold]] = {}
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # --- called by the main thread ----------------------------------------------------------------------

    @property
    def newest_generation(self) -> int:
        """The generation of the batches that follow the last change of the assignment."""
        return self._commands_given

    def start(self, offsets: dict[SourcePartition, int], *, watched: bool = False) -> int:
        """Read these partitions from these offsets on. Returns the generation of the batches that follow.

        `watched`: each batch reports their positions, see `Batch.standings`.
        """
        return self._command(lambda: self._start(offsets, watched))

    def stop(self, partitions: set[SourcePartition]) -> int:
        """Stop reading these partitions. Returns the generation of the batches that follow."""
        return self._command(lambda: self._stop(partitions))

    def hold(self, partition: SourcePartition, why: Hold = "full") -> None:
        """Pause this partition until `release`. Records that were already read still come."""
        self._run_soon(lambda: self._hold(partition, why))

    def release(self, partition: SourcePartition, why: Hold = "full") -> None:
        """Resume reading a partition that was held, unless it is held for another reason as well."""
        self._run_soon(lambda: self._release(partition, why))

    def pause(self) -> None:
        """Read nothing until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Resume reading."""
        self._paused = False
        self._commanded.set()

    def done(self) -> None:
        """A batch was processed or dropped, so there is room for another one."""
        self._room.release()

    def close(self, timeout_s: float) -> None:
        """Stop the thread and close the consumer, waiting at most `timeout_s`."""
        self._closed = True
        self._commanded.set()
        self._thread.join(timeout_s)

    # --- the reading thread -----------------------------------------------------------------------------

    def _command(self, command: Callable[[], None]) -> int:
        def change() -> None:
            command()
            self._generation += 1

        self._commands_given += 1
        self._run_soon(change)
        return self._commands_given

    def _run_soon(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._commanded.set()

    def _run(self) -> None:
        try:
            self._connect(self._consumer)
            while not self._closed:
                self._carry_out_commands()
                if self._paused or not self._assigned:
                    self._commanded.wait(1.0)
                elif self._room.acquire(timeout=POLL_TIMEOUT_S):
                    self._read()
                elif self._is_time_to_look():
                    # A slow handler may leave no room for minutes. Meanwhile the client learns where the
                    # partitions end.
                    self._tell_position()
        except Exception as error:
            # If it ended silently, the source would seem idle.
            self._emit(ReaderDied(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._consumer.close()
            if self._connecting is not None:
                self._connecting.join()
            if self._resting is not None:
                self._resting.close()

    def _connect(self, consumer: Consumer) -> None:
        """Find the topics' leaders in advance, so that reading need not wait for them when there are
        records.
        """
        for topic in self._topics:
            with contextlib.suppress(KafkaException):  # reading will report what is wrong
                consumer.list_topics(topic, timeout=CONNECT_TIMEOUT_S)

    def _make_resting(self, fetching: Mapping[str, int]) -> None:
        """Runs in its own thread: reading goes on meanwhile."""
        consumer = self._make_consumer(fetching)
        self._connect(consumer)
        self._resting = consumer

    def _carry_out_commands(self) -> None:
        self._commanded.clear()
        while not self._commands.empty():
            self._commands.get()()

    def _start(self, offsets: dict[SourcePartition, int], watched: bool) -> None:
        self._stop(set(offsets))
        if watched:
            self._watched |= offsets.keys()
        self._consumer.incremental_assign(
            [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]
        )
        self._assigned |= offsets
        self._may_have_moved = True
        self._told = ({}, {})

    def _stop(self, partitions: set[SourcePartition]) -> None:
        leaving = partitions & self._assigned.keys()
        self._watched -= partitions
        for partition in partitions & self._held.keys():
            self._resume(partition)
        if leaving:
            self._consumer.incremental_unassign([TopicPartition(*partition) for partition in leaving])
            for partition in leaving:
                del self._assigned[partition]

    def _hold(self, partition: SourcePartition, why: Hold) -> None:
        if partition in self._assigned:
            self._held.setdefault(partition, set()).add(why)
            self._consumer.pause([TopicPartition(*partition)])

    def _release(self, partition: SourcePartition, why: Hold) -> None:
        reasons = self._held.get(partition)
        if reasons is not None:
            reasons.discard(why)
            if not reasons:
                self._resume(partition)

    def _resume(self, partition: SourcePartition) -> None:
        del self._held[partition]
        self._consumer.resume([TopicPartition(*partition)])

    def _read(self) -> None:
        # poll() returns with the first record; consume() would wait for the whole batch.
        first = self._consumer.poll(POLL_TIMEOUT_S)
        if first is None:
            self._room.release()
            # Rarely look for what moves the position without a record (an aborted transaction's marker).
            if self._may_have_moved or self._is_time_to_look():
                self._tell_position()
            if self._gathering and time.monotonic() - self._last_record_s > BE_PATIENT_AFTER_S:
                self._change_fetching()
            return
        rest: list[Message] = self._consumer.consume(BATCH_RECORDS_MAX - 1, 0)
        batch = [first, *rest]
        errors = [message for message in batch if message.error() is not None]
        if errors:
            batch = [message for message in batch if message.error() is None]
            for message in errors:
                self._report_error(message)
        self._may_have_moved = True
        if batch:
            full = len(batch) >= BATCH_RECORDS_MAX // 2
            standings = self._standings() if self._watched else {}
            self._emit(Batch(self, self._generation, batch, full, standings))
        else:
            self._room.release()
        if self._is_time_to_look():
            # Other partitions may be at their end, although this one always has records.
            self._tell_position()
        self._count_read()

    def _standings(self) -> dict[SourcePartition, tuple[int, Offset | None]]:
        """The positions of watched partitions, as far as the brokers' last answers tell."""
        try:
            positions = self._positions(self._watched)
            return {partition: (at, self._known_end(partition)) for partition, at in positions.items()}
        except KafkaException:
            return {}  # a later batch will tell

    def _known_end(self, partition: SourcePartition) -> Offset | None:
        _begin, answer = self._consumer.get_watermark_offsets(TopicPartition(*partition), cached=True)
        return offset_or_none(answer)

    def _count_read(self) -> None:
        """Switch to gathering once records come so steadily that nearly every one would be a response of its
        own.
        """
        self._last_record_s = now_s = time.monotonic()
        self._reads += 1
        if now_s - self._reads_since_s >= 1.0:
            if not self._gathering and self._reads > GATHER_ABOVE_READS_PER_S:
                self._change_fetching()
            self._reads_since_s, self._reads = now_s, 0

    def _change_fetching(self) -> None:
        """Continue with the other consumer from this one's positions, once the other one exists and is
        connected.
        """
        if self._resting is None:
            if self._connecting is None:
                self._connecting = threading.Thread(
                    target=self._make_resting, args=(GATHERING_FETCH,), name="connecting", daemon=True
                )
                self._connecting.start()
            return
        offsets = self._positions(self._assigned)
        held = [TopicPartition(*partition) for partition in self._held]
        if held:
            self._consumer.resume(held)  # this consumer may have to read them again
        self._consumer.incremental_unassign([TopicPartition(*partition) for partition in offsets])
        self._consumer, self._resting = self._resting, self._consumer
        self._gathering = not self._gathering
        self._consumer.incremental_assign(
            [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]
        )
        self._assigned = offsets
        if held:
            self._consumer.pause(held)

    def _positions(self, partitions: Iterable[SourcePartition]) -> dict[SourcePartition, int]:
        # Where nothing was read yet, the position is where reading began.
        positions = {partition: self._assigned[partition] for partition in partitions}
        for where in self._consumer.position([TopicPartition(*partition) for partition in positions]):
            offset = offset_or_none(where.offset)
            if offset is not None:
                positions[where.topic, where.partition] = offset
        return positions

    def _look_for_topic(self, topic: str) -> None:
        """Ask for the topic's metadata: otherwise a client may take minutes to see a new partition."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_FOR_TOPIC_INTERVAL_S:
            self._looked_s = now_s
            with contextlib.suppress(KafkaException):  # it will be reported again
                self._consumer.list_topics(topic, timeout=CONNECT_TIMEOUT_S)

    def _report_error(self, message: Message) -> None:
        error: Any = message.error()
        if error.code() in _UNKNOWN_TOPIC:
            self._look_for_topic(message.topic() or "")
        if error.code() not in _TRANSIENT_ERRORS:
            partition, offset = message.partition(), message.offset()
            self._emit(
                ReadFailed(
                    message.topic() or "",
                    -1 if partition is None else partition,
                    -1 if offset is None else offset,
                    error,
                )
            )

    def _is_time_to_look(self) -> bool:
        return time.monotonic() - self._told_s >= LOOK_INTERVAL_S

    def _tell_position(self) -> None:
        self._told_s = time.monotonic()
        ends: dict[SourcePartition, Offset] = {}
        try:
            positions = self._positions(self._assigned)
            for partition in positions:
                end = self._known_end(partition)
                if end is not None:
                    ends[partition] = end
        except KafkaException:
            return  # the next report will tell
        # If the end isn't known or not reached, records (or control records) are still to be fetched.
        self._may_have_moved = any(
            partition not in ends or position < ends[partition] for partition, position in positions.items()
        )
        if (positions, ends) == self._told:
            return
        self._told = (positions, ends)
        self._emit(ReadUpTo(self, self._generation, positions, ends))
