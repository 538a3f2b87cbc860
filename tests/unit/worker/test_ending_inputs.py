"""Bounded runs in a worker: no record behind the end is processed, and event time ends once all is read."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from fcluster import Job, Tumbling, Watermark, count
from fcluster.common.ids import ShardId
from fcluster.common.offsets import Offset
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.common.settings import Settings
from fcluster.engine.clock import END_MS
from fcluster.engine.state import ShardState
from fcluster.graph.topology import Topology
from fcluster.wire.messages import EndOffset
from fcluster.worker.consuming import Batch, ReadUpTo
from fcluster.worker.ending_inputs import end_times, has_ended
from fcluster.worker.processing import OutputPort, ShardRunner
from fcluster.worker.running_shards import RunningShards
from tests.state_memory import EntriesMax
from tests.unit.engine.memory_store import MemoryStore
from tests.unit.worker.worker_parts import Message


def windowed(*, merged: bool = False) -> Topology:
    job = Job("j")
    stream = job.stream(job.topic("in", watermark=Watermark()))
    if merged:
        stream = job.merge(stream, job.stream(job.topic("more", watermark=Watermark())))
    windows = stream.window(Tumbling(timedelta(minutes=1)), name="w")
    windows.aggregate(n=count()).to(job.topic("out"))
    return job.build(Settings())


class Reader:
    """Stands in for a reader of Kafka."""

    newest_generation = 1

    def __init__(self) -> None:
        self.held: list[tuple[str, int]] = []

    def start(self, _offsets: Any, watched: bool) -> int:
        return 1

    def stop(self, _partitions: Any) -> None:
        pass

    def hold(self, partition: tuple[str, int]) -> None:
        self.held.append(partition)

    def release(self, partition: tuple[str, int]) -> None:
        self.held.remove(partition)

    def done(self) -> None:
        pass


class Bench:
    """A shard that is read, up to these ends."""

    def __init__(self, *ends: int | None) -> None:
        topology = windowed(merged=len(ends) > 1)
        (self.stage,) = topology.stages
        self.shards = RunningShards(
            topology, Settings(), lambda _event: None, lambda: None, lambda _text: None
        )
        self.reader: Any = Reader()
        self.shards._reader_of = lambda _stage, _number: self.reader  # type: ignore[method-assign]
        state = ShardState(MemoryStore(), self.stage.all_stores, EntriesMax(0))
        position = CommittedPosition(0, 0, 0, "", further=(InputOffset(0),) * (len(ends) - 1))
        port = OutputPort()
        port.produce = lambda *_arguments: None
        self.runner = ShardRunner(self.stage, 0, state, position, port)
        for one, end in zip(self.runner.inputs, ends, strict=True):
            one.stop_at = end
        self.shards.start(self.runner)

    def read(self, *offsets: int, topic: str = "in") -> list[int]:
        """Read these records, and process those that come through. Returns their offsets."""
        messages: Any = [Message(offset, topic=topic) for offset in offsets]
        batch = Batch(self.reader, 1, messages, False)
        taken: list[int] = []
        batches = [Batch(self.reader, 1, self.shards.sort_out(batch), False)]
        while batches:
            for one in batches:
                taken += [self._process(message) for message in one.messages]
                one.reader.done()
            batches = list(self.shards.merged(10**9))
        return taken

    def _process(self, message: Any) -> int:
        one = self.shards.routes[message.topic()][0]
        one.handle(message)
        one.last = message
        return message.offset()

    def told(self, position: int, end: int, topic: str = "in") -> None:
        """The reader says that everything before `position` was read, and where the partition ends."""
        told = ReadUpTo(self.reader, 1, {(topic, 0): position}, {(topic, 0): Offset(end)})
        self.shards.note_told(told)
        self.shards.note_read(told)


def test_records_behind_the_end_are_left_out_and_their_partition_is_read_no_further() -> None:
    bench = Bench(3)
    assert bench.read(0, 1) == [0, 1]
    assert bench.reader.held == []
    assert bench.read(2, 3, 4) == [2]
    assert bench.reader.held == [("in", 0)]
    assert end_times([bench.runner]) == {ShardId("in", 0)}


def test_partition_ends_at_the_end_of_the_run_whatever_follows() -> None:
    bench = Bench(3)
    bench.read(0, 1, 2, 3, 4)
    bench.told(5, 100)
    (one,) = bench.runner.inputs
    assert (one.read_position, one.end, one.next_offset) == (3, 3, 3)


def test_marker_or_gap_before_the_end_counts_as_read() -> None:
    bench = Bench(10)
    bench.read(0, 7)  # 8 was compacted away, 9 is the marker of a transaction
    assert end_times([bench.runner]) == set()
    bench.told(8, 10)
    assert end_times([bench.runner]) == set()
    bench.told(10, 10)
    assert end_times([bench.runner]) == {ShardId("in", 0)}


def test_next_record_shows_that_a_gap_reaches_behind_the_end() -> None:
    bench = Bench(10)
    bench.read(0, 7, 30)
    bench.told(31, 31)
    assert end_times([bench.runner]) == {ShardId("in", 0)}
    assert bench.runner.inputs[0].next_offset == 8


@pytest.mark.parametrize("end", [0, None])
def test_empty_partition_ends_at_once_unless_its_end_is_not_known_yet(end: int | None) -> None:
    bench = Bench(end)
    assert end_times([bench.runner]) == (set() if end is None else {ShardId("in", 0)})


def test_end_that_becomes_known_later_counts() -> None:
    bench = Bench(None)
    bench.read(0, 1)
    bench.told(2, 2)
    assert end_times([bench.runner]) == set()
    bench.shards.end(EndOffset(ShardId("in", 0), 2))
    assert end_times([bench.runner]) == {ShardId("in", 0)}
    assert bench.read(2) == []


def test_shard_has_ended_once_its_windows_have_closed() -> None:
    bench = Bench(1)
    bench.read(0)
    assert not has_ended(bench.runner)
    end_times([bench.runner])
    assert bench.runner.clock is not None
    assert bench.runner.timers is not None
    assert bench.runner.clock.ended
    assert not has_ended(bench.runner)
    assert bench.runner.clock.told_ms != END_MS
    bench.runner.timers.fire_due(10)
    assert has_ended(bench.runner)
    assert bench.runner.clock.told_ms == END_MS


def test_event_time_ends_when_all_merged_inputs_are_read_and_not_before() -> None:
    bench = Bench(1, 2)
    bench.told(0, 1)
    bench.told(0, 2, "more")
    assert bench.read(0) == []  # `more` may have an earlier one
    assert end_times([bench.runner]) == set()
    assert bench.read(0, topic="more") == [0]
    bench.told(1, 50)
    assert end_times([bench.runner]) == set()
    assert bench.read(1, topic="more") == [0, 1]
    assert end_times([bench.runner]) == {ShardId("in", 0)}


def test_merged_input_that_is_read_to_its_end_holds_nobody_up() -> None:
    bench = Bench(1, 3)
    bench.told(0, 1)
    bench.told(0, 3, "more")
    bench.read(0, 1, 2)
    bench.told(3, 50)  # others have written more
    assert bench.read(0, 1, 2, topic="more") == [0, 0, 1, 2]


def test_ends_survive_that_a_shard_is_read_again() -> None:
    bench = Bench(3)
    bench.shards.stop([bench.runner.shard])
    bench.shards.start(bench.runner)
    assert bench.read(2, 3) == [2]


def test_job_without_event_time_has_nothing_to_end() -> None:
    runner: Any = SimpleNamespace(clock=None, inputs=())
    assert end_times([runner]) == set()
    assert not has_ended(runner)
