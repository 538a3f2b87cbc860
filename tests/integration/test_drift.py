"""Partitions that wait for each other in event time, with real processes and a real broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from fcluster.common.ids import repartition_topic
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic, plain_producer
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import Cluster, wait_until
from tests.pauses import status_of

pytestmark = pytest.mark.timeout(180)

JOB = """
import time
from fcluster import Job, Watermark, hours, minutes, seconds

job = Job("{prefix}job")
visits = job.topic("{prefix}visits", watermark=Watermark(idle=seconds(2), max_drift=minutes(10)))

def look(visit):
    if visit["slow"]:
        time.sleep(0.01)

def total(ctx, visit):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"id": visit["id"], "n": ctx.state["n"]}}

job.stream(visits).peek(look).key_by("page").process(total, to=job.topic("{prefix}out"), name="per-page")
"""
BEGIN_MS = 1_767_225_600_000
SLOW = 2_000
FAST = 30_000
"""The slow partition has a record for each second, and the fast one for each ten seconds. There are more of
them than a worker has fetched before it is told to wait.
"""


def ident(message: Any) -> int:
    return orjson.loads(message.value() or b"")["id"]


def ahead(brokers: str, job: str, topic: str) -> list[dict[str, Any]]:
    """The partitions that wait, according to status."""
    stages = {one["stage"]: one for one in status_of(brokers, job).get("event_times", [])}
    return stages[topic]["ahead"] if topic in stages else []


def fast_one(waiting: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fast partition, once it is known how far it is ahead."""
    return next((one for one in waiting if one["partition"] == 1 and one["ahead_ms"] > 0), None)


@pytest.mark.parametrize("workers", [1, 2])
def test_partition_that_is_far_ahead_waits_and_all_records_are_processed_in_the_end(
    kafka: str, topic_prefix: str, tmp_path: Path, workers: int
) -> None:
    job, source, out = (f"{topic_prefix}{name}" for name in ("job", "visits", "out"))
    path = tmp_path / "job.py"
    path.write_text(JOB.format(prefix=topic_prefix))
    for topic in (source, out):
        create_topic(kafka, topic, 2)
    producer = plain_producer(kafka)
    for partition, (count, step_ms) in enumerate(((SLOW, 1_000), (FAST, 10_000))):
        for number in range(count):
            visit = {"id": partition * SLOW + number, "page": f"p{number % 5}", "slow": partition == 0}
            visit["text"] = "" if partition else "x" * 2_000  # so that it isn't fetched as a whole
            at_ms = BEGIN_MS + number * step_ms
            producer.produce(source, orjson.dumps(visit), "k", partition, timestamp=at_ms)
            if number % 1_000 == 0:
                producer.flush(30)
    assert producer.flush(30) == 0
    settings = {"initial.rebalance.delay.ms": 0}
    with Cluster(path, kafka, tmp_path / "data", workers=workers, settings=settings) as cluster:
        cluster.start()
        waits = wait_until(lambda: fast_one(ahead(kafka, job, source)), "the fast partition to wait", 60)
        assert waits is not None
        assert (waits["topic"], waits["ahead_of"]) == (source, f"{source}/0")
        wait_until_committed(kafka, job, [source, repartition_topic(job, "per-page")], 120)
        wait_until(lambda: not ahead(kafka, job, source), "the end of all waits", 60)
        cluster.terminate()
    found = read_topic(kafka, out, READ_COMMITTED, ident)
    assert sorted(one for part in found.values() for one in part) == list(range(SLOW + FAST))
