"""How a worker closes windows: in turns with records, however many windows are due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
from typing import Any

import pytest

from fcluster import Job, Tumbling, count
from fcluster.common.settings import Settings
from fcluster.engine import firing
from fcluster.graph.topology import Topology
from fcluster.worker import chunks, record_pump
from fcluster.worker.core import events, model
from tests.unit.worker.worker_parts import Message, Pumping

WINDOWS = 20


class KeyedMessage(Message):
    """A message with its own key."""

    def __init__(self, offset: int, timestamp_ms: int, partition: int = 0) -> None:
        super().__init__(offset, partition=partition, timestamp_ms=timestamp_ms)

    def key(self) -> bytes:
        return b"k%d" % self.offset()


def windowed_topology(*, timers: bool = False, result: Any = lambda result: result) -> Topology:
    """Windows of 10 ms with an "n" of 1 in each result. A handler next to them writes 0 for each record."""
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    windows = job.stream(source).window(Tumbling(timedelta(milliseconds=10)), name="w")
    windows.aggregate(n=count()).map(result).to(out)
    functions: Any = {"t": lambda _key, _ctx: None} if timers else None
    job.stream(source).process(lambda _ctx, _value: {"n": 0}, name="h", to=out, timers=functions)
    return job.build(Settings())


@pytest.fixture
def pumping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pumping]:
    monkeypatch.setattr(chunks, "AIM_S", 1e6)
    monkeypatch.setattr(firing, "CLOSED_AT_ONCE_MAX", 2)
    monkeypatch.setattr(record_pump, "FIRED_AT_ONCE_MAX", 5)
    pumping = Pumping(windowed_topology(timers=getattr(request, "param", False)))
    yield pumping
    pumping.close()


def fill(pumping: Pumping) -> None:
    """Open windows for this many keys. The last record makes them due."""
    pumping.start(0)
    pumping.start(1)
    messages = [KeyedMessage(number, 5) for number in range(WINDOWS)]
    pumping.read(*messages, KeyedMessage(WINDOWS, 15))
    pumping.pump.run_chunk()


def test_windows_and_records_take_turns(pumping: Pumping) -> None:
    fill(pumping)
    assert pumping.counts() == [0] * WINDOWS + [0] + [1] * 2  # two have closed with the record
    for number in range(2):
        pumping.read(*(KeyedMessage(3 * number + one, 5, partition=1) for one in range(3)))
        if not number:
            assert pumping.pump.has_work
            pumping.pump.run_chunk()
            pumping.pump.run_chunk()
    pumping.run()
    turns = [(n, len(list(found))) for n, found in groupby(pumping.counts()[WINDOWS + 1 :])]
    assert turns == [(1, 2 + 5), (0, 3), (1, 5), (0, 3), (1, 8)]
    assert not pumping.pump.has_work


def test_turn_of_records_takes_small_batches_together_and_they_are_no_backlog(
    pumping: Pumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BACKLOG_S", 1e7)
    fill(pumping)
    del pumping.fed[:]
    for number in range(4):
        pumping.read(KeyedMessage(number, 5, partition=1))
    for _ in range(3):
        pumping.pump.run_chunk()
    turns = [(n, len(list(found))) for n, found in groupby(pumping.counts()[WINDOWS + 1 + 2 :])]
    assert turns == [(1, 5), (0, 4), (1, 5)]
    processed = [event for event in pumping.fed if isinstance(event, events.RecordsProcessed)]
    assert processed
    assert not any(event.backlog for event in processed)


def test_turn_of_windows_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "AIM_S", 0.001)
    monkeypatch.setattr(firing, "CLOSED_AT_ONCE_MAX", 2)

    def slow(result: Any) -> Any:
        time.sleep(0.002)
        return result

    pumping = Pumping(windowed_topology(result=slow))
    pumping.start(0)
    pumping.read(*(KeyedMessage(number, 5) for number in range(WINDOWS)), KeyedMessage(WINDOWS, 15))
    while not sum(pumping.counts()):
        pumping.pump.run_chunk()
    closed: list[int] = []
    while pumping.pump.has_work:
        pumping.pump.run_chunk()
        closed.append(sum(pumping.counts()))
    assert closed == list(range(3, WINDOWS + 1))
    pumping.close()


def test_windows_wait_for_the_epoch_in_flight_once_enough_have_closed_and_records_go_on(
    pumping: Pumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pumping)
    before = len(pumping.counts())
    monkeypatch.setattr(record_pump, "CLOSING_S_MAX", 0.0)
    monkeypatch.setattr(record_pump, "CLOSING_SHARE_MAX", 0.0)
    pumping.core_state.in_flight = model.InFlight(4, model.EpochPhase.PREPARING, frozenset())
    assert pumping.pump.has_work, "none has closed yet in this epoch"
    pumping.pump.run_chunk()
    assert pumping.counts()[before:] == [1] * 5
    assert not pumping.pump.has_work, "the main thread waits, and doesn't spin"
    assert 0 < pumping.pump.wait_s(1e9) <= chunks.AIM_S
    pumping.read(*(KeyedMessage(number, 5, partition=1) for number in range(3)))
    pumping.run()
    assert pumping.counts()[before:] == [1] * 5 + [0] * 3
    pumping.core_state.in_flight = None
    pumping.run()
    assert sum(pumping.counts()) == WINDOWS


def test_windows_go_on_closing_if_the_epoch_in_flight_takes_long(
    pumping: Pumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get a share of the time, so that they close in the end however slow Kafka is."""
    fill(pumping)
    monkeypatch.setattr(record_pump, "CLOSING_S_MAX", 0.0)
    monkeypatch.setattr(record_pump, "CLOSING_SHARE_MAX", 1e9)
    pumping.core_state.in_flight = model.InFlight(4, model.EpochPhase.PREPARING, frozenset())
    pumping.run()
    assert sum(pumping.counts()) == WINDOWS


def test_all_windows_close_before_the_shards_stop_for_good(
    pumping: Pumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pumping)
    monkeypatch.setattr(record_pump, "CLOSING_S_MAX", 0.0)
    monkeypatch.setattr(record_pump, "CLOSING_SHARE_MAX", 0.0)
    pumping.core_state.in_flight = model.InFlight(4, model.EpochPhase.PREPARING, frozenset())
    pumping.pump.fire_due()
    assert sum(pumping.counts()) == WINDOWS


def test_records_of_the_same_shard_continue_and_late_ones_stay_late(pumping: Pumping) -> None:
    fill(pumping)
    pumping.read(*(KeyedMessage(WINDOWS + 1 + number, 6 + number) for number in range(9)))
    pumping.pump.run_chunk()  # windows
    pumping.pump.run_chunk()  # records: no window closes after one of them, since more are due
    assert pumping.counts()[WINDOWS + 1 + 2 + 5 :] == [0] * 9
    assert pumping.port.late == 4
    pumping.run()
    assert not pumping.pump.has_work
    assert sum(pumping.counts()) == WINDOWS


@pytest.mark.parametrize("pumping", [True], indirect=True)
def test_records_wait_if_handlers_have_timers(pumping: Pumping) -> None:
    fill(pumping)
    pumping.read(KeyedMessage(0, 5, partition=1))
    pumping.run()
    assert pumping.counts()[WINDOWS + 1 :] == [1] * WINDOWS + [0]


def test_windows_that_are_due_close_before_the_worker_stops(pumping: Pumping) -> None:
    fill(pumping)
    pumping.pump.fire_due()
    assert sum(pumping.counts()) == WINDOWS
