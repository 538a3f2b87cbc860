"""How records from readers reach their shard's runner, and what ends a chunk of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from confluent_kafka import KafkaError

from fcluster import Job, Watermark
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation
from fcluster.wire import messages
from fcluster.wire.messages import SlowestInput, TimeStatus
from fcluster.worker import chunks
from fcluster.worker.consuming import ReadFailed, ReadUpTo
from fcluster.worker.core import events
from fcluster.worker.core.model import Condemned, RecordAt, ShardPhase, StopRecord
from fcluster.worker.idle_inputs import times_of
from tests.unit.worker.worker_parts import (
    SESSION,
    Message,
    Pumping,
    count,
    counting_topology,
    lost,
    merging_topology,
    shard_of,
    timed_topology,
)

TOPOLOGY = counting_topology()
SHARD, OTHER = shard_of(TOPOLOGY, 0), shard_of(TOPOLOGY, 1)


@pytest.fixture(autouse=True)
def wide_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk ends only where the batch ends, however slow the machine is."""
    monkeypatch.setattr(chunks, "AIM_S", 1e6)


@pytest.fixture
def pumping() -> Iterator[Pumping]:
    pumping = Pumping(TOPOLOGY)
    yield pumping
    pumping.close()


def read_up_to(pumping: Pumping, positions: dict[tuple[str, int], int], end: int) -> ReadUpTo:
    reader: Any = pumping.reader
    return ReadUpTo(reader, reader.newest_generation, positions, dict.fromkeys(positions, end))


def test_first_record_opens_an_epoch_and_the_chunk_reports_what_it_touched(pumping: Pumping) -> None:
    runner = pumping.start()
    pumping.start(partition=1)
    assert not pumping.pump.has_work
    pumping.read(Message(0), Message(1), full=True)
    assert not pumping.pipeline.has_begun
    pumping.run()
    assert pumping.fed == [events.RecordsProcessed(frozenset({SHARD}), 2, backlog=True)]
    assert pumping.counts() == [1, 2]
    assert runner.inputs[0].next_offset == 2
    assert pumping.pump.records == 2
    assert pumping.reader.batches_done == 1
    assert pumping.record_watch.record is None


def test_event_ends_the_chunk_with_the_record_that_is_processed(pumping: Pumping) -> None:
    pumping.start()
    pumping.read(Message(0), Message(1), Message(2))
    pumping.inbox.post(events.Tick())
    pumping.pump.run_chunk()
    assert pumping.counts() == [1]
    assert list(pumping.inbox.take(0)) == [events.Tick()]
    pumping.run()
    assert pumping.counts() == [1, 2, 3], "the others are next, in order"


def test_records_of_an_earlier_generation_or_another_reader_are_left_out(pumping: Pumping) -> None:
    pumping.start()
    pumping.read(Message(5), Message(6))
    pumping.shards.stop([SHARD])
    pumping.start()
    pumping.read(Message(0), Message(7, partition=1))
    pumping.run()
    assert pumping.counts() == [1]
    assert pumping.shards.routes["in"][0].next_offset == 1


def test_records_without_a_session_or_a_shard_are_dropped(pumping: Pumping) -> None:
    pumping.read(Message(0))
    pumping.run()
    pumping.start()
    pumping.pipeline.destroy()
    pumping.read(Message(0))
    pumping.run()
    assert pumping.fed == []
    assert pumping.reader.batches_done == 2


def test_failing_handler_ends_its_chunk_because_everything_is_replayed(pumping: Pumping) -> None:
    pumping.start()
    pumping.read(Message(0), Message(1, b'"bad"'), Message(2))
    pumping.run()
    processed, failed = pumping.fed
    assert isinstance(processed, events.RecordsProcessed)
    assert isinstance(failed, events.HandlerFailed)
    assert (failed.shard, failed.offset) == (SHARD, 1)
    assert pumping.counts() == [1]


def test_shard_stops_before_its_stop_record_and_the_others_continue(pumping: Pumping) -> None:
    pumping.start(stop_record=StopRecord(1, Failure.of_record("why")))
    pumping.start(partition=1)

    def stop(event: events.Event) -> None:
        if isinstance(event, events.StopRecordReached):
            pumping.shards.stop([event.shard])

    pumping.on_feed = stop
    pumping.read(Message(0), Message(1), Message(2), Message(0, partition=1))
    pumping.run()
    reached = [event for event in pumping.fed if isinstance(event, events.StopRecordReached)]
    assert reached == [events.StopRecordReached(SESSION, SHARD, 1, Failure.of_record("why"))]
    assert pumping.counts() == [1, 1]
    assert pumping.fed[-1] == events.RecordsProcessed(frozenset({SHARD, OTHER}), 2, backlog=False)


def test_condemned_record_fails(pumping: Pumping) -> None:
    pumping.start(condemned=(Condemned(0, Condemnation(Failure.of_record("refused"), topic="out")),))
    pumping.read(Message(0))
    pumping.run()
    failed = pumping.fed[-1]
    assert isinstance(failed, events.StopRecordReached)
    assert failed.offset == 0
    assert failed.failure.message.endswith("refused")


def test_piece_ends_with_its_last_record_which_is_named_if_it_stands_alone(pumping: Pumping) -> None:
    pumping.start()
    pumping.core_state.pieces.failed(2)
    assert pumping.core_state.pieces.records_max == 1
    pumping.read(Message(0), Message(1))
    pumping.pump.run_chunk()
    assert pumping.fed == [
        events.RecordsProcessed(frozenset({SHARD}), 1, backlog=False, newest=RecordAt(SHARD, 0))
    ]
    assert pumping.counts() == [1]


def test_transaction_that_cannot_begin_is_an_event(pumping: Pumping) -> None:
    pumping.start()
    pumping.writer.fail["begin"] = lost(KafkaError._FENCED)
    pumping.read(Message(0))
    pumping.run()
    (failed,) = pumping.fed
    assert isinstance(failed, events.TransactionFailed)
    assert pumping.pump.records == 0


def test_reported_position_counts_when_all_records_read_before_are_processed(pumping: Pumping) -> None:
    one = pumping.start().inputs[0]
    pumping.read(Message(0))
    pumping.pump.add_told(read_up_to(pumping, {("in", 0): 4}, end=4))
    assert pumping.told == 0
    pumping.run()
    assert pumping.told == 1
    assert (one.read_position, one.end) == (4, 4), "control records counted"
    pumping.pump.add_told(read_up_to(pumping, {("in", 0): 5}, end=5))
    assert pumping.told == 2, "nothing waits, so it counts at once"


def test_end_counts_at_once_although_records_before_it_wait(pumping: Pumping) -> None:
    one = pumping.start().inputs[0]
    pumping.read(Message(0))
    pumping.pump.add_told(read_up_to(pumping, {("in", 0): 1}, end=700))
    assert (one.read_position, one.end) == (0, 700), "the lag is known while the records are processed"


def test_position_of_an_earlier_generation_is_ignored(pumping: Pumping) -> None:
    pumping.start()
    told = read_up_to(pumping, {("in", 0): 9}, end=9)
    pumping.shards.stop([SHARD])
    one = pumping.start().inputs[0]
    pumping.pump.add_told(told)
    assert one.read_position == 0


def test_paused_pump_neither_reads_nor_processes(pumping: Pumping) -> None:
    pumping.start()
    pumping.pump.pause("why")
    pumping.read(Message(0))
    assert not pumping.pump.has_work
    assert not pumping.reader.reads
    assert pumping.pump.wait_s(3.0) == 3.0
    pumping.pump.resume()
    assert pumping.reader.reads
    assert pumping.pump.wait_s(3.0) == 0
    pumping.run()
    assert pumping.counts() == [1]


def test_record_that_may_end_the_process_is_announced_before_each_step(pumping: Pumping) -> None:
    pumping.start(announced=(range(1, 2),))
    pumping.read(Message(0), Message(1), Message(2))
    pumping.run()
    *announced, ended = pumping.link.sent
    assert {one.offset for one in announced} == {1}
    steps = [one.step for one in announced]
    assert steps[0] == "", "before it is decoded"
    assert "count" in steps
    assert ended == messages.RecordEnded(SESSION)
    assert pumping.counts() == [1, 2, 3]


def test_many_records_that_may_end_the_process_are_announced_in_groups(pumping: Pumping) -> None:
    pumping.start(announced=(range(10, 331),))
    offsets = (10, 29, 30, 31, 129, 140, 141, 330, 331)  # offsets in Kafka have gaps
    pumping.read(*(Message(offset) for offset in offsets))
    pumping.run()
    said = [
        (one.offset, one.step, one.span) if isinstance(one, messages.RecordBegun) else None
        for one in pumping.link.sent
    ]
    singly = [(10, "", 1), None, (29, "", 1), None]
    assert said == [*singly, (30, "", 100), (130, "", 100), (330, "", 1), None]
    assert pumping.counts() == list(range(1, len(offsets) + 1))


def test_all_records_of_a_small_range_are_announced_one_by_one(pumping: Pumping) -> None:
    pumping.start(announced=(range(100),))
    pumping.read(*map(Message, range(102)))
    pumping.run()
    announced = [one for one in pumping.link.sent if isinstance(one, messages.RecordBegun)]
    assert [(one.offset, one.span) for one in announced] == [(offset, 1) for offset in range(100)]


def test_group_is_announced_again_after_records_of_another_shard(pumping: Pumping) -> None:
    for number in range(2):
        pumping.start(announced=(range(200),), partition=number)
    pumping.read(*(Message(offset, partition=at) for at, offset in ((0, 60), (0, 61), (1, 60), (0, 62))))
    pumping.run()
    groups = [one.shard.partition for one in pumping.link.sent if isinstance(one, messages.RecordBegun)]
    assert groups == [0, 1, 0]


def test_group_has_ended_when_nothing_is_left_to_be_done(pumping: Pumping) -> None:
    pumping.start(announced=(range(200),))
    for offset in (60, 61):
        pumping.read(Message(offset))
        pumping.run()
    begun, ended, *again = pumping.link.sent
    assert isinstance(begun, messages.RecordBegun)
    assert ended == messages.RecordEnded(SESSION)
    assert again == [msgspec.structs.replace(begun, record=again[0].record), ended]


@pytest.mark.parametrize("code", [KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE])
def test_missing_record_ends_the_session_so_that_the_restore_checks(pumping: Pumping, code: int) -> None:
    pumping.pump.read_failed(ReadFailed("in", 0, 5, KafkaError(code)))
    (failed,) = pumping.fed
    assert isinstance(failed, events.TransactionFailed)
    assert failed.reason.startswith("the next record of in/0 is gone")


def test_unknown_topic_is_reported_as_trouble_and_other_errors_are_logged(
    pumping: Pumping, caplog: pytest.LogCaptureFixture
) -> None:
    pumping.pump.read_failed(ReadFailed("in", 0, -1, KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)))
    pumping.pump.read_failed(ReadFailed("in", 0, -1, KafkaError(KafkaError._BAD_MSG)))
    (trouble,) = pumping.link.trouble
    assert trouble.startswith("can't read in/0")
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == ["reading in/0"]
    assert pumping.fed == []


# --- several inputs ---------------------------------------------------------------------------------------


@pytest.fixture
def merging() -> Iterator[Pumping]:
    merging = Pumping(merging_topology())
    yield merging
    merging.close()


def test_records_of_several_inputs_wait_for_their_turn(merging: Pumping) -> None:
    runner = merging.start()
    of_a = [Message(0, topic="a", timestamp_ms=10), Message(1, topic="a", timestamp_ms=30)]
    merging.read(*of_a, standings={("a", 0): (2, 2)})
    merging.pump.add_merged()
    assert not merging.pump.has_work, "b may still have earlier records"
    merging.read(Message(0, topic="b", timestamp_ms=20), standings={("b", 0): (1, 1)})
    merging.pump.add_merged()
    merging.run()
    assert merging.counts() == [1, 2, 3]
    assert [one.next_offset for one in runner.inputs] == [2, 1]
    assert merging.reader.batches_done == 2


def test_records_that_wait_in_a_merge_do_not_count_as_read(merging: Pumping) -> None:
    runner = merging.start()
    merging.read(Message(0, topic="a", timestamp_ms=10), standings={("a", 0): (1, 1)})
    merging.pump.add_told(read_up_to(merging, {("a", 0): 1}, end=1))
    assert [one.read_position for one in runner.inputs] == [0, 0]
    merging.pump.add_told(read_up_to(merging, {("b", 0): 0}, end=0))
    merging.pump.add_merged()
    merging.run()
    assert [one.read_position for one in runner.inputs] == [1, 0]


def test_idle_input_lets_the_others_pass(merging: Pumping) -> None:
    merging.start()
    merging.read(Message(0, topic="a", timestamp_ms=10), standings={("a", 0): (1, 1)})
    merging.pump.add_told(read_up_to(merging, {("b", 0): 0}, end=0))
    merging.pump.add_merged()
    merging.run()
    assert merging.counts() == [1]


def test_stopped_shard_with_several_inputs_gets_nothing_more(merging: Pumping) -> None:
    merging.start()
    for topic in "ab":
        merging.read(Message(0, topic=topic), standings={(topic, 0): (1, 1)})
    merging.pump.add_merged()
    merging.shards.stop([shard_of(merging.topology)])
    merging.start(partition=1)
    merging.run()
    assert merging.counts() == []
    assert merging.shards.until_merged_s(3.0, 0) == 3.0


# --- event time -------------------------------------------------------------------------------------------


@pytest.fixture
def timed() -> Iterator[Pumping]:
    timed = Pumping(timed_topology(idle_ms=100))
    yield timed
    timed.close()


def test_input_that_becomes_idle_is_something_to_commit(timed: Pumping) -> None:
    timed.start()
    timed.pump.add_told(read_up_to(timed, {("in", 0): 0}, end=0))
    timed.pump.pass_time(1_000)
    assert timed.fed == []
    timed.pump.pass_time(1_100)
    assert timed.fed == [events.RecordsProcessed(frozenset({SHARD}), 0, backlog=False)]


def test_postponed_event_time_is_something_to_commit_once_it_may_be_told(
    timed: Pumping, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed.start()
    monkeypatch.setattr(timed.pipeline, "untold", lambda now_ms: {SHARD, OTHER} if now_ms >= 500 else set())
    timed.pump.pass_time(499)
    assert timed.fed == []
    timed.pump.pass_time(500)
    assert timed.fed == [events.RecordsProcessed(frozenset({SHARD}), 0, backlog=False)], (
        "not that of a shard on another worker"
    )


def test_released_shard_takes_part_in_no_further_epoch_for_its_event_time(timed: Pumping) -> None:
    timed.start()
    timed.core_state.shards[SHARD].phase = ShardPhase.RELEASING
    timed.pump.add_told(read_up_to(timed, {("in", 0): 0}, end=0))
    timed.pump.pass_time(1_000)
    timed.pump.pass_time(9_000)
    assert timed.fed == []


# --- partitions that wait for each other --------------------------------------------------------------------


def test_partition_that_is_far_ahead_is_not_read_on_until_the_other_has_come_after() -> None:
    pumping = Pumping(timed_topology(idle_ms=100, max_drift_ms=1_000))
    try:
        runner = pumping.start()
        pumping.start(partition=1)
        pumping.read(
            Message(0, timestamp_ms=1_000),
            Message(0, partition=1, timestamp_ms=5_000),
            Message(1, partition=1, timestamp_ms=5_001),
        )
        pumping.run()
        pumping.pump.pass_time(10_000)
        assert pumping.reader.held == [(("in", 1), "ahead")]
        (held,) = pumping.pump.drift.held.values() if pumping.pump.drift else ()
        assert held == (4_001, "in/0")
        assert times_of(runner, 0)[0] == TimeStatus(1_000, 1_000, False)
        pumping.read(Message(1, timestamp_ms=4_900))
        pumping.run()
        pumping.pump.pass_time(10_100)
        assert pumping.reader.held == []
        assert pumping.counts() == [1, 1, 2, 2]
    finally:
        pumping.close()


def test_merged_shard_that_is_far_ahead_processes_nothing_until_others_have_come_after() -> None:
    job = Job("j")
    a = job.topic("a", watermark=Watermark(max_drift_ms=1_000))
    job.merge(a, job.topic("b")).process(count, name="count").to(job.topic("out"))
    pumping = Pumping(job.build(Settings()))
    try:
        pumping.start()
        pumping.core_state.slowest_elsewhere = [SlowestInput("a", 1_000, "a/1")]
        for offset, a_ms, b_ms in ((0, 9_000, 9_000), (1, 9_001, 9_500)):
            pumping.read(Message(offset, topic="a", timestamp_ms=a_ms))
            pumping.read(Message(offset, topic="b", timestamp_ms=b_ms))
        pumping.pump.add_merged()
        pumping.run()
        assert pumping.counts() == [1, 2, 3]
        pumping.pump.pass_time(10_000)
        pumping.read(Message(2, topic="a", timestamp_ms=9_600))
        pumping.pump.add_merged()
        assert not pumping.pump.has_work
        pumping.core_state.slowest_elsewhere = [SlowestInput("a", 9_000, "a/1")]
        pumping.pump.pass_time(10_100)
        pumping.pump.add_merged()
        assert pumping.pump.has_work
    finally:
        pumping.close()


def test_job_without_max_drift_looks_for_nothing(timed: Pumping) -> None:
    assert timed.pump.drift is None
