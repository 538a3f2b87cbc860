"""`through`: write to a topic, and go on with its stream."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster import Job
from fcluster.cli.preflight import problems_of_sources
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.kafka.topics import plan_topics
from fcluster.testing import Driver, JobStopped


def count(ctx: Any, value: Any) -> Any:
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {"value": value, "n": ctx.state["n"]}


def counting() -> Job:
    """A job whose counted records are used in two places."""
    job = Job("j")
    counted = job.stream(job.topic("in")).process(count).through(job.topic("counted"))
    counted.filter(lambda one: one["n"] % 2 == 0).to(job.topic("even"))
    counted.map(lambda one: one["n"]).to(job.topic("numbers"))
    return job


def test_topic_has_the_records_and_the_stream_goes_on_with_them_in_several_places() -> None:
    with Driver(counting()) as driver:
        for value in "abc":
            driver.send("in", value, key="k")
        driver.send("counted", {"value": "stranger's", "n": 10}, key="k")
        assert len(driver.records("counted")) == 4
        assert [one["value"] for one in driver.read_values("even")] == ["b", "stranger's"]
        assert driver.read_values("numbers") == [1, 2, 3, 10]


def test_records_are_counted_once_whatever_crashes() -> None:
    with Driver(counting(), auto_barrier=False) as driver:
        driver.send("in", "a", key="k")
        driver.barrier()
        driver.crash()
        driver.send("in", "b", key="k")
        driver.crash()
        driver.settle()
        assert driver.read_values("numbers") == [1, 2]


def test_steps_after_it_are_a_stage_of_their_own() -> None:
    topology = counting().build(Settings())
    assert [(stage.name, stage.topics) for stage in topology.stages] == [
        ("in", ("in",)),
        ("counted", ("counted",)),
    ]
    assert topology.feeders("counted") == topology.stages[:1]
    assert topology.feeders("in") == ()


def test_topic_that_the_job_writes_need_not_exist_and_is_planned_with_as_many_partitions() -> None:
    topology = counting().build(Settings())
    assert list(problems_of_sources(Settings(), topology, {"in": 3})) == []
    assert plan_topics(topology, {"in": 3}).missing["counted"] == (3, {})
    (problem,) = problems_of_sources(Settings(), topology, {"counted": 3})
    assert "'in' doesn't exist" in problem.message


def test_value_that_cannot_be_written_there_follows_its_rule() -> None:
    def job_with(rule: Any) -> Job:
        job = Job("j")
        job.stream(job.topic("in")).through(job.topic("text", value="text"), on_error=rule).to(
            job.topic("out")
        )
        return job

    with Driver(job_with("skip")) as driver:
        driver.send("in", 5, key="k")
        driver.send("in", "text", key="k")
        assert (driver.read_values("out"), driver.skipped) == (["text"], 1)
    with Driver(job_with("stop")) as driver, pytest.raises(JobStopped, match="writing to 'text'"):
        driver.send("in", 5, key="k")


def test_loop_is_refused() -> None:
    job = Job("j")
    first, second = job.topic("first"), job.topic("second")
    job.stream(first).through(second).to(first)
    with pytest.raises(JobError, match="loop"):
        job.build(Settings())
