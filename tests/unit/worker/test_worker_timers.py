"""How a worker fires timers: between records, within an epoch, and one by one while a failing one is
searched for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fcluster import Job, Tumbling, count, milliseconds
from fcluster.common import clocks
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation
from fcluster.engine.timers import Timer, timer_title
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from fcluster.worker import chunks, timers
from fcluster.worker.core import events
from fcluster.worker.core.model import Condemned, RecordAt
from fcluster.worker.core.worker import WorkerCore
from tests.unit.worker.worker_parts import BOUNDS, IDENTITY, SESSION, Message, Pumping, shard_of

START_MS = 1_000_000


def timed_topology(**options: Any) -> Topology:
    """Each record sets a timer "e" for 10 ms later in event time, and "p" for 50 ms later by the wall
    clock."""
    job = Job("j")

    @job.process(job.topic("in"), to=job.topic("out"), **options)
    def count(ctx: Any, value: Any) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        if value != "none":
            ctx.timer("e", at=ctx.timestamp + 10)
            ctx.timer("p", at=ctx.processing_time + 50, clock="processing")
        return {"n": ctx.state["n"]}

    @count.on_timer("e")
    def e(_key: str, ctx: Any) -> Any:
        if ctx.state["n"] == 99:
            raise ValueError("no good")
        return {"n": -1}

    @count.on_timer("p")
    def p(_key: str, ctx: Any) -> Any:
        ctx.state["n"] = 99
        return {"n": -2}

    return job.build(Settings())


TOPOLOGY = timed_topology()
SHARD = shard_of(TOPOLOGY)


class Wall:
    """Processing time."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def time_ns(self) -> int:
        return self.now_ms * 1_000_000

    def __getattr__(self, name: str) -> Any:
        import time

        return getattr(time, name)


@pytest.fixture(autouse=True)
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    monkeypatch.setattr(chunks, "AIM_S", 1e6)
    wall = Wall()
    monkeypatch.setattr(clocks, "time", wall)
    return wall


@pytest.fixture
def pumping() -> Iterator[Pumping]:
    pumping = Pumping(TOPOLOGY)
    yield pumping
    pumping.close()


def processed(pumping: Pumping) -> list[events.RecordsProcessed]:
    return [event for event in pumping.fed if isinstance(event, events.RecordsProcessed)]


def test_timer_in_processing_time_fires_between_records_and_makes_the_epoch_dirty(
    pumping: Pumping, wall: Wall
) -> None:
    runner = pumping.start()
    pumping.read(Message(0))
    pumping.run()
    assert not pumping.pump.has_work
    assert pumping.pump.wait_s(10.0) == pytest.approx(0.05)
    wall.now_ms += 49
    assert not pumping.pump.has_work
    wall.now_ms += 1
    pumping.fed.clear()
    assert pumping.pump.has_work
    pumping.run()
    assert pumping.counts() == [1, -2]
    assert pumping.fed == [events.RecordsProcessed(frozenset({SHARD}), 1, backlog=False)]
    assert runner.is_touched
    assert pumping.pump.records == 1  # a timer doesn't count as a record
    assert pumping.pump.wait_s(10.0) == 10.0
    assert pumping.record_watch.record is None


def test_window_in_processing_time_closes_between_records_and_while_none_come(wall: Wall) -> None:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Tumbling(milliseconds(50)), name="w", clock="processing")
    windows.aggregate(n=count()).to(job.topic("out"))
    pumping = Pumping(job.build(Settings()))
    runner = pumping.start()
    pumping.read(Message(0), Message(1))
    pumping.run()
    assert not pumping.pump.has_work
    assert pumping.pump.wait_s(10.0) == pytest.approx(0.05)
    wall.now_ms += 50
    assert pumping.pump.has_work
    pumping.run()
    assert pumping.counts() == [2]
    assert runner.is_touched
    assert pumping.pump.wait_s(10.0) == 10.0
    pumping.close()


def test_timer_in_event_time_fires_before_the_next_record_of_the_same_chunk(pumping: Pumping) -> None:
    runner = pumping.start()
    pumping.read(Message(0), Message(1, b'"none"', timestamp_ms=15), Message(2, b'"none"', timestamp_ms=16))
    pumping.run()
    assert pumping.counts() == [1, 2, -1, 3]
    (event,) = processed(pumping)
    assert (event.shards, event.records) == (frozenset({SHARD}), 4)
    assert runner.inputs[0].next_offset == 3


def test_timers_beyond_the_limit_keep_the_next_record_waiting(
    pumping: Pumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = pumping.start()
    pumping.read(Message(0), Message(1, b'"none"', timestamp_ms=15), Message(2, b'"none"', timestamp_ms=16))
    monkeypatch.setattr(timers, "FIRED_AT_ONCE_MAX", 0)
    pumping.pump.run_chunk()
    assert pumping.counts() == [1, 2]
    assert runner.is_touched
    pumping.pump.run_chunk()
    assert pumping.counts() == [1, 2, -1]
    pumping.run()
    assert pumping.counts() == [1, 2, -1, 3]


def test_timer_that_stops_the_job_leaves_the_record_before_it_processed(pumping: Pumping, wall: Wall) -> None:
    runner = pumping.start()
    pumping.read(Message(0))
    pumping.run()
    wall.now_ms += 50
    pumping.run()  # now the state is one with which "e" fails
    pumping.fed.clear()

    def stop(event: events.Event) -> None:
        if isinstance(event, events.StopRecordReached):
            pumping.shards.stop([event.shard])

    pumping.on_feed = stop
    pumping.read(Message(1, b'"none"', timestamp_ms=15), Message(2))
    runner.state.documents["count"].get(b"k")["n"] = 98
    pumping.run()
    done, reached, *_ = pumping.fed
    assert isinstance(done, events.RecordsProcessed)
    assert done.shards == frozenset({SHARD})
    assert isinstance(reached, events.StopRecordReached)
    assert (reached.shard, reached.offset, reached.input) == (SHARD, 2, 0)
    assert reached.failure.message.startswith(
        "timer 'e' of the handler 'count' for the key b'k' at 1970-01-01T00:00:00.015Z"
    )
    assert runner.inputs[0].next_offset == 2
    assert not pumping.pump.has_work  # its timers no longer fire


def test_while_a_bad_record_is_searched_for_each_timer_has_its_own_epoch(pumping: Pumping) -> None:
    pumping.start()
    pumping.core_state.pieces.records_max = 1
    pumping.on_feed = lambda event: None
    pumping.read(Message(0), Message(1, b'"none"', timestamp_ms=15), Message(2, b'"none"', timestamp_ms=16))
    pumping.pump.run_chunk()
    pumping.pump.run_chunk()
    assert pumping.counts() == [1, 2]
    pumping.pump.run_chunk()
    assert pumping.counts() == [1, 2, -1]
    timer = processed(pumping)[-1]
    title = timer_title("count", Timer(15, b"k", "e"))
    assert timer.newest == RecordAt(SHARD, 2, 0, title)
    pumping.pump.run_chunk()
    assert pumping.counts() == [1, 2, -1, 3]


def test_condemned_timer_fails_without_being_called() -> None:
    topology = timed_topology(on_error="skip")
    pumping = Pumping(topology)
    title = timer_title("count", Timer(15, b"k", "e"))
    pumping.start(condemned=(Condemned(1, Condemnation(Failure.of_record("it ends processes"), step=title)),))
    pumping.read(Message(0), Message(1, b'"none"', timestamp_ms=15))
    pumping.run()
    assert pumping.counts() == [1, 2]
    assert pumping.port.skipped == 1
    pumping.close()


def test_only_due_timers_fire_before_the_end(pumping: Pumping, wall: Wall) -> None:
    pumping.start()
    pumping.read(Message(0))
    pumping.run()
    pumping.pump.fire_due()
    assert pumping.counts() == [1]
    wall.now_ms += 50
    pumping.pump.fire_due()
    assert pumping.counts() == [1, -2]


def test_no_timer_fires_while_the_worker_is_paused_or_after_its_shard_left(
    pumping: Pumping, wall: Wall
) -> None:
    pumping.start()
    pumping.read(Message(0))
    pumping.run()
    wall.now_ms += 50
    pumping.pump.pause("no messages from the coordinator")
    pumping.pump.fire_due()
    assert not pumping.pump.has_work
    assert pumping.pump.wait_s(10.0) == 10.0
    pumping.pump.resume()
    assert pumping.pump.has_work
    pumping.shards.stop([SHARD])
    assert not pumping.pump.has_work
    assert pumping.counts() == [1]


def test_timers_of_a_shard_with_suspects_are_announced(pumping: Pumping, wall: Wall) -> None:
    pumping.start(announced=(range(100, 101),))
    pumping.read(Message(0))
    pumping.run()
    wall.now_ms += 50
    pumping.run()
    begun, ended = pumping.link.sent
    assert isinstance(begun, messages.RecordBegun)
    assert (begun.shard, begun.offset, begun.step) == (
        SHARD,
        1,
        timer_title("count", Timer(START_MS + 50, b"k", "p")),
    )
    assert isinstance(ended, messages.RecordEnded)


# --- the core --------------------------------------------------------------------------------------------


def core_in_session() -> WorkerCore:
    core = WorkerCore(IDENTITY, BOUNDS, 0)
    core.state.session = SESSION
    return core


def test_timer_that_alone_fails_an_epoch_is_condemned_and_not_the_record_after_it() -> None:
    core = core_in_session()
    title = timer_title("count", Timer(15, b"k", "e"))
    at = RecordAt(SHARD, 2, 0, title)
    for times in range(1, 12):
        core.state.session = SESSION
        core.handle(
            events.EpochFailed(SESSION, Condemnation(Failure.of_record("refused"), topic="out"), at), times
        )
    condemned = core.state.condemned[SHARD]
    assert condemned[0] == Condemned(2, Condemnation(Failure.of_record("refused"), topic="out", step=title))
    assert condemned[-1] == Condemned(2, Condemnation(Failure.of_record("refused"), step=title))
    assert core._owned_shards.stop_records == {}


def test_timer_that_fails_within_an_epoch_is_condemned() -> None:
    core = core_in_session()
    title = timer_title("count", Timer(15, b"k", "e"))
    failure = Failure.of_record("it can't be written")
    condemnation = Condemnation(failure, step=title)
    core.handle(events.HandlerFailed(SESSION, SHARD, 2, failure, condemnation), 1)
    assert core.state.condemned[SHARD] == [Condemned(2, condemnation)]
