"""Which shards wait for others in event time, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fcluster import Job, Watermark
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.common.settings import Settings
from fcluster.engine.records import OutputPort
from fcluster.engine.state import ShardState
from fcluster.graph.drift import keep_step
from fcluster.graph.topology import Topology
from fcluster.wire.messages import SlowestInput
from fcluster.worker.drift import PATIENCE_AT_END_MS, PATIENCE_MS, Drift
from fcluster.worker.idle_inputs import Ahead, IdleInputs
from fcluster.worker.processing import ShardRunner
from tests.state_memory import EntriesMax
from tests.unit.worker.processing_bench import EmptyStore
from tests.unit.worker.worker_parts import Message

STEP_MS = 1_000
FOR_EVER = 10 * PATIENCE_MS


def nothing(_ctx: Any, _value: Any) -> None:
    pass


def one_topic(**options: Any) -> Topology:
    job = Job("j")
    source = job.topic("in", watermark=Watermark(max_drift_ms=100, **options))
    job.stream(source).key_by("k", name="k").process(nothing, name="n")
    return job.build(Settings())


class Shards:
    """Shards of a job's first stage, on a clock."""

    def __init__(self, topology: Topology, partitions: int = 2, stage: int = 0) -> None:
        self.stage = topology.stages[stage]
        self.drift = Drift(keep_step(topology))
        self.idle = IdleInputs()
        self.runners = [self._runner(partition) for partition in range(partitions)]
        self.now_ms = 1_000.0
        self.elsewhere: Sequence[SlowestInput] = ()
        self._offset = 0

    def _runner(self, partition: int) -> ShardRunner:
        stage = self.stage
        state = ShardState(EmptyStore(lambda _key: None), stage.all_stores, EntriesMax(1_000))
        further = tuple(InputOffset(0) for _ in stage.inputs[1:])
        position = CommittedPosition(0, 0, 0, "", further=further)
        return ShardRunner(stage, partition, state, position, OutputPort())

    def take(self, partition: int, timestamp_ms: int, number: int = 0) -> None:
        """Process a record."""
        self._offset += 1
        one = self.runners[partition].inputs[number]
        message: Any = Message(self._offset, b"{}", one.topic, partition, timestamp_ms)
        clock = self.runners[partition].clock
        assert clock is not None
        clock.observe(number, timestamp_ms)
        one.last = message

    def at_end(self, partition: int, number: int = 0) -> None:
        one = self.runners[partition].inputs[number]
        one.end = one.read_position = one.next_offset

    def look(self, after_ms: float = 10) -> dict[int, Ahead]:
        """The held shards, by partition."""
        while after_ms > 0:
            self.now_ms += min(after_ms, STEP_MS)
            after_ms -= STEP_MS
            held = self.drift.held.keys() & {runner.shard for runner in self.runners}
            turn = self.drift.look(self.runners, self.elsewhere, self.now_ms)
            held |= {runner.shard for runner in turn.hold}
            held -= {runner.shard for runner in turn.release}
            assert held == self.drift.held.keys(), "what is told doesn't fit what is held"
            self.idle.look(self.runners, self.now_ms, self.drift.held)
        return {shard.partition: ahead for shard, ahead in self.drift.held.items()}


@pytest.fixture
def shards() -> Shards:
    shards = Shards(one_topic())
    shards.take(0, 1_000)
    shards.take(1, 1_000)
    return shards


def test_shard_waits_that_is_too_far_ahead_and_goes_on_when_the_other_has_come_after(shards: Shards) -> None:
    shards.take(1, 1_100)
    assert shards.look() == {}, "that is still allowed"
    shards.take(1, 1_101)
    assert shards.look() == {1: Ahead(101, "in/0")}
    assert shards.drift.slowest == [SlowestInput("in", 1_000, "in/0")]
    shards.take(0, 1_050)
    assert shards.look() == {1: Ahead(51, "in/0")}, "it waits until it is half as far ahead"
    shards.take(0, 1_051)
    assert shards.look() == {}
    shards.take(0, 2_000)
    assert shards.look() == {0: Ahead(899, "in/1")}, "now it is the other's turn to wait"


def test_held_shard_is_not_idle_and_keeps_its_turn(shards: Shards) -> None:
    shards = Shards(one_topic(idle_ms=5_000))
    for partition in range(2):
        shards.take(partition, 1_000)
        shards.at_end(partition)
    shards.take(1, 2_000)
    shards.at_end(1)
    for at_ms in range(1_001, 1_040):
        shards.take(0, at_ms)
        assert shards.look(STEP_MS).keys() == {1}
    clock = shards.runners[1].clock
    assert clock is not None
    assert not clock.source(0).idle, "nobody knows whether it has new records"


def test_nobody_waits_for_an_idle_partition() -> None:
    shards = Shards(one_topic(idle_ms=20_000))
    shards.take(0, 1_000)
    shards.take(1, 2_000)
    shards.at_end(0)
    assert shards.look(19_000).keys() == {1}
    assert shards.look(2_000) == {}
    shards.take(0, 1_001)
    assert shards.look().keys() == {1}, "it has a record again"


def test_nobody_waits_long_for_a_partition_at_its_end_without_idle(shards: Shards) -> None:
    shards.take(1, 2_000)
    shards.at_end(0)
    assert shards.look(PATIENCE_AT_END_MS - STEP_MS).keys() == {1}
    assert shards.look(2 * STEP_MS) == {}


@pytest.mark.parametrize("idle", [{}, {"idle_ms": 3_600_000}])
def test_nobody_waits_for_an_empty_partition(idle: dict[str, int]) -> None:
    shards = Shards(one_topic(**idle))
    shards.take(1, 2_000)
    assert shards.look() == {1: Ahead(0, "in/0")}, "where it ends isn't known yet"
    shards.at_end(0)
    assert shards.look() == {}


def test_nobody_waits_for_ever_for_a_partition_without_usable_records() -> None:
    """They have no timestamps, or all fail."""
    shards = Shards(one_topic())
    shards.take(1, 2_000)
    shards.runners[0].inputs[0].end = 1_000_000
    assert shards.look(PATIENCE_MS - STEP_MS).keys() == {1}
    assert shards.drift.slowest == [SlowestInput("in", None, "in/0")]
    assert shards.look(2 * STEP_MS) == {}
    assert shards.drift.slowest == [SlowestInput("in", 2_000, "in/1")]


def test_nobody_waits_for_ever_for_a_partition_that_no_longer_moves(shards: Shards) -> None:
    shards.take(1, 2_000)
    shards.runners[0].inputs[0].end = 1_000_000
    assert shards.look(PATIENCE_MS - STEP_MS).keys() == {1}
    assert shards.look(2 * STEP_MS) == {}
    shards.take(0, 1_010)
    assert shards.look().keys() == {1}, "it moves again"


def test_one_is_always_read(shards: Shards) -> None:
    """Whoever waited longest: the slowest partition has its full patience when it goes on."""
    shards.take(1, 2_000)
    shards.look(PATIENCE_MS / 2)
    shards.take(0, 3_000)
    assert shards.look(PATIENCE_MS / 2).keys() == {0}


def test_time_in_which_the_process_could_not_read_does_not_count(shards: Shards) -> None:
    shards.take(1, 2_000)
    shards.runners[0].inputs[0].end = 1_000_000
    shards.look()
    shards.now_ms += FOR_EVER
    assert shards.look().keys() == {1}


def test_slowest_partition_of_another_worker_counts_while_it_is_said(shards: Shards) -> None:
    shards.elsewhere = [SlowestInput("in", 500, "in/7"), SlowestInput("other", 0, "b/0")]
    assert shards.look() == {0: Ahead(500, "in/7"), 1: Ahead(500, "in/7")}
    shards.elsewhere = [SlowestInput("in", None, "in/8")]
    assert shards.look() == {0: Ahead(0, "in/8"), 1: Ahead(0, "in/8")}
    for _ in range(100):
        shards.elsewhere = [SlowestInput("in", 500, "in/7")]
        assert shards.look(STEP_MS).keys() == {0, 1}
    assert shards.look(PATIENCE_MS + STEP_MS) == {}, "the coordinator is gone"
    shards.elsewhere = ()
    assert shards.look() == {}


def test_partition_that_is_read_to_the_end_of_a_bounded_run_holds_nobody_back(shards: Shards) -> None:
    shards.take(1, 2_000)
    assert shards.look().keys() == {1}
    one = shards.runners[0].inputs[0]
    one.stop_at = one.next_offset
    assert shards.look() == {}
    assert shards.drift.slowest == [SlowestInput("in", 2_000, "in/1")]


def test_shard_whose_event_time_has_ended_takes_no_part(shards: Shards) -> None:
    clock = shards.runners[0].clock
    assert clock is not None
    clock.end()
    assert shards.look() == {}
    assert shards.drift.slowest == [SlowestInput("in", 1_000, "in/1")]


def test_shard_that_starts_again_is_read(shards: Shards) -> None:
    shards.take(1, 2_000)
    assert shards.look().keys() == {1}
    shards.runners[1] = shards._runner(1)
    shards.drift.look(shards.runners, (), shards.now_ms + 1)
    assert [shard.partition for shard in shards.drift.held] == [0], "now it is the other's turn"
    gone = shards.runners.pop()
    shards.take(0, 9_000)
    assert shards.look() == {}
    assert gone.inputs[0] not in shards.drift._moves


def test_shard_with_several_inputs_is_as_far_as_the_slowest_of_them() -> None:
    job = Job("j")
    a = job.topic("a", watermark=Watermark(max_drift_ms=100))
    job.merge(a, job.topic("b")).process(nothing, name="n")
    shards = Shards(job.build(Settings()))
    for partition in range(2):
        for number in range(2):
            shards.take(partition, 1_000, number)
    shards.take(1, 9_000, 0)
    assert shards.look() == {}, "its other input isn't ahead"
    shards.take(1, 1_101, 1)
    assert shards.look() == {1: Ahead(101, "a/0")}


def test_topics_that_meet_further_on_wait_for_each_other_and_others_do_not() -> None:
    job = Job("j")
    a = job.topic("a", watermark=Watermark(max_drift_ms=100))
    b, c, d, e = (job.topic(name) for name in "bcde")
    both = job.merge(job.stream(a).key_by("k", name="x"), job.stream(b).key_by("k", name="y"))
    both.process(nothing, name="n").key_by("k", name="z").process(nothing, name="m").to(d)
    job.stream(c).key_by("k", name="w").process(nothing, name="o")
    job.stream(d).process(nothing, name="p")
    job.stream(e).key_by("k", name="v").process(nothing, name="q")
    found = keep_step(job.build(Settings()))
    assert {name: (one.group, one.inputs, one.max_drift_ms) for name, one in found.items()} == {
        "a": ("a", (0,), 100),
        "b": ("a", (0,), None),
    }


def test_job_without_max_drift_has_no_groups() -> None:
    job = Job("j")
    job.stream(job.topic("a", watermark=Watermark())).key_by("k", name="k").process(nothing, name="n")
    assert keep_step(job.build(Settings())) == {}
