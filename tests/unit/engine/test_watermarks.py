"""Event time of a whole job in the driver, over repartitions, merges and crashes; and when it is told."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Job, Watermark, days, hours, milliseconds, minutes, seconds
from fcluster.common.errors import JobError
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.positions import CommittedPosition, decode_position
from fcluster.common.settings import Settings
from fcluster.engine.clock import END_MS, EventClock, decode_watermark
from fcluster.engine.watermarks import SELDOM_MS, Telling
from fcluster.graph.topology import Topology
from fcluster.testing import Driver

REPARTITION = repartition_topic("shops", "per-shop")


def passing(_ctx: Any, value: Any) -> Iterator[Any]:
    yield value


NO_DELAY = Watermark()


def two_stages(watermark: Watermark | None = NO_DELAY) -> Job:
    """Orders, and behind a `key_by` a stage that works by shop."""
    job = Job("shops")
    orders = job.topic("orders", watermark=watermark)
    job.stream(orders).key_by("shop").process(passing, to=job.topic("out"), name="per-shop")
    return job


def merged(*watermarks: Watermark) -> Job:
    """One stage that reads the topics a, b, ..."""
    job = Job("shops")
    topics = [job.topic("ab"[number], watermark=one) for number, one in enumerate(watermarks)]
    job.merge(*topics).process(passing, to=job.topic("out"), name="all")
    return job


def send(driver: Driver, partition: int, timestamp: int, topic: str = "orders") -> None:
    driver.send(topic, {"shop": f"shop-{timestamp % 7}"}, key="k", timestamp=timestamp, partition=partition)


# --- in the driver ----------------------------------------------------------------------------------------


def test_event_time_after_a_repartition_is_that_of_the_slowest_shard() -> None:
    with Driver(two_stages(), partitions=2) as driver:
        send(driver, 0, 1_000)
        assert driver.event_times("orders") == {0: 1_000, 1: None}
        assert driver.event_times("per-shop") == {0: None, 1: None}
        send(driver, 1, 400)
        assert driver.event_times("per-shop") == {0: 400, 1: 400}
        send(driver, 1, 3_000)
        assert driver.event_times("per-shop") == {0: 1_000, 1: 1_000}
        assert len(driver.read("out")) == 3


def test_watermark_records_are_not_among_the_records_of_the_repartition_topic() -> None:
    with Driver(two_stages(), partitions=2) as driver:
        send(driver, 0, 1_000)
        assert len(driver.records(REPARTITION)) == 1
        assert driver.skipped == 0


def test_delay_holds_event_time_back() -> None:
    with Driver(two_stages(Watermark(max_delay_ms=300)), partitions=1) as driver:
        send(driver, 0, 1_000)
        send(driver, 0, 800)
        assert driver.event_times("per-shop") == {0: 700}


def test_idle_partition_is_left_out_after_the_repartition_too_until_it_is_back() -> None:
    with Driver(two_stages(), partitions=2) as driver:
        send(driver, 0, 1_000)
        send(driver, 1, 400)
        driver.set_idle("orders", 1)
        assert driver.event_times("per-shop") == {0: 1_000, 1: 1_000}
        driver.crash()  # what had an effect is committed
        send(driver, 0, 2_000)
        assert driver.event_times("per-shop") == {0: 2_000, 1: 2_000}
        send(driver, 1, 500)
        send(driver, 0, 3_000)
        assert driver.event_times("per-shop") == {0: 2_000, 1: 2_000}


def test_partition_without_any_record_can_be_idle() -> None:
    with Driver(two_stages(), partitions=2) as driver:
        send(driver, 0, 1_000)
        driver.set_idle("orders", 1)
        assert driver.event_times("per-shop") == {0: 1_000, 1: 1_000}


def test_merged_topics_have_the_time_of_the_slower_one() -> None:
    with Driver(merged(Watermark(), Watermark(max_delay_ms=100)), partitions=1) as driver:
        send(driver, 0, 1_000, "a")
        send(driver, 0, 900, "b")
        assert driver.event_times("a") == driver.event_times("all") == {0: 800}
        driver.crash()
        assert driver.event_times("a") == {0: 800}
        send(driver, 0, 2_000, "b")
        assert driver.event_times("a") == {0: 1_000}


def test_timers_fire_when_a_topic_that_is_idle_no_longer_holds_event_time_back() -> None:
    def remind(ctx: Any, _value: Any) -> None:
        ctx.timer("remind", at=ctx.timestamp + 100)

    job = Job("shops")
    stream = job.merge(job.topic("a", watermark=NO_DELAY), job.topic("b"))
    stream.process(remind, to=job.topic("out"), timers={"remind": lambda key, _ctx: key})
    with Driver(job, partitions=1) as driver:
        driver.send("a", 1, key="first", timestamp=1_000)
        driver.send("b", 1, key="second", timestamp=1_500)
        driver.send("b", 1, key="third", timestamp=5_000)
        assert driver.read_values("out") == []
        driver.set_idle("a", 0)
        assert driver.read_values("out") == ["first", "second"]


def test_event_time_of_an_open_epoch_is_lost_with_it() -> None:
    with Driver(two_stages(), partitions=1, auto_barrier=False) as driver:
        send(driver, 0, 1_000)
        driver.settle()
        send(driver, 0, 2_000)
        assert driver.event_times("orders") == {0: 2_000}
        assert driver.event_times("per-shop") == {0: 1_000}  # told at the barrier
        driver.settle()
        driver.crash()
        assert driver.event_times("per-shop") == {0: 2_000}


def test_event_time_crosses_several_repartitions() -> None:
    job = Job("shops")
    orders = job.topic("orders", watermark=Watermark())
    stream = job.stream(orders).key_by("shop").process(passing, name="per-shop")
    stream.key_by("shop", name="again").process(passing, to=job.topic("out"), name="last")
    with Driver(job, partitions=3) as driver:
        for partition in range(3):
            send(driver, partition, 1_000 + partition)
        assert driver.event_times("last") == {0: 1_000, 1: 1_000, 2: 1_000}


_Step = tuple[str, int, int]
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 1), st.integers(0, 100)),
        st.tuples(st.just("barrier"), st.just(0), st.just(0)),
        st.tuples(st.just("crash"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(_STEPS)
def test_barriers_and_crashes_change_nothing_and_time_never_goes_back(steps: list[_Step]) -> None:
    with (
        Driver(two_stages(), partitions=2) as plain,
        Driver(two_stages(), partitions=2, auto_barrier=False) as hurt,
    ):
        committed = {0: -1, 1: -1}
        for step, partition, timestamp in steps:
            if step == "send":
                send(plain, partition, timestamp)
                send(hurt, partition, timestamp)
            elif step == "barrier":
                hurt.settle()
                committed = {n: -1 if at is None else at for n, at in hurt.event_times("per-shop").items()}
            else:
                hurt.crash()
            for number, at in hurt.event_times("per-shop").items():
                assert (-1 if at is None else at) >= committed[number]
        hurt.settle()
        for stage in ("orders", "per-shop"):
            assert hurt.event_times(stage) == plain.event_times(stage)
        assert sorted(map(str, hurt.read_values("out"))) == sorted(map(str, plain.read_values("out")))


# --- planted: a watermark that goes back after restore ----------------------------------------------------


def times_before_and_after_a_crash(changed: Watermark) -> list[tuple[int | None, int | None]]:
    """The event time of each stage before a crash, and after it and a late record. The job that restarts has
    another watermark."""
    with Driver(two_stages(), partitions=1) as driver:
        send(driver, 0, 1_000)
        before = [driver.event_times(stage)[0] for stage in ("orders", "per-shop")]
        driver.topology = two_stages(changed).build(Settings())
        driver.crash()
        send(driver, 0, 700)
        after = [driver.event_times(stage)[0] for stage in ("orders", "per-shop")]
    return list(zip(before, after, strict=True))


def _forgets(_clock: EventClock, _number: int, _text: str) -> None:
    return


def _forgets_its_time(clock: EventClock, number: int, text: str) -> None:
    """Keep only the inputs, and compute the rest again from the next record on."""
    restore(clock, number, text)
    clock.now_ms = None


restore = EventClock.restore


@pytest.mark.parametrize("planted", [None, _forgets, _forgets_its_time])
def test_a_watermark_that_goes_back_after_restore_is_caught(
    planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted is not None:
        monkeypatch.setattr(EventClock, "restore", planted)
    times = times_before_and_after_a_crash(Watermark(max_delay_ms=500))
    went_back = [after is None or after < (before or 0) for before, after in times]
    assert any(went_back) == (planted is not None), times


# --- what is declared -------------------------------------------------------------------------------------


def test_job_that_does_not_use_event_time_has_none_and_commits_none() -> None:
    with Driver(two_stages(None), partitions=1) as driver:
        send(driver, 0, 1_000)
        assert len(driver.records(REPARTITION)) == 1
        with pytest.raises(JobError, match="doesn't use event time"):
            driver.event_times("orders")
    assert not any(stage.keeps_time for stage in two_stages(None).build(Settings()).stages)


def test_state_does_not_depend_on_the_watermark() -> None:
    plain, timed = two_stages(None).build(Settings()), two_stages().build(Settings())
    assert plain.fingerprint == timed.fingerprint
    assert plain.describe() == timed.describe()


def test_two_watermarks_for_a_topic_are_refused() -> None:
    job = Job("shops")
    orders = job.topic("orders", watermark=Watermark())
    job.stream(orders, watermark=Watermark())
    with pytest.raises(JobError, match="has two watermarks"):
        job.stream(orders, watermark=Watermark(max_delay_ms=1))


@pytest.mark.parametrize(
    "fields", [{"max_delay_ms": -1}, {"max_delay_ms": 1.5}, {"idle_ms": 0}, {"idle_ms": True}]
)
def test_watermark_accepts_whole_milliseconds_only(fields: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="not a number of milliseconds"):
        Watermark(**fields)


def test_durations_of_a_watermark_may_be_timedeltas() -> None:
    assert Watermark(max_delay=seconds(5), idle=minutes(1)) == Watermark(max_delay_ms=5_000, idle_ms=60_000)
    assert Watermark(max_delay=timedelta()) == Watermark()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_delay": 5}, "max_delay=5 of a Watermark is not a timedelta"),
        ({"max_delay": seconds(-1)}, "out of range"),
        ({"idle": timedelta()}, "out of range"),
        ({"idle": milliseconds(1.5)}, "not a whole number of milliseconds"),
        ({"max_delay": seconds(5), "max_delay_ms": 1}, "both max_delay= and max_delay_ms="),
        ({"max_delay": seconds(5), "max_delay_ms": 0}, "both max_delay= and max_delay_ms="),
        ({"idle": seconds(5), "idle_ms": 1}, "both idle= and idle_ms="),
    ],
)
def test_durations_of_a_watermark_are_checked(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(JobError, match=problem):
        Watermark(**fields)


def test_short_names_of_durations_are_timedeltas() -> None:
    short = [milliseconds(1), seconds(2), minutes(3), hours(4), days(0.5)]
    assert short == [
        timedelta(milliseconds=1),
        timedelta(seconds=2),
        timedelta(minutes=3),
        timedelta(hours=4),
        timedelta(hours=12),
    ]


@pytest.mark.parametrize("number", ["5", None, float("nan"), 1e20])
def test_duration_of_anything_but_a_number_in_range_is_refused(number: Any) -> None:
    with pytest.raises(JobError, match=r"minutes\(.*\) is not a duration"):
        minutes(number)


def test_anything_but_a_watermark_is_refused() -> None:
    with pytest.raises(JobError, match="is not a Watermark"):
        Job("shops").topic("orders", watermark=5_000)  # type: ignore[arg-type]


# --- what is committed ------------------------------------------------------------------------------------


def test_positions_from_before_event_time_are_read_and_start_without_it() -> None:
    for metadata in ("1:5:3:now", "2:5:3:now:id-7"):
        position = decode_position(7, metadata)
        assert position.clock == ""
        assert position.encode_metadata() == metadata


@pytest.mark.parametrize("topic_id", ["", "id-7"])
def test_position_contains_the_clock(topic_id: str) -> None:
    clock = EventClock([0, None])
    clock.observe(0, 1_000)
    position = CommittedPosition(7, 5, 3, "now", topic_id, clock=clock.encode(0))
    assert decode_position(7, position.encode_metadata()) == position
    assert len(position.encode_metadata()) < 100


# --- what is told when ------------------------------------------------------------------------------------


def clocks(**times: int) -> dict[ShardId, EventClock]:
    made: dict[ShardId, EventClock] = {}
    for number, at in enumerate(times.values()):
        made[ShardId("orders", number)] = clock = EventClock([0])
        clock.observe(0, at)
    return made


SIZES = {"orders": 2, "per-shop": 3}


def topology() -> Topology:
    return two_stages().build(Settings())


def test_each_partition_is_told_of_all_shards_whose_time_has_moved() -> None:
    telling, two = Telling(topology()), clocks(one=100, other=200)
    records = telling.due(two, SIZES, 0)
    assert [(record.topic, record.partition) for record in records] == [(REPARTITION, n) for n in range(3)]
    shards, said = decode_watermark(records[0].value)
    assert (shards, [tuple(one) for one in said]) == (2, [(0, 100, False), (1, 200, False)])
    two[ShardId("orders", 1)].observe(0, 300)
    (record, *_others) = telling.due(two, SIZES, SELDOM_MS)
    assert [tuple(one) for one in decode_watermark(record.value)[1]] == [(1, 300, False)]


def test_event_time_that_no_stage_needs_is_told_rarely_and_then_up_to_date() -> None:
    telling, one = Telling(topology()), clocks(one=100)
    assert telling.due(one, SIZES, 0)
    one[ShardId("orders", 0)].observe(0, 200)
    assert telling.due(one, SIZES, SELDOM_MS - 1) == []
    one[ShardId("orders", 0)].observe(0, 300)
    assert decode_watermark(telling.due(one, SIZES, SELDOM_MS)[0].value)[1][0].time_ms == 300


def test_last_postponed_event_time_is_overdue_once_it_may_be_told() -> None:
    telling, one = Telling(topology()), clocks(one=100)
    telling.due(one, SIZES, 0)
    assert telling.overdue(SELDOM_MS) == set()
    one[ShardId("orders", 0)].observe(0, 200)
    telling.due(one, SIZES, 500)
    assert telling.overdue(SELDOM_MS - 1) == set()
    assert telling.overdue(SELDOM_MS) == {ShardId("orders", 0)}
    assert telling.overdue(SELDOM_MS) == set(), "named once"
    telling.due(one, SIZES, SELDOM_MS + 1)
    assert telling.overdue(9 * SELDOM_MS) == set(), "it has been told"


def test_postponed_event_time_of_a_shard_that_left_is_dropped() -> None:
    telling, one = Telling(topology()), clocks(one=100)
    telling.due(one, SIZES, 0)
    one[ShardId("orders", 0)].observe(0, 200)
    telling.due(one, SIZES, 500)
    telling.forget(one)
    assert telling.overdue(SELDOM_MS) == set()


def test_idle_shard_is_told_at_once_even_if_no_stage_needs_it() -> None:
    telling, one = Telling(topology()), clocks(one=100)
    telling.due(one, SIZES, 0)
    one[ShardId("orders", 0)].set_idle(0, True)
    assert [tuple(said) for said in decode_watermark(telling.due(one, SIZES, 1)[0].value)[1]] == [
        (0, 100, True)
    ]
    one[ShardId("orders", 0)].observe(0, 50)
    assert [tuple(said) for said in decode_watermark(telling.due(one, SIZES, 2)[0].value)[1]] == [
        (0, 100, False)
    ]


def test_end_is_told_at_once_even_if_no_stage_needs_it() -> None:
    telling, one = Telling(topology()), clocks(one=100)
    telling.due(one, SIZES, 0)
    one[ShardId("orders", 0)].end()
    assert [tuple(said) for said in decode_watermark(telling.due(one, SIZES, 1)[0].value)[1]] == [
        (0, END_MS, False)
    ]


def test_nothing_is_told_twice_unless_another_worker_may_have_told_since() -> None:
    telling, one = Telling(topology(), seldom_ms=0), clocks(one=100)
    assert telling.due(one, SIZES, 0)
    assert telling.due(one, SIZES, 0) == []
    telling.forget(one)
    assert telling.due(one, SIZES, 0)


def test_nothing_is_told_while_the_sizes_of_stages_are_unknown() -> None:
    telling, one = Telling(topology(), seldom_ms=0), clocks(one=100)
    assert telling.due(one, {}, 0) == []
    assert telling.due(one, SIZES, 0)
