"""Global tables in a worker: when a shard says that it has read one, and that others wait for that."""

from __future__ import annotations

from typing import Any

from fcluster import Job, Watermark
from fcluster.common.ids import repartition_topic
from fcluster.common.offsets import Offset
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.common.settings import Settings
from fcluster.engine.loading import LOADED_HEADER
from fcluster.engine.state import ShardState
from fcluster.graph.topology import Topology
from fcluster.worker.consuming import Batch, ReadUpTo
from fcluster.worker.processing import OutputPort, ShardRunner
from fcluster.worker.running_shards import RunningShards
from tests.state_memory import EntriesMax
from tests.unit.engine.memory_store import MemoryStore
from tests.unit.worker.test_ending_inputs import Reader
from tests.unit.worker.worker_parts import Message

COPY = repartition_topic("j", "rates-in-calls")
SIZES = {"rates": 2, "calls": 3}
START = 7
"""The number of the job's start."""


def joined() -> Topology:
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    job.stream(job.topic("calls")).join(rates, on="in").to(job.topic("out"))
    return job.build(Settings())


class Keyed(Message):
    """A message with these key and headers."""

    def __init__(self, topic: str, offset: int, value: Any, key: Any, partition: int = 0, said: Any = None):
        super().__init__(offset, value, topic, partition)
        self._key, self._headers = key, said and [(LOADED_HEADER, said)]

    def __len__(self) -> int:
        return len(self._value or b"")

    def key(self) -> Any:
        return self._key

    def headers(self) -> Any:
        return self._headers


class Bench:
    """A shard of this stage, which begins at offset 0 of its inputs."""

    def __init__(self, stage: str, partition: int = 0) -> None:
        topology = joined()
        self.stage = topology.stage(stage)
        self.partition = partition
        self.shards = RunningShards(
            topology, Settings(), lambda _event: None, lambda: None, lambda _text: None
        )
        self.reader: Any = Reader()
        self.shards._reader_of = lambda _stage, _number: self.reader  # type: ignore[method-assign]
        state = ShardState(MemoryStore(), self.stage.all_stores, EntriesMax(0))
        further = (InputOffset(0),) * (len(self.stage.inputs) - 1)
        self.port = OutputPort()
        self.port.stage_sizes = SIZES
        self.written: list[tuple[Any, ...]] = []
        self.port.produce = lambda *output: self.written.append(output)
        position = CommittedPosition(0, 0, 0, "", further=further)
        self.runner = ShardRunner(self.stage, partition, state, position, self.port, job_start=START)
        self.shards.start(self.runner)

    def read(self, *messages: Any) -> list[tuple[str, int]]:
        """Read these records, and process those that come through. Returns their topics and offsets."""
        taken: list[Any] = []
        sorted_out = self.shards.sort_out(Batch(self.reader, 1, list(messages), False))
        batches = [Batch(self.reader, 1, sorted_out, False)]
        while batches:
            for batch in batches:
                for message in batch.messages:
                    one = self.shards.routes[message.topic()][self.partition]
                    one.handle(message)
                    one.last = message
                    taken.append((message.topic(), message.offset()))
                batch.reader.done()
            batches = list(self.shards.merged(10**9))
        return taken

    def told(self, topic: str, position: int, end: int) -> None:
        """The reader says that everything before `position` was read, and where the partition ends."""
        at = topic, self.partition
        told = ReadUpTo(self.reader, 1, {at: position}, {at: Offset(end)})
        self.shards.note_told(told)
        self.shards.note_read(told)


def row(offset: int, topic: str = "rates", partition: int = 0) -> Any:
    return Keyed(topic, offset, b"1", b"usd", partition)


def mark(offset: int, said: bytes) -> Any:
    return Keyed(COPY, offset, None, None, said=said)


def test_shard_says_once_that_it_has_read_what_there_was_at_its_start() -> None:
    bench = Bench("rates", partition=1)
    assert not bench.runner.has_loaded
    bench.told("rates", 0, 2)
    assert not bench.runner.has_loaded
    bench.read(row(0, partition=1))
    bench.told("rates", 1, 5)  # there is always something new
    assert bench.runner.take_loaded_marks(SIZES) == []
    bench.read(row(1, partition=1))
    assert bench.runner.has_loaded
    marks = bench.runner.take_loaded_marks(SIZES)
    assert [(one.topic, one.partition, one.value) for one in marks] == [(COPY, n, None) for n in range(3)]
    assert {tuple(one.headers) for one in marks} == {((LOADED_HEADER, b"1/2/7"),)}
    assert not bench.runner.has_loaded
    assert [output[-1] for output in bench.written] == [0, 1, 2, 0, 1, 2], "each row goes to all partitions"


def test_empty_partition_is_read_as_soon_as_its_end_is_known() -> None:
    bench = Bench("rates")
    bench.told("rates", 0, 0)
    assert bench.runner.has_loaded


def test_end_of_a_bounded_run_is_an_end() -> None:
    bench = Bench("rates")
    bench.runner.inputs[0].stop_at = 0
    assert bench.runner.has_loaded


def test_records_wait_for_the_marks_of_all_shards() -> None:
    bench = Bench("calls")
    call = Message(0, b'{"in": "usd"}', topic="calls")
    assert bench.read(call, row(0, COPY)) == [(COPY, 0)]
    assert bench.read(mark(1, b"1/2/7")) == [(COPY, 1)]
    assert bench.read(row(2, COPY)) == [(COPY, 2)]
    bench.told(COPY, 3, 3)
    assert bench.read() == []
    assert bench.shards.until_merged_s(9.0, 0.0) == 9.0
    assert bench.read(mark(3, b"0/2/6")) == [(COPY, 3)]
    bench.told(COPY, 4, 4)
    assert bench.read() == [], "that mark is of a former start"
    assert bench.read(mark(4, b"0/2/7")) == [(COPY, 4)]
    bench.told(COPY, 5, 5)
    assert bench.read() == [("calls", 0)]
    assert [output[0] for output in bench.written] == ["out"]


def test_other_shards_of_a_job_have_nothing_to_say() -> None:
    bench = Bench("calls")
    bench.told("calls", 0, 0)
    bench.told(COPY, 0, 0)
    assert not bench.runner.has_loaded
    assert bench.runner.take_loaded_marks(SIZES) == []


def test_event_time_is_not_told_beyond_timers_that_wait_for_a_global_table() -> None:
    """Their results have timestamps that would be late for the stages behind."""

    def remind(ctx: Any, _value: Any) -> None:
        ctx.timer("later", at=100)

    def later(_key: Any, ctx: Any) -> Any:
        return ctx.timestamp

    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    calls = job.stream(job.topic("calls", watermark=Watermark()))
    calls.join(rates, on="in").process(remind, name="remind", timers={"later": later}).to(job.topic("out"))
    stage = job.build(Settings()).stage("calls")
    store = MemoryStore()

    def started(job_start: int) -> tuple[ShardRunner, ShardState]:
        state = ShardState(store, stage.all_stores, EntriesMax(0))
        position = CommittedPosition(0, 0, 0, "", further=(InputOffset(0),))
        return ShardRunner(stage, 0, state, position, port, job_start=job_start), state

    port = OutputPort()
    port.produce = lambda *_output: None
    before, state = started(START)
    (copies,) = stage.copies
    before.inputs[copies].handle(mark(0, b"0/1/7"))
    before.inputs[copies].handle(row(1, COPY))
    call = Keyed("calls", 0, b'{"in": "usd"}', b"k")
    before.inputs[0].handle(call)
    state.freeze(1)
    state.commit(1, 1, 0.0)
    state.flush()

    runner, _state = started(START + 1)
    assert runner.clock is not None
    assert runner.timers is not None
    runner.clock.observe(0, 200)
    assert runner.clock.now_ms == 200
    runner.timers.fire_event()
    assert runner.timers.fired == 0
    assert runner.clock.told_ms == 99
    runner.inputs[copies].handle(mark(2, b"0/1/8"))
    runner.timers.fire_event()
    assert runner.timers.fired == 1
    assert runner.clock.told_ms == 200
