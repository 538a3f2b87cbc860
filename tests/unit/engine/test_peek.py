"""`peek`: a function sees each value, and the record goes on as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.testing import Driver, JobStopped


def job_with(function: Callable[[Any], Any], **options: Any) -> Job:
    job = Job("j")
    job.topic("dead", value="bytes")
    job.stream(job.topic("in")).peek(function, **options).to(job.topic("out"))
    return job


def test_each_value_is_seen_and_goes_on_with_the_bytes_it_was_read_with() -> None:
    seen: list[Any] = []
    raw = b'{"n":  1.50,\n "m": [1e2]}'
    with Driver(job_with(seen.append)) as driver:
        driver.send_raw("in", raw, key=b"k", timestamp=5, headers=[("h", b"1")])
        driver.send("in", None, key="k")
        first, second = driver.read("out")
    assert seen == [{"n": 1.5, "m": [100.0]}, None]
    assert (first.raw_value, first.key, first.timestamp, first.headers) == (raw, "k", 5, [("h", b"1")])
    assert second.raw_value is None


@pytest.mark.parametrize("returned", [False, None, 5, [1, 2]])
def test_what_the_function_returns_is_ignored(returned: Any) -> None:
    with Driver(job_with(lambda value: returned)) as driver:
        driver.send("in", "v", key="k")
        assert driver.read_values("out") == ["v"]


def test_value_of_the_step_before_is_seen_and_passed_to_the_next() -> None:
    seen: list[Any] = []
    job = Job("j")
    stream = job.stream(job.topic("in")).map(lambda value: value + 1).peek(seen.append)
    stream.map(lambda value: value * 2).to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("in", 1, key="k")
        assert driver.read_values("out") == [4]
    assert seen == [2]


def test_text_that_a_peek_has_seen_can_go_on_to_a_stage_as_it_is() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in", value="text")).peek(len).key_by(str.upper)
    stream.process(lambda ctx, value: value, name="h")
    assert job.build(Settings()).stages[1].inputs[0].topic.value == "text"


def test_failure_stops_the_job_there_or_follows_the_rule() -> None:
    def fail(value: Any) -> None:
        raise ValueError(value)

    with Driver(job_with(fail)) as driver, pytest.raises(JobStopped, match=r"in peek 'fail' \(step 1 of"):
        driver.send("in", 7, key="k")
    with Driver(job_with(fail, on_error="skip")) as driver:
        driver.send("in", 7, key="k")
        assert (driver.read("out"), driver.skipped) == ([], 1)


def test_replayed_record_is_seen_again_and_written_once() -> None:
    seen: list[Any] = []
    with Driver(job_with(seen.append), auto_barrier=False) as driver:
        driver.send("in", 1, key="k")
        driver.crash()
        driver.settle()
        assert driver.read_values("out") == [1]
    assert seen == [1, 1]


@pytest.mark.parametrize("function", [5, lambda: None, lambda value: (yield value)])
def test_function_that_does_not_fit_is_refused(function: Any) -> None:
    with pytest.raises(JobError, match="peek"):
        job_with(function)


def test_stream_that_ends_in_a_peek_is_refused() -> None:
    job = Job("j")
    job.stream(job.topic("in")).peek(print)
    with pytest.raises(JobError, match="ends in a peek with nothing after it"):
        job.build(Settings())
