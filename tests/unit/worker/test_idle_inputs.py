"""When an input counts as idle."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fcluster import Job, Watermark
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.engine.records import OutputPort
from fcluster.engine.state import ShardState
from fcluster.wire.messages import TimeStatus
from fcluster.worker.idle_inputs import LOOK_GAP_MS_MAX, Ahead, IdleInputs, times_of
from fcluster.worker.processing import ShardRunner
from tests.state_memory import EntriesMax
from tests.unit.worker.processing_bench import EmptyStore, FakeMessage

SHARD = ShardId("in", 0)


def nothing(_ctx: Any, _value: Any) -> None:
    pass


def running(watermark: Watermark | None) -> ShardRunner:
    job = Job("j")
    source = job.topic("in", watermark=watermark)
    job.process(source)(nothing)
    (stage,) = job.build(Settings()).stages
    state = ShardState(EmptyStore(lambda _key: None), stage.all_stores, EntriesMax(1_000))
    return ShardRunner(stage, 0, state, CommittedPosition(0, 0, 0, ""), OutputPort())


def take(runner: ShardRunner, offset: int, timestamp: int = 1_000) -> None:
    message: Any = FakeMessage(b"1", offset=offset, timestamp=timestamp)
    one = runner.inputs[0]
    one.handle(message)
    one.last = message
    one.read_position = offset + 1


@pytest.fixture
def runner() -> ShardRunner:
    made = running(Watermark(idle_ms=100))
    made.inputs[0].end = 0
    return made


def test_input_at_its_end_becomes_idle_in_time_and_is_reported_once(runner: ShardRunner) -> None:
    idle = IdleInputs()
    assert idle.look([runner], 1_000) == set()
    assert idle.look([runner], 1_099) == set()
    assert idle.look([runner], 1_100) == {SHARD}
    assert idle.look([runner], 9_000) == set()
    assert runner.clock is not None
    assert runner.clock.is_idle
    (time,) = times_of(runner, 5_000)
    assert time is not None
    assert time.idle


def test_end_of_event_time_is_reported_as_a_time_that_a_message_holds(runner: ShardRunner) -> None:
    take(runner, 0, timestamp=2**62)
    assert runner.clock is not None
    assert runner.clock.end()
    (time,) = times_of(runner, 5_000)
    assert time is not None
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(time), type=TimeStatus) == time
    assert (time.now_ms, time.watermark_ms) == (2**62, 2**63 - 1)


def test_record_restarts_the_wait_and_ends_the_idleness(runner: ShardRunner) -> None:
    idle = IdleInputs()
    runner.inputs[0].end = 2
    idle.look([runner], 1_000)
    take(runner, 0)
    take(runner, 1)
    assert idle.look([runner], 1_100) == set()
    assert idle.look([runner], 1_199) == set()
    assert idle.look([runner], 1_200) == {SHARD}
    take(runner, 2, timestamp=500)
    assert runner.clock is not None
    assert not runner.clock.is_idle
    assert idle.look([runner], 1_250) == set()
    assert idle.look([runner], 1_350) == {SHARD}


def test_time_in_which_the_process_could_not_read_does_not_count() -> None:
    made = running(Watermark(idle_ms=30_000))
    made.inputs[0].end = 0
    idle = IdleInputs()
    assert idle.look([made], 1_000) == set()
    assert idle.look([made], 601_000) == set(), "the process was suspended for ten minutes"
    for now_ms in range(602_000, 601_000 + 30_000 - LOOK_GAP_MS_MAX, 1_000):
        assert idle.look([made], now_ms) == set()
    assert idle.look([made], 601_000 + 30_000 - LOOK_GAP_MS_MAX) == {SHARD}


@pytest.mark.parametrize("end", [-1, 5])
def test_input_that_has_not_reached_its_end_is_not_idle(runner: ShardRunner, end: int) -> None:
    idle = IdleInputs()
    runner.inputs[0].end = end
    idle.look([runner], 1_000)
    assert idle.look([runner], 9_000) == set()


@pytest.mark.parametrize("watermark", [None, Watermark()])
def test_inputs_become_idle_only_if_the_job_asks_for_it(watermark: Watermark | None) -> None:
    idle, made = IdleInputs(), running(watermark)
    made.inputs[0].end = 0
    idle.look([made], 1_000)
    assert idle.look([made], 9_000) == set()


def test_held_shard_is_not_idle_and_says_why_it_is_not_read(runner: ShardRunner) -> None:
    idle = IdleInputs()
    for now_ms in (1_000, 1_100, 9_000):
        assert idle.look([runner], now_ms, [SHARD]) == set()
    assert idle.look([runner], 9_001) == set(), "it has its full time once it is read again"
    assert idle.look([runner], 9_101) == {SHARD}
    (time,) = times_of(runner, 5_000, ahead=Ahead(700, "in/3"))
    assert time is not None
    assert (time.ahead_ms, time.ahead_of) == (700, "in/3")
