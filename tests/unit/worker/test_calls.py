"""Records that wait in a worker for calls: what they wait for, and when they are processed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Circuit, Job, Retry
from fcluster.common.clocks import monotonic_ms
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation
from fcluster.graph.topology import Topology
from fcluster.wire.messages import EndOffset, RecordBegun, RecordEnded
from fcluster.worker import calls, chunks, record_pump
from fcluster.worker.consuming import ReadUpTo
from fcluster.worker.core import events
from fcluster.worker.core.model import Condemned
from tests.unit.worker.worker_parts import PATIENCE_S, SESSION, Message, Pumping, count, shard_of


class Service:
    """Answers when the test says so. `answer` may be called in the test's thread."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.fronted: list[str] = []
        self._free: dict[str, threading.Event] = {}
        self.error: BaseException | None = None
        self.cancelled: list[str] = []

    def front(self, value: str) -> str:
        self.fronted.append(value)
        return value

    async def ask(self, _call: Any, value: str) -> str:
        self.called.append(value)
        free = self._free.setdefault(value, threading.Event())
        try:
            while not free.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(value)
            raise
        if self.error is not None:
            raise self.error
        return value

    def answer(self, *values: str) -> None:
        for value in values:
            self._free.setdefault(value, threading.Event()).set()


def topology_with(service: Service, **options: Any) -> Topology:
    """A job that calls the service, then counts."""
    job = Job("j")
    stream = job.stream(job.topic("in")).map(service.front).map_async(service.ask, **options)
    stream.process(count, name="count", on_error=options.get("on_error")).to(job.topic("out"))
    return job.build(Settings())


class Bench:
    def __init__(
        self, service: Service | None = None, topology: Topology | None = None, **options: Any
    ) -> None:
        self.service = service or Service()
        self.topology = topology or topology_with(self.service, **options)
        self.pumping = Pumping(self.topology)

    def turn(self) -> None:
        """One turn of the worker's main loop, without its events."""
        self.pumping.pump.add_merged()
        self.pumping.pump.add_called()
        while self.pumping.pump.has_work:
            self.pumping.pump.run_chunk()

    def turn_until(self, is_so: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < until_s
            list(self.pumping.inbox.take(0.01))
            self.turn()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make_one(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make_one
    for bench in made:
        bench.pumping.shards.calls.close()
        bench.pumping.close()


def record(offset: int, value: str, key: bytes | None = None, partition: int = 0) -> Any:
    message = Message(offset, f'"{value}"'.encode(), partition=partition)
    message.key = lambda: key  # type: ignore[method-assign,assignment,return-value]
    return message


def test_records_are_processed_in_order_when_their_calls_are_done(make: Callable[..., Bench]) -> None:
    bench = make(concurrency=2)
    runner = bench.pumping.start()
    bench.pumping.read(record(0, "a", b"k"), record(1, "b", b"l"), record(2, "c", b"m"), record(3, "d", b"k"))
    bench.turn_until(lambda: len(bench.service.called) == 2)
    assert bench.service.called == ["a", "b"]
    assert bench.service.fronted == ["a", "b", "c", "d"]
    assert bench.pumping.fed == [], "nothing was processed, so there is nothing to commit"
    bench.service.answer("b")
    bench.turn_until(lambda: "c" in bench.service.called)
    assert runner.inputs[0].next_offset == 0, "the first record still waits"
    bench.service.answer("c")
    bench.service.answer("a")
    bench.turn_until(lambda: runner.inputs[0].next_offset == 3)
    bench.turn_until(lambda: bench.service.called[3:] == ["d"])
    bench.service.answer("d")
    bench.turn_until(lambda: runner.inputs[0].next_offset == 4)
    assert len(bench.pumping.counts()) == 4


def test_shard_whose_calls_take_long_does_not_hold_up_another_one(make: Callable[..., Bench]) -> None:
    bench = make()
    first, second = bench.pumping.start(), bench.pumping.start(partition=1)
    bench.service.answer("fast")
    bench.pumping.read(record(0, "slow", b"k"), record(0, "fast", b"l", partition=1))
    bench.turn_until(lambda: second.inputs[0].next_offset == 1)
    assert first.inputs[0].next_offset == 0


def test_shard_that_stops_gives_up_its_calls_and_its_records_are_called_for_again(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.pumping.start()
    bench.pumping.read(record(0, "a", b"k"))
    bench.turn_until(lambda: bench.service.called == ["a"])
    bench.pumping.shards.stop([shard_of(bench.topology)])
    bench.turn_until(lambda: bench.service.cancelled == ["a"])
    runner = bench.pumping.start()
    bench.service.answer("a")
    bench.pumping.read(record(0, "a", b"k"))
    bench.turn_until(lambda: runner.inputs[0].next_offset == 1)
    assert bench.service.called == ["a", "a"]


def test_position_behind_the_records_is_known_once_they_are_processed(make: Callable[..., Bench]) -> None:
    bench = make()
    runner = bench.pumping.start()
    bench.pumping.read(record(0, "a", b"k"))
    reader: Any = bench.pumping.reader
    bench.pumping.pump.add_told(ReadUpTo(reader, reader.newest_generation, {("in", 0): 5}, {("in", 0): 5}))
    bench.turn_until(lambda: bench.service.called == ["a"])
    assert runner.inputs[0].read_position == 0
    bench.service.answer("a")
    bench.turn_until(lambda: runner.inputs[0].read_position == 5)


def test_failed_call_is_an_event_with_the_record_and_the_step(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.pumping.start()
    bench.service.error = SystemExit("not even this ends the thread")
    bench.service.answer("a")
    bench.pumping.read(record(3, "a", b"k"))
    bench.turn_until(lambda: bool(bench.pumping.fed))
    (failed,) = bench.pumping.fed
    assert isinstance(failed, events.HandlerFailed)
    assert failed.offset == 3
    assert "in map_async 'ask' (step 2 of 'count'): SystemExit" in failed.failure.message


def test_record_whose_step_is_condemned_makes_no_call_and_runs_no_step_in_front(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    known = Condemnation(Failure.of_record("it took too long"), step="map 'front' (step 1 of 'count')")
    bench.pumping.start(condemned=(Condemned(0, known),))
    bench.pumping.read(record(0, "a", b"k"))
    bench.turn_until(lambda: bool(bench.pumping.fed))
    (failed,) = bench.pumping.fed
    assert isinstance(failed, events.StopRecordReached)
    assert (bench.service.fronted, bench.service.called) == ([], [])


class Blocking(Service):
    """Its function blocks the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    async def ask(self, _call: Any, value: str) -> str:
        self.called.append(value)
        self.free.wait(60)
        return value


def test_function_that_blocks_the_event_loop_is_named(make: Callable[..., Bench]) -> None:
    service = Blocking()
    bench = make(service=service, timeout=timedelta(seconds=3))
    bench.pumping.start()
    try:
        bench.pumping.read(record(0, "a", b"k"))
        bench.turn_until(lambda: service.called == ["a"])
        bench.pumping.read(record(1, "b", b"l"))  # a call that can't begin
        bench.turn_until(lambda: bool(bench.pumping.fed))
    finally:
        service.free.set()
    (failed,) = bench.pumping.fed
    assert isinstance(failed, events.HandlerFailed)
    assert "no answer within 3,000 ms; the event loop is blocked in Blocking.ask (" in failed.failure.message


def test_open_circuit_and_long_waits_are_reported(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(circuit=Circuit(failures=2, open_for=timedelta(minutes=1)), on_error="skip")
    waiting = bench.pumping.shards.calls
    bench.pumping.start()
    bench.pumping.read(record(0, "a"), record(1, "b"), record(2, "c"))
    bench.turn_until(lambda: len(bench.service.called) == 3)
    assert waiting.describe_wait(0) == ""
    assert waiting.describe_wait(2_000) == "record in/0 at offset 0 has been waiting for its calls for 2.0 s"
    bench.service.error = ConnectionError("down")
    bench.service.answer("a", "b", "c")
    bench.turn_until(lambda: bool(bench.pumping.said))
    (said,) = bench.pumping.said
    assert said.startswith("map_async 'ask': the circuit opens after 2 failures in a row.")
    assert waiting.describe_wait(0).startswith("map_async 'ask': the circuit is open, the next call in ")
    assert bench.pumping.pump.wait_s(100.0) > 0


def test_reading_is_paused_while_too_many_records_wait(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "HELD_ABOVE_RECORDS", 100)
    bench = make()
    reader: Any = bench.pumping.reader
    held: list[Any] = []
    monkeypatch.setattr(reader, "hold", held.append, raising=False)
    monkeypatch.setattr(reader, "release", lambda at: held.append(("released", at)), raising=False)
    bench.pumping.start()
    bench.service.answer("a")
    bench.pumping.read(*[record(offset, "a") for offset in range(101)])
    assert held == [("in", 0)]
    bench.turn_until(lambda: len(held) == 2)
    assert held[1] == ("released", ("in", 0))


def test_partition_with_many_records_does_not_keep_another_one_from_beginning(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "AIM_S", -1.0)  # the time of a turn is over after one record
    bench = make()
    bench.pumping.start()
    bench.pumping.start(partition=1)
    bench.pumping.read(*[record(offset, "first") for offset in range(10)])
    bench.pumping.read(*[record(offset, "second", partition=1) for offset in range(10)])
    for _ in range(4):
        bench.pumping.pump.add_called()
    assert bench.service.fronted == ["first", "second", "first", "second"]


def test_records_that_wait_with_their_calls_have_a_limit_in_bytes(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "HELD_ABOVE_BYTES", 10)
    bench = make()
    reader: Any = bench.pumping.reader
    held: list[Any] = []
    monkeypatch.setattr(reader, "hold", held.append, raising=False)
    monkeypatch.setattr(reader, "release", lambda at: held.append(("released", at)), raising=False)
    bench.pumping.start()
    bench.pumping.read(
        *[
            record(offset, value, value.encode())
            for offset, value in enumerate(("a" * 20, "b" * 4, "c" * 4, "d"))
        ]
    )
    bench.turn()
    assert bench.service.fronted == ["a" * 20], "one may always begin"
    bench.service.answer("a" * 20)
    bench.turn_until(lambda: len(bench.service.fronted) == 3)
    bench.turn()
    assert bench.service.fronted[1:] == ["b" * 4, "c" * 4]
    bench.service.answer("b" * 4)
    bench.turn_until(lambda: bench.service.fronted[3:] == ["d"])
    assert held == [("in", 0), ("released", ("in", 0))]


def test_functions_in_threads_run_as_many_at_once_as_the_step_says(make: Callable[..., Bench]) -> None:
    together = threading.Barrier(40)

    class InThreads(Service):
        async def ask(self, _call: Any, value: str) -> str:
            await asyncio.to_thread(together.wait, PATIENCE_S)
            return value

    bench = make(service=InThreads(), concurrency=40)
    runner = bench.pumping.start()
    bench.pumping.read(*[record(offset, "a", str(offset).encode()) for offset in range(40)])
    bench.turn_until(lambda: runner.inputs[0].next_offset == 40)


def test_time_in_which_the_process_was_suspended_counts_for_no_timeout(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended_ms = [0]
    monkeypatch.setattr(record_pump, "monotonic_ms", lambda: monotonic_ms() + suspended_ms[0])
    bench = make(timeout=timedelta(seconds=60))
    runner = bench.pumping.start()
    bench.pumping.read(record(0, "a", b"k"))
    bench.turn_until(lambda: bench.service.called == ["a"])
    suspended_ms[0] = 3_600_000
    bench.turn()
    assert bench.pumping.fed == []
    assert bench.pumping.pump.wait_s(100.0) == calls.WAIT_S_MAX
    bench.service.answer("a")
    bench.turn_until(lambda: runner.inputs[0].next_offset == 1)


def test_attempt_that_a_library_cancels_is_made_again(make: Callable[..., Bench]) -> None:
    class Cancelling(Service):
        async def ask(self, call: Any, value: str) -> str:
            if call.attempt == 1:
                raise asyncio.CancelledError
            return value

    retry = Retry(attempts=2, on=(ConnectionError,), backoff=timedelta(milliseconds=1))
    bench = make(service=Cancelling(), retry=retry)
    runner = bench.pumping.start()
    bench.pumping.read(record(0, "a", b"k"))
    bench.turn_until(lambda: runner.inputs[0].next_offset == 1)


# --- bounded runs ---------------------------------------------------------------------------------------


def end_at(bench: Bench, offset: int, number: int = 0) -> None:
    bench.pumping.pump.end(EndOffset(shard_of(bench.topology), offset, number))


def test_input_is_read_to_its_end_if_what_waits_lies_behind_it(make: Callable[..., Bench]) -> None:
    bench = make()
    runner = bench.pumping.start()
    bench.pumping.pump.pause("a test")
    bench.pumping.read(record(2, "behind"))
    reader: Any = bench.pumping.reader
    bench.pumping.pump.add_told(ReadUpTo(reader, reader.newest_generation, {("in", 0): 3}, {("in", 0): 3}))
    end_at(bench, 2)
    bench.pumping.pump.resume()
    bench.turn()
    assert runner.inputs[0].is_read
    assert (bench.service.fronted, runner.inputs[0].next_offset) == ([], 0)


def test_record_behind_the_end_is_not_processed_although_its_call_has_begun(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    runner = bench.pumping.start()
    bench.pumping.read(record(0, "a", b"k"), record(1, "answered", b"l"), record(2, "not answered", b"m"))
    bench.turn_until(lambda: len(bench.service.called) == 3)
    end_at(bench, 1)
    bench.service.answer("answered")
    bench.turn_until(lambda: bench.pumping.shards.calls._scheduler.running == 2)
    bench.service.answer("a")
    bench.turn_until(lambda: runner.inputs[0].is_read)
    bench.turn()
    assert bench.pumping.shards.calls.shards[runner.shard].oldest is None, "nothing waits any more"
    assert runner.inputs[0].next_offset == 1


def test_merge_goes_on_if_all_records_that_wait_lie_behind_the_ends(make: Callable[..., Bench]) -> None:
    job, service = Job("j"), Service()
    merged = job.merge(job.topic("a"), job.topic("b")).map_async(service.ask)
    merged.process(count, name="count").to(job.topic("out"))
    bench = make(service=service, topology=job.build(Settings()))
    runner = bench.pumping.start()
    bench.pumping.pump.pause("a test")
    standings = {("a", 0): (1, 1), ("b", 0): (1, 1)}
    bench.pumping.read(Message(0, topic="a"), Message(0, topic="b"), standings=standings)
    bench.turn()
    for number in range(2):
        end_at(bench, 0, number)
    bench.pumping.pump.resume()
    bench.turn()
    assert [one.read_position for one in runner.inputs] == [1, 1]
    assert service.called == []


# --- steps between two calls ----------------------------------------------------------------------------


def topology_with_two_calls(service: Service, between: Callable[[str], str]) -> Topology:
    job = Job("j")
    first = job.stream(job.topic("in")).map(service.front).map_async(service.ask)
    first.map(between).map_async(service.ask).process(count, name="count").to(job.topic("out"))
    return job.build(Settings())


def test_record_is_watched_while_a_step_between_two_calls_runs(make: Callable[..., Bench]) -> None:
    watched: list[Any] = []

    def between(value: str) -> str:
        watched.append(bench.pumping.record_watch.record)
        return value.upper()

    service = Service()
    bench = make(service=service, topology=topology_with_two_calls(service, between))
    runner = bench.pumping.start()
    first, second = record(0, "a", b"k"), record(1, "b", b"l")
    bench.pumping.read(first, second)
    bench.service.answer("a", "b", "A", "B")
    bench.turn_until(lambda: runner.inputs[0].next_offset == 2)
    assert sorted(watched, key=lambda one: one.offset()) == [first, second]
    assert bench.pumping.record_watch.record is None


def test_step_between_two_calls_that_may_end_the_process_is_announced(make: Callable[..., Bench]) -> None:
    said_then: list[tuple[str, int]] = []

    def between(value: str) -> str:
        sent = bench.pumping.link.sent
        said_then.append((value, len(sent)))
        return value

    service = Service()
    bench = make(service=service, topology=topology_with_two_calls(service, between))
    runner = bench.pumping.start(announced=(range(1, 2),))
    bench.pumping.read(*(record(number, value, value.encode()) for number, value in enumerate("abc")))
    bench.service.answer("a", "b", "c")
    bench.turn_until(lambda: runner.inputs[0].next_offset == 3)
    sent = bench.pumping.link.sent
    (before,) = (number for value, number in said_then if value == "b")
    announced = sent[before - 1]
    assert announced.step.startswith("map 'between'"), "the last word before the step is called"
    assert sent[before] == RecordEnded(SESSION)
    assert {one.offset for one in sent if isinstance(one, RecordBegun)} == {1}
