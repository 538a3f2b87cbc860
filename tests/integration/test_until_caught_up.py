"""`fcluster up --until-caught-up` ends when everything is committed, and not before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer

from fcluster.common.ids import repartition_topic
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic
from tests.checker.reading import committed_offsets
from tests.harness import Ended, Up
from tests.in_driver import rows_on_kafka

pytestmark = pytest.mark.timeout(180)

SLOW_JOB = """
import time
from fcluster import Job

job = Job("{prefix}job")

@job.process(job.topic("{prefix}in"), to=job.topic("{prefix}out"))
def slow(ctx, record):
    time.sleep(0.001)
    return record
"""
REGROUPING_JOB = """
from fcluster import Job

job = Job("{prefix}job")

def count(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return ctx.state["n"]

job.stream(job.topic("{prefix}in")).key_by("group").process(count, to=job.topic("{prefix}out"))
"""
TIMED_JOB = """
from fcluster import Job

job = Job("{prefix}job")

@job.process(job.topic("{prefix}in"), to=job.topic("{prefix}out"))
def remember(ctx, record):
    ctx.timer("soon", at=ctx.processing_time + 1, clock="processing")
    ctx.timer("much_later", at=ctx.processing_time + 10**9, clock="processing")
    ctx.timer("next_year", at=ctx.timestamp + 10**11)

@remember.on_timer("soon")
def soon(key, ctx):
    return key

@remember.on_timer("much_later")
@remember.on_timer("next_year")
def never(key, ctx):
    raise AssertionError("it isn't due")
"""


class Work:
    """A source with two partitions, and a job that reads it."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job = f"{prefix}job"
        self.source = f"{prefix}in"
        self._prefix = prefix
        self._directory = directory
        create_topic(brokers, self.source, 2)

    def produce(self, partition: int, count: int) -> None:
        producer = Producer({"bootstrap.servers": self.brokers})
        for number in range(count):
            value = orjson.dumps({"number": number, "group": f"g{number % 50}"})
            producer.produce(self.source, value, f"k{number}", partition=partition)
        assert producer.flush(30) == 0

    def up(self, job_text: str, env: Mapping[str, str] | None = None) -> Ended:
        """Run `fcluster up --until-caught-up` to its end."""
        path = self._directory / "job.py"
        path.write_text(job_text.format(prefix=self._prefix))
        with Up(path, self.brokers, self._directory / "data", "--until-caught-up", env=env) as up:
            return up.wait(60)

    def committed(self) -> list[int]:
        """The committed offsets of the source's partitions."""
        offsets = committed_offsets(self.brokers, self.job)
        return [offsets.get((self.source, partition), 0) for partition in range(2)]


@pytest.fixture
def work(kafka: str, topic_prefix: str, tmp_path: Path) -> Work:
    return Work(kafka, topic_prefix, tmp_path)


def test_records_that_wait_in_the_worker_do_not_count_as_processed(work: Work) -> None:
    """The reader has read everything, and is idle for seconds before the handler gets to the second
    partition."""
    work.produce(0, 500)
    work.produce(1, 3000)
    ended = work.up(SLOW_JOB)
    assert ended.code == 0, ended.text
    assert work.committed() == [500, 3000]


def test_job_with_nothing_left_to_do_ends_at_once_despite_markers_at_the_end(work: Work) -> None:
    work.produce(0, 200)
    ended = work.up(REGROUPING_JOB)
    assert ended.code == 0, ended.text
    assert work.committed() == [200, 0]
    wait_until_committed(work.brokers, work.job, [repartition_topic(work.job, "count")], 0)
    ended = work.up(REGROUPING_JOB)
    assert ended.code == 0, ended.text
    assert work.committed() == [200, 0]


def test_isolation_level_from_the_environment_applies_to_end_offsets_too(work: Work) -> None:
    """The coordinator, which knows the end offsets, uses the same settings as the workers."""
    producer = Producer({"bootstrap.servers": work.brokers, "transactional.id": f"{work.source}-open"})
    producer.init_transactions(30)
    producer.begin_transaction()
    for number in range(7):
        value = orjson.dumps({"number": number, "group": "g"})
        producer.produce(work.source, value, f"k{number}", partition=0)
    producer.flush(30)
    ended = work.up(REGROUPING_JOB, {"FCLUSTER_ISOLATION_LEVEL": "read-uncommitted"})
    producer.abort_transaction(30)
    assert ended.code == 0, ended.text
    assert work.committed() == [7, 0]


def test_end_waits_for_timers_that_are_due_and_not_for_later_ones(work: Work) -> None:
    work.produce(0, 50)
    ended = work.up(TIMED_JOB)
    assert ended.code == 0, ended.text
    assert work.committed() == [50, 0]
    # What wasn't due then is due in this run, which has nothing to read.
    ended = work.up(TIMED_JOB)
    assert ended.code == 0, ended.text
    output = work.source.removesuffix("in") + "out"
    rows = [value for part in rows_on_kafka(work.brokers, output).values() for _key, value, *_ in part]
    assert sorted(rows) == sorted(orjson.dumps(f"k{number}") for number in range(50))
