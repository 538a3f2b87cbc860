"""Records that wait for calls to other services, and are processed when these are done.

Responsible for: the records of the shards that make calls (`ShardCalls`), from their reading until their
calls are done; the limit on them; and the calls of all shards (`WaitingCalls`). `engine.call_scheduler`
decides when a call is made, and `call_thread` makes it. The next records whose calls are done leave here as a
batch, which is processed like a batch from a reader. Belongs to the main thread.

Invariants:
- A record that waits isn't part of any epoch: its position isn't reached. So a barrier waits for no call.
- Records leave in the order in which they came. So a shard processes them in the order in which it would do
  so without calls.

Must not: process records, or know of epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from confluent_kafka import Message

from fcluster.common.ids import ShardId
from fcluster.engine.call_scheduler import NEVER_MS, CallScheduler
from fcluster.engine.calling import RecordCalls
from fcluster.engine.records import describe_record
from fcluster.graph.operators import MapAsync
from fcluster.worker.call_thread import CallThread
from fcluster.worker.consuming import Batch, SourcePartition, SourceReader
from fcluster.worker.merges import (
    BATCH_RECORDS_MAX,
    HELD_ABOVE_BYTES,
    HELD_ABOVE_RECORDS,
    ORDERED,
    OUTDATED,
    RELEASED_BELOW,
)
from fcluster.worker.processing import InputRunner, ShardRunner

BEGUN_FOR_EACH_CALL: Final = 4
"""How many records of a shard wait with their calls, for each call that may run at the same time. It is more
than one, because calls of a key are made one after another, and a slow one holds up those behind it.
"""
BEGUN_MIN: Final = 64
THREADS_MAX: Final = 500
WAIT_S_MIN: Final = 0.001
WAIT_S_MAX: Final = 0.25
LOOK_GAP_MS_MAX: Final = 500
"""More time than this between two looks doesn't count for time-outs and pauses: the process was suspended, or
its main thread was busy, and there may be answers that nobody could take. `WAIT_S_MAX` is shorter.
"""
LONG_WAIT_MS: Final = 1_000
"""A record that waits for longer than this is reported."""


class ShardCalls:
    """The records of one running shard.

    Args:
        runner: the shard's runner.
        reader: the reader of its input. None: it has several inputs, and its records come from a merge.
    """

    def __init__(self, runner: ShardRunner, reader: SourceReader | None) -> None:
        self._runner = runner
        self._reader = reader
        self._input_of = {one.topic: one for one in runner.inputs}
        nodes = [
            node for chain in runner.stage.chains for node in chain.operators if isinstance(node, MapAsync)
        ]
        self._begun_max = max(BEGUN_MIN, BEGUN_FOR_EACH_CALL * max(node.concurrency for node in nodes))
        self._waiting: deque[Message] = deque()
        self._begun: deque[tuple[Message, RecordCalls | None]] = deque()
        self._merged: Batch | None = None
        self._given = False
        self._held = False
        self._size_bytes = self._begun_bytes = 0
        self._read_position = -1
        self.newest_generation = ORDERED

    # --- records come -------------------------------------------------------------------------------------

    def add(self, messages: Sequence[Message]) -> None:
        """The next records that were read from its input."""
        self._waiting += messages
        self._size_bytes += sum(map(len, messages))
        full = len(self._waiting) > HELD_ABOVE_RECORDS or self._size_bytes > HELD_ABOVE_BYTES
        if full and not self._held and self._reader is not None:
            self._held = True
            self._reader.hold(self._partition)

    def add_merged(self, batch: Batch) -> None:
        """The next records of its merge, which gives no others until these are processed."""
        self._merged = batch
        self.add(batch.messages)

    def note_read(self, position: int) -> None:
        """All records before this position were read."""
        self._read_position = position
        self._tell_position()

    @property
    def _partition(self) -> SourcePartition:
        return self._runner.inputs[0].topic, self._runner.inputs[0].partition

    @property
    def _is_empty(self) -> bool:
        return not (self._waiting or self._begun or self._given)

    def _tell_position(self) -> None:
        """If nothing waits, everything that was read has been processed."""
        one = self._runner.inputs[0]
        if self.newest_generation == ORDERED and self._merged is None and self._is_empty:
            one.read_position = max(self._read_position, one.read_position, one.next_offset)

    # --- calls begin --------------------------------------------------------------------------------------

    @property
    def may_begin(self) -> bool:
        """Whether the calls of another record may begin."""
        has_room = len(self._begun) < self._begun_max and self._begun_bytes < HELD_ABOVE_BYTES
        return bool(self._waiting) and (has_room or not self._begun)

    def next_record(self) -> tuple[InputRunner, Message]:
        """The record whose calls begin next, and the runner of its input. There must be one: `may_begin`."""
        message = self._waiting[0]
        return self._input_of[message.topic() or ""], message

    def is_behind_end(self, message: Message) -> bool:
        """Whether a bounded run ends in front of this record."""
        stop_at = self._input_of[message.topic() or ""].stop_at
        return stop_at is not None and (message.offset() or 0) >= stop_at

    def begun(self, calls: RecordCalls | None) -> None:
        """The calls of `next_record` have begun. None: it makes none."""
        message = self._waiting.popleft()
        self._size_bytes -= len(message)
        self._begun_bytes += len(message)
        self._begun.append((message, calls))
        low = (
            len(self._waiting) < RELEASED_BELOW * HELD_ABOVE_RECORDS
            and self._size_bytes < RELEASED_BELOW * HELD_ABOVE_BYTES
        )
        if self._held and low and self._reader is not None:
            self._held = False
            self._reader.release(self._partition)

    def leave_out(self) -> None:
        """`next_record` isn't processed: a bounded run ends in front of it."""
        self._size_bytes -= len(self._waiting.popleft())
        self._settle_if_empty()

    @property
    def oldest(self) -> Message | None:
        """The record for whose calls the others wait."""
        if self._begun:
            message, calls = self._begun[0]
            if calls is not None and not calls.is_done:
                return message
        return None

    # --- records go ---------------------------------------------------------------------------------------

    def next_batch(self) -> Batch | None:
        """The next records whose calls are done. None: there are none, or the last batch isn't processed."""
        if self._given:
            return None
        messages: list[Message] = []
        has_left_out = False
        while self._begun and len(messages) < BATCH_RECORDS_MAX:
            message, calls = self._begun[0]
            is_behind = self.is_behind_end(message)
            if not is_behind and calls is not None and not calls.is_done:
                break
            self._begun.popleft()
            self._begun_bytes -= len(message)
            if is_behind:
                has_left_out = True
            else:
                messages.append(message)
        if not messages:
            if has_left_out:
                self._settle_if_empty()
            return None
        self._given = True
        return Batch(self, self.newest_generation, messages, full=len(messages) == BATCH_RECORDS_MAX)

    def done(self) -> None:
        """See `BatchSource.done`."""
        self._given = False
        self._settle_if_empty()

    def _settle_if_empty(self) -> None:
        """If nothing waits, ask the merge for more, or tell how far the input is read."""
        if not self._is_empty:
            return
        if self._merged is not None:
            merged, self._merged = self._merged, None
            merged.reader.done()
        else:
            self._tell_position()

    def close(self) -> None:
        """The shard is no longer read. Its batches are outdated."""
        self.newest_generation = OUTDATED


class WaitingCalls:
    """The calls of all shards.

    Args:
        wake: called in another thread when calls have ended: `collect` has something to do.
        say: called with a line for the log when a circuit opens, and when it closes.
        concurrency: how many calls of a step run at the same time, at most.

    Attributes:
        shards: the running shards that make calls.
        at: those with one input, by its topic and partition.
        has_more: whether the calls of more records may begin at once. Set by those who begin them.
    """

    def __init__(self, wake: Callable[[], None], say: Callable[[str], None], concurrency: int) -> None:
        self._thread = CallThread(wake, min(concurrency, THREADS_MAX))
        self._scheduler = CallScheduler(say)
        self._oldest: Message | None = None
        self._oldest_since_ms = 0.0
        self._looked_ms: float | None = None
        self._passed_ms = 0.0
        self.shards: dict[ShardId, ShardCalls] = {}
        self.at: dict[SourcePartition, ShardCalls] = {}
        self.has_more = False

    # --- shards -------------------------------------------------------------------------------------------

    def start(self, runner: ShardRunner, reader: SourceReader | None) -> None:
        """A shard is read from now on. Has no effect if it makes no calls. See `ShardCalls`."""
        if any(one.calls is not None for one in runner.inputs):
            calls = self.shards[runner.shard] = ShardCalls(runner, reader)
            if reader is not None:
                self.at[runner.inputs[0].topic, runner.inputs[0].partition] = calls

    def stop(self, runner: ShardRunner) -> None:
        """A shard is no longer read. Its calls are given up."""
        calls = self.shards.pop(runner.shard, None)
        if calls is None:
            return
        calls.close()
        self.at = {at: found for at, found in self.at.items() if found is not calls}
        self._thread.give_up(self._scheduler.drop({one.calls for one in runner.inputs}))

    def close(self) -> None:
        """Make no more calls."""
        self._thread.close()

    # --- calls --------------------------------------------------------------------------------------------

    def collect(self, now_ms: float) -> None:
        """Take what has come of the calls."""
        self._looked_ms, self._passed_ms = now_ms, self._passed(now_ms)
        now_ms = self._passed_ms
        for attempt in self._thread.ended():
            if attempt.error is None:
                self._scheduler.succeeded(attempt.call, attempt.number, attempt.result)
            else:
                self._scheduler.failed(attempt.call, attempt.number, attempt.error, now_ms)
        self._thread.give_up(self._scheduler.expire(now_ms, lambda _call: self._blocked()))

    def _passed(self, now_ms: float) -> float:
        """The time of the scheduler. See `LOOK_GAP_MS_MAX`."""
        if self._looked_ms is None:
            return self._passed_ms
        return self._passed_ms + min(now_ms - self._looked_ms, LOOK_GAP_MS_MAX)

    def _blocked(self) -> str:
        where = self._thread.blocked_in()
        return f"; the event loop is blocked {where}" if where else ""

    def begin(self, shard: ShardCalls, calls: RecordCalls) -> None:
        """The calls of the shard's next record begin."""
        shard.begun(calls)
        self._scheduler.add(calls.first)

    def make(self, now_ms: float) -> None:
        """Make the calls that may be made now."""
        self._thread.make(self._scheduler.start(self._passed(now_ms)))

    def batches(self) -> Iterator[Batch]:
        """The next records whose calls are done."""
        for calls in self.shards.values():
            batch = calls.next_batch()
            if batch is not None:
                yield batch

    def wait_s(self, timeout_s: float, now_ms: float) -> float:
        """The timeout, or less if there is something to do before."""
        if self.has_more:
            return 0.0
        due_ms = self._scheduler.due_ms()
        if due_ms == NEVER_MS:
            return timeout_s
        return max(WAIT_S_MIN, min(timeout_s, WAIT_S_MAX, (due_ms - self._passed(now_ms)) / 1000))

    # --- what is reported ---------------------------------------------------------------------------------

    def describe_wait(self, now_ms: float) -> str:
        """What records have been waiting for longer than usual. Empty: none has. Call it regularly."""
        circuits = self._scheduler.open_circuits(self._passed(now_ms))
        oldest = [message for calls in self.shards.values() if (message := calls.oldest) is not None]
        if self._oldest not in oldest:
            self._oldest, self._oldest_since_ms = (oldest[0] if oldest else None), now_ms
        if circuits:
            return "; ".join(circuits)
        waited_ms = now_ms - self._oldest_since_ms
        if self._oldest is None or waited_ms < LONG_WAIT_MS:
            return ""
        return f"{describe_record(self._oldest)} has been waiting for its calls for {waited_ms / 1000:.1f} s"


def taken_out(
    messages: Sequence[Message], at: Mapping[SourcePartition, object]
) -> tuple[list[Message], dict[SourcePartition, list[Message]]]:
    """The records that are processed as they come, and by partition those of the partitions in `at`."""
    rest: list[Message] = []
    waiting: dict[SourcePartition, list[Message]] = {}
    for message in messages:
        partition = message.topic() or "", message.partition() or 0
        if partition in at:
            waiting.setdefault(partition, []).append(message)
        else:
            rest.append(message)
    return rest, waiting
