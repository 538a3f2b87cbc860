"""Timers in the driver: both clocks, several stages, crashes, and failures."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster import Job, Record, Watermark
from fcluster.testing import Driver
from fcluster.testing.driver import START_MS, JobStopped


def sessions(**options: Any) -> Job:
    """Counts each key's records until none comes for 30 s of event time. `abandon` is in processing time."""
    job = Job("sessions")
    clicks, done = job.topic("clicks", watermark=Watermark(max_delay_ms=1_000)), job.topic("done")
    job.topic("dead", value="bytes")

    @job.process(clicks, to=done, **options)
    def session(ctx: Any, _click: Any) -> None:
        ctx.state["clicks"] = ctx.state.get("clicks", 0) + 1
        ctx.timer("close", at=ctx.timestamp + 30_000)
        ctx.timer("abandon", at=ctx.processing_time + 60_000, clock="processing")

    @session.on_timer("close")
    def close(key: str, ctx: Any) -> Any:
        ctx.cancel_timer("abandon")
        clicks = ctx.state["clicks"]
        ctx.state.clear()
        return {"user": key, "clicks": clicks}

    @session.on_timer("abandon")
    def abandon(key: str, ctx: Any) -> Any:
        ctx.cancel_timer("close")
        ctx.state.clear()
        return {"user": key, "abandoned": True}

    return job


@pytest.mark.parametrize("crash", [False, True])
def test_event_time_closes_sessions_that_processing_time_would_have_abandoned(crash: bool) -> None:
    with Driver(sessions(), partitions=2) as driver:
        driver.send("clicks", 1, key="ann", timestamp=START_MS)
        driver.send("clicks", 1, key="ann", timestamp=START_MS + 20_000)
        driver.send("clicks", 1, key="bob", timestamp=START_MS + 21_000)
        assert driver.timers("session", "ann") == {"abandon": START_MS + 60_000, "close": START_MS + 50_000}
        if crash:
            driver.crash()
        driver.advance(to_ms=START_MS + 49_999, clock="event")
        assert driver.read_values("done") == []
        driver.advance(by_ms=1, clock="event")
        if crash:
            driver.crash()
        assert driver.read_values("done") == [{"user": "ann", "clicks": 2}]
        assert driver.timers("session", "ann") == {}
        driver.advance(by_ms=60_000)
        if crash:
            driver.crash()
        assert driver.read_values("done") == [{"user": "bob", "abandoned": True}]
        assert driver.timers("session", "bob") == {}
        assert driver.states("session") == {}
        driver.advance(by_ms=1_000_000)
        driver.advance(by_ms=1_000_000, clock="event")
        assert driver.read_values("done") == []


def test_records_move_event_time_minus_the_delay() -> None:
    with Driver(sessions(), partitions=1) as driver:
        driver.send("clicks", 1, key="ann", timestamp=START_MS)
        driver.send("clicks", 1, key="bob", timestamp=START_MS + 30_999)
        assert driver.read_values("done") == []
        driver.send("clicks", 1, key="bob", timestamp=START_MS + 31_000)
        (record,) = driver.read("done")
        assert (record.key, record.value, record.timestamp) == (
            "ann",
            {"user": "ann", "clicks": 1},
            START_MS + 30_000,
        )


def test_timers_after_a_repartition_fire_by_watermarks_of_all_upstream_partitions() -> None:
    job = Job("late")
    source, out = job.topic("in"), job.topic("out")

    def alarm(ctx: Any, _value: Any) -> None:
        ctx.timer("alarm", at=ctx.timestamp + 10)

    job.stream(source).key_by("user").process(
        alarm, timers={"alarm": lambda key, ctx: [key, ctx.timestamp]}, to=out
    )
    with Driver(job, partitions=2) as driver:
        driver.send("in", {"user": "ann"}, partition=0, timestamp=START_MS)
        driver.send("in", {"user": "bob"}, partition=0, timestamp=START_MS + 100)
        assert driver.read_values("out") == []  # partition 1 may still have an earlier record
        driver.send("in", {"user": "cid"}, partition=1, timestamp=START_MS + 50)
        assert driver.read_values("out") == [["ann", START_MS + 10]]
        driver.crash()
        driver.advance(by_ms=1_000, clock="event")
        assert sorted(driver.read_values("out")) == [["bob", START_MS + 110], ["cid", START_MS + 60]]


def test_stop_commits_what_is_before_the_timer_and_keeps_it_for_the_next_run() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    broken = True

    @job.process(source, to=out)
    def remember(ctx: Any, value: Any) -> Any:
        ctx.timer("t", at=START_MS + 5)
        return value

    @remember.on_timer("t")
    def remind(key: str, _ctx: Any) -> Any:
        if broken:
            raise ValueError("no good")
        return f"remind {key}"

    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="a", timestamp=START_MS)
        with pytest.raises(
            JobStopped, match=r"timer 't' of the handler 'remember' for the key b'a' at "
        ) as raised:
            driver.send("in", 2, key="b", timestamp=START_MS + 5)
        assert isinstance(raised.value.__cause__, ValueError)
        assert driver.read_values("out") == [1, 2]
        with pytest.raises(JobStopped):
            driver.crash()
        broken = False
        driver.crash()
        assert driver.read_values("out") == ["remind a", "remind b"]
        assert driver.timers("remember", "b") == {}


def test_dead_letter_of_a_timer() -> None:
    job = Job("j")
    source, dead = job.topic("in"), job.topic("dead", value="bytes")

    @job.process(source, on_error=dead)
    def h(ctx: Any, _value: Any) -> None:
        ctx.timer("t", at=ctx.timestamp)

    @h.on_timer("t")
    def fail(_key: str, _ctx: Any) -> Any:
        raise ValueError("no good")

    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="a")
        (letter,) = driver.dead_letters()
        assert (letter.error, letter.handler, letter.record.key) == ("ValueError: no good", "h", "a")
        assert driver.skipped == 1


def test_outputs_of_an_open_epoch_with_timers_are_lost_and_written_again() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")

    @job.process(source)
    def h(ctx: Any, value: Any) -> None:
        ctx.timer("t", at=value, clock="processing")

    @h.on_timer("t")
    def fire(key: str, _ctx: Any) -> Any:
        return Record(topic=out, value=key)

    with Driver(job, partitions=1, auto_barrier=False) as driver:
        driver.send("in", START_MS + 10, key="a")
        driver.barrier()
        driver.advance(by_ms=10)
        assert len(driver.records("out", isolation="read-uncommitted")) == 1
        driver.crash()
        driver.settle()
        assert driver.read_values("out") == ["a"]


def test_advance_takes_one_time() -> None:
    with Driver(sessions()) as driver:
        for arguments in ({}, {"by_ms": 1, "to_ms": 2}, {"by_ms": 1, "clock": "wall"}):
            with pytest.raises(ValueError, match="advance takes by_ms or to_ms"):
                driver.advance(**arguments)  # type: ignore[arg-type]


def test_timer_that_always_sets_itself_again_lets_records_through() -> None:
    job = Job("polling")
    source, out = job.topic("in"), job.topic("out")

    @job.process(source, to=out)
    def start(ctx: Any, value: Any) -> Any:
        ctx.timer("poll", at=ctx.timestamp)
        return value

    @start.on_timer("poll")
    def poll(_key: str, ctx: Any) -> Any:
        ctx.timer("poll", at=0)
        return "polled"

    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="ann", timestamp=START_MS)
        driver.crash()
        driver.send("in", 2, key="bob", timestamp=START_MS + 5)
        driver.advance(by_ms=1, clock="event")
        values = driver.read_values("out")
        assert values == [1, "polled", 2, "polled", "polled", "polled", "polled"]
        assert driver.timers("start", "ann") == {"poll": START_MS + 7}


def later(timed: Record, first: Record | None = None) -> tuple[Job, Any]:
    """A handler whose timer returns `timed`, and steps behind it, up to the last one."""
    job = Job("later")
    dead = job.topic("dead", value="bytes")

    def start(ctx: Any, _value: Any) -> Any:
        ctx.timer("due", at=ctx.timestamp + 10)
        return first

    def due(_key: str, _ctx: Any) -> Any:
        return timed

    stream = job.stream(job.topic("in")).process(start, timers={"due": due}, on_error=dead)
    return job, stream.filter(lambda value: value != {"n": 3}).map(lambda value: value)


def fired(driver: Driver) -> list[Any]:
    """What is written when a record has come and the timer has fired."""
    driver.send("in", {"sent": True}, key="a", timestamp=START_MS)
    driver.advance(by_ms=10, clock="event")
    return driver.read("out")


def test_record_of_a_handler_or_timer_goes_on_to_the_steps_behind() -> None:
    fields: Any = {"timestamp": START_MS + 99, "headers": [("h", b"1")]}
    job, stream = later(Record(value={"n": 2}, **fields), Record(**fields))
    stream.to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        written = fired(driver)
        assert [record.value for record in written] == [{"sent": True}, {"n": 2}]
        assert [record.timestamp for record in written] == [START_MS + 99] * 2
        assert [list(record.headers) for record in written] == [[("h", b"1")]] * 2


def test_step_behind_a_timer_sees_the_value_of_its_record() -> None:
    job, stream = later(Record(value={"n": 3}))
    stream.to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        assert fired(driver) == []


def test_record_of_a_timer_goes_through_a_key_by() -> None:
    job, stream = later(Record(value={"n": 2}, timestamp=START_MS + 99))
    stream.key_by(lambda value: str(value["n"])).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        (written,) = fired(driver)
        assert (written.raw_key, written.value, written.timestamp) == (b"2", {"n": 2}, START_MS + 99)


def test_tombstone_of_a_timer_stays_one_behind_steps_but_other_nulls_do_not_become_one() -> None:
    for value, raw in ((None, None), ({"n": 2}, b"null")):
        job, stream = later(Record(value=value))
        stream.map(lambda value: None).to(job.topic("out"))
        with Driver(job, partitions=1) as driver:
            (written,) = fired(driver)
            assert written.raw_value == raw


def test_record_with_a_key_fails_where_steps_follow_and_says_what_to_do() -> None:
    job, stream = later(Record(value={"n": 2}, key="other"))
    stream.to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        assert fired(driver) == []
        (letter,) = driver.dead_letters()
        assert "put key_by() behind the handler, or give the Record a topic" in letter.error
