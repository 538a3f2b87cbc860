"""Records whose time is in their value: `timestamp=` of a topic."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from fcluster import Job, Tumbling, ValueState, Watermark, count
from fcluster.common.errors import JobError
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation
from fcluster.engine.merging import InputMerge
from fcluster.engine.stamps import orders_of
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver, JobStopped
from tests.unit.engine.timers_bench import TimersBench
from tests.unit.worker.processing_bench import FakeMessage

MS = timedelta(milliseconds=1)
TEN = Tumbling(10 * MS)
KAFKA_MS = 5_000_000
"""The timestamp that all records have in Kafka."""


@dataclasses.dataclass
class Paid:
    cents: int
    at: datetime


def time_of(value: Any) -> Any:
    return value["at"] * 10


def counting(timestamp: Any = "ts", *, on_error: Any = None, delay: int = 0, value: Any = "json") -> Job:
    """Counts the records of "in" in windows of 10 ms."""
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    source = job.topic(
        "in",
        value=value,
        timestamp=timestamp,
        watermark=Watermark(delay),
        on_error=dead if on_error == "dead" else on_error,
    )
    job.stream(source).window(TEN, late=job.topic("late"), name="w").aggregate(n=count()).to(job.topic("out"))
    return job


def send(driver: Driver, *values: Any, key: str = "k") -> None:
    for value in values:
        driver.send("in", value, key=key, timestamp=KAFKA_MS)


def windows(driver: Driver) -> list[tuple[int, int, int]]:
    return [(one["start"], one["end"], one["n"]) for one in driver.read_values("out")]


# --- what the time is used for --------------------------------------------------------------------------


@pytest.mark.parametrize(("timestamp", "field", "factor"), [("ts", "ts", 1), (time_of, "at", 10)])
def test_windows_and_event_time_follow_the_time_in_the_value(timestamp: Any, field: str, factor: int) -> None:
    with Driver(counting(timestamp), partitions=1) as driver:
        send(driver, *({field: at // factor} for at in (1_000, 1_000, 1_010)))
        assert windows(driver) == [(1_000, 1_010, 2)]
        assert driver.event_times("in") == {0: 1_010}
        send(driver, {field: 1_000 // factor})
        assert driver.late == 1
        assert [(one.timestamp, one.value) for one in driver.records("late")] == [
            (1_000, {field: 1_000 // factor})
        ]


def test_outputs_and_handlers_get_the_time_in_the_value_also_in_several_chains() -> None:
    job = Job("j")
    source = job.topic("in", timestamp="ts")
    seen: list[int] = []

    def note(ctx: Any, value: Any) -> Any:
        seen.append(ctx.timestamp)
        return value

    job.stream(source).process(note, to=job.topic("handled"))
    job.stream(source).filter(bool).to(job.topic("plain"))
    job.stream(source).key_by("k").process(note, name="n", to=job.topic("crossed"))
    with Driver(job) as driver:
        driver.send("in", {"ts": 17, "k": "a"}, timestamp=KAFKA_MS)
        for topic in ("handled", "plain", "crossed"):
            assert [one.timestamp for one in driver.records(topic)] == [17]
    assert seen == [17, 17]


def test_time_crosses_a_repartition() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in", timestamp="ts", watermark=Watermark(5)))
    stream.key_by("k").window(TEN, name="w").aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions=2) as driver:
        for partition, at in [(0, 101), (1, 103), (1, 130), (0, 109), (0, 118)]:
            driver.send("in", {"ts": at, "k": "a"}, partition=partition, timestamp=KAFKA_MS)
        assert driver.event_times("w") == {0: 113, 1: 113}
        assert windows(driver) == [(100, 110, 3)]


def test_time_is_the_same_after_a_crash() -> None:
    with Driver(counting(delay=5), partitions=1, auto_barrier=False) as driver:
        send(driver, {"ts": 101}, {"ts": 119})
        driver.barrier()
        send(driver, {"ts": 103})
        driver.crash()
        assert driver.event_times("in") == {0: 114}
        send(driver, {"ts": 125})
        driver.barrier()
        assert windows(driver) == [(100, 110, 1), (110, 120, 1)]
        assert driver.late == 1


def test_streams_are_joined_by_the_times_in_their_values() -> None:
    job = Job("j")
    left = job.stream(job.topic("left", timestamp="ts"))
    right = job.stream(job.topic("right"))
    left.join(right, lambda one, other: [one["ts"], other], within=3 * MS, name="both").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("left", {"ts": 10}, key="k", timestamp=KAFKA_MS)
        driver.send("right", 14, key="k", timestamp=14)
        driver.send("right", 12, key="k", timestamp=12)
        driver.send("left", {"ts": 17}, key="k", timestamp=KAFKA_MS)
        assert [(one.timestamp, one.value) for one in driver.records("out")] == [
            (12, [10, 12]),
            (17, [17, 14]),
        ]


def test_merged_inputs_are_ordered_by_the_times_in_their_values() -> None:
    job = Job("j")
    first = job.topic("first", timestamp="ts", on_error="skip")
    second = job.topic("second")
    job.merge(first, second).to(job.topic("out"))
    merge = InputMerge(2, 0, orders=orders_of(job.build(Settings()).stages[0]))
    merge.add(0, [FakeMessage(b'{"ts": 20}', timestamp=1), FakeMessage(b'{"ts": 40}', timestamp=2)])
    merge.add(0, [FakeMessage(b"{", timestamp=3), FakeMessage(b"{}"), FakeMessage(b'{"ts":50}')])
    merge.add(1, [FakeMessage(b"1", timestamp=10), FakeMessage(b"2", timestamp=30)])
    merge.add(1, [FakeMessage(b"3", timestamp=60)])
    assert [record.value() for record in merge.take(0, 6)] == [
        b"1",
        b'{"ts": 20}',
        b"2",
        b'{"ts": 40}',
        b"{",  # it can't have to wait: nobody knows how long
        b"{}",
    ]
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        driver.send("first", {"ts": 20}, timestamp=1)
        driver.send("second", 10, timestamp=10)
        driver.crash()  # now both of them wait
        driver.barrier()
        assert driver.read_values("out") == [10, {"ts": 20}]


def test_state_expires_by_the_time_in_the_value() -> None:
    job = Job("j")
    seen_before: ValueState[int] = ValueState("seen", ttl=10 * MS)

    def once(ctx: Any, _value: Any) -> Any:
        known = ctx.value(seen_before).get()
        ctx.value(seen_before).set(1)
        return known

    job.stream(job.topic("in", timestamp="ts")).process(once, states=[seen_before], to=job.topic("out"))
    with Driver(job, partitions=1) as driver:
        send(driver, {"ts": 0}, {"ts": 5}, {"ts": 100})
        assert driver.read_values("out") == [1]


# --- which times there are ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "wanted"),
    [
        (1, 1),
        (253_402_300_799_999, 253_402_300_799_999),
        (datetime(1970, 1, 1, 0, 0, 1, 234_999, UTC), 1_234),
        (datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=1))), 3_600_000),
    ],
)
def test_time_is_a_number_of_milliseconds_or_a_datetime(returned: Any, wanted: int) -> None:
    job = Job("j")
    job.stream(job.topic("in", timestamp=lambda _value: returned)).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        send(driver, 1)
        assert [one.timestamp for one in driver.records("out")] == [wanted]


def test_field_may_be_that_of_a_model() -> None:
    class Ticket(msgspec.Struct):
        at: int

    for model, value, wanted in [
        (Paid, Paid(5, datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)), 1_000),
        (Ticket, Ticket(7), 7),
    ]:
        job = Job("j")
        source = job.topic("in", value=model, timestamp="at")
        job.stream(source).to(job.topic("out", value=model))
        with Driver(job, partitions=1) as driver:
            driver.send(source, value, timestamp=KAFKA_MS)
            assert [one.timestamp for one in driver.records("out")] == [wanted]


BAD: list[tuple[Any, str]] = [
    ({}, "it has no field 'ts', from which its timestamp comes"),
    ({"ts": None}, "its timestamp comes from the field 'ts', which is None: there is none"),
    ({"ts": -1}, "which is -1: that is negative; it takes milliseconds since 1970"),
    ({"ts": 1.5}, "which is 1.5: a float, and neither a whole number of milliseconds"),
    ({"ts": True}, "which is True: a bool, and neither"),
    ({"ts": "2026-01-01"}, "which is '2026-01-01': a str, and neither"),
    (
        {"ts": 1_767_225_600_000_000},
        "which is 1767225600000000: that is after the year 9999",
    ),
    (None, "its timestamp comes from the field 'ts', but the value is null (a tombstone)"),
    ([1], "its timestamp comes from the field 'ts', but the value is a list, not an object"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_record_without_a_usable_time_follows_the_rule_of_the_topic(value: Any, message: str) -> None:
    with Driver(counting(on_error="dead"), partitions=1) as driver:
        send(driver, {"ts": 105}, value, {"ts": 109}, {"ts": 115})
        assert windows(driver) == [(100, 110, 2)]
        assert driver.event_times("in") == {0: 115}
        (dead,) = driver.records("dead")
        assert message in str(dict(dead.headers)["fcluster.error"])
        assert dead.timestamp == KAFKA_MS  # a dead letter is what was read
    with Driver(counting(on_error="skip"), partitions=1) as driver:
        send(driver, {"ts": 105}, value, {"ts": 115})
        assert windows(driver) == [(100, 110, 1)]
        assert driver.skipped == 1


@pytest.mark.parametrize(("value", "message"), BAD)
def test_record_without_a_usable_time_stops_the_job(value: Any, message: str) -> None:
    with Driver(counting(), partitions=1) as driver, pytest.raises(JobStopped) as caught:
        send(driver, {"ts": 105}, value)
    text = str(caught.value)
    assert "record in/0 at offset 1 has no usable timestamp: " in text
    assert message in text
    assert "job.topic('in', timestamp=..., on_error=...)" in text


FAILING: list[tuple[Any, str]] = [
    (lambda value: value["at"], r"which failed: KeyError: 'at' \(.*test_stamps.py"),
    (
        lambda _value: datetime(2026, 1, 1),  # noqa: DTZ001  the mistake that is meant
        r"datetime\(2026, 1, 1, 0, 0\): that has no time zone",
    ),
    (lambda _value: datetime(1969, 1, 1, tzinfo=UTC), "that is before 1970"),
]


@pytest.mark.parametrize(("function", "message"), FAILING)
def test_function_that_fails_or_returns_no_usable_time(function: Any, message: str) -> None:
    with Driver(counting(function), partitions=1) as driver, pytest.raises(JobStopped, match=message):
        send(driver, {"ts": 105})


def test_value_that_cannot_be_decoded_fails_as_ever() -> None:
    with (
        Driver(counting(), partitions=1) as driver,
        pytest.raises(JobStopped, match="can't be decoded: JSONDecodeError"),
    ):
        driver.send_raw("in", b"{", timestamp=105)


# --- condemned records ----------------------------------------------------------------------------------


def test_condemned_record_has_its_time_too() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    source = job.topic("in", timestamp="ts", watermark=Watermark())
    job.stream(source).process(lambda _ctx, value: value, name="h", to=job.topic("out"), on_error=dead)
    job.stream(source).to(job.topic("plain"))
    bench = TimersBench(job)
    bench.runner.condemn(0, Condemnation(Failure.of_record("no good"), step="h"))
    bench.run({"ts": 77}, KAFKA_MS)
    assert bench.clock is not None
    assert bench.clock.now_ms == 77
    assert sorted((topic, at) for topic, _value, _key, at, _headers in bench.open) == [
        ("dead", 77),
        ("plain", 77),
    ]


# --- declarations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestamp": ""}, "timestamp='' of the topic 't' is empty"),
        ({"timestamp": 5}, "timestamp=5 of the topic 't' is neither a field nor a function"),
        ({"timestamp": "ts", "value": "text"}, "names a field, but the values of the topic are text"),
        ({"timestamp": "when", "value": Paid}, "names the field 'when', but Paid has none"),
        ({"timestamp": lambda: 5}, "timestamp"),
    ],
)
def test_declaration_that_cannot_work_is_refused(options: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Job("j").topic("t", **options)


def test_two_times_of_one_topic_are_refused() -> None:
    job = Job("j")
    job.topic("t", timestamp="ts")
    job.topic("t")
    with pytest.raises(JobError, match="two timestamps: from the field 'ts' and from the field 'at'"):
        job.topic("t", timestamp="at")


def test_table_with_times_in_its_values_is_refused() -> None:
    job = Job("j")
    rows = job.table(job.topic("rows", timestamp="ts"))
    job.stream(job.topic("in")).join(rows).to(job.topic("out"))
    with pytest.raises(JobError, match="'rows' is declared with timestamp=, and is read as a table"):
        job.build(Settings())


def test_change_of_the_timestamps_is_refused_where_something_waits_for_event_time() -> None:
    def described(job: Job) -> Any:
        return job.build(Settings()).describe()

    def plain(timestamp: Any) -> Job:
        job = Job("j")
        job.stream(job.topic("in", timestamp=timestamp)).to(job.topic("out"))
        return job

    from_field, from_kafka = counting("ts"), counting(None)
    assert incompatibility(described(from_field), counting("ts").build(Settings())) is None
    assert incompatibility(described(from_field), from_kafka.build(Settings())) == (
        "The timestamps of the topic 'in' used to come from the field 'ts', and now come from Kafka: event "
        "time, and what waits for it, are of the former ones."
    )
    reason = incompatibility(described(from_kafka), counting(time_of).build(Settings()))
    assert reason is not None
    assert "used to come from Kafka, and now come from a function" in reason
    other = counting(str.title)
    assert incompatibility(described(counting(time_of)), other.build(Settings())) is None
    assert incompatibility(described(plain(None)), plain("ts").build(Settings())) is None
    assert incompatibility(described(plain(None)), from_field.build(Settings())) is None
