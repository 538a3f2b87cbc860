"""A job that is idle until the brokers have forgotten its transactional ids."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer

from fcluster.common.ids import coordinator_id, transactional_ids
from fcluster.kafka.embedded import EmbeddedKafka
from tests.chaos.transactions_log import transactional_ids_of
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, end_offsets, read_topic
from tests.harness import REPOSITORY, Up, wait_until_equal

REMEMBERED_MS = 4_000
JOB = """
from fcluster import Job
job = Job("sleeper")
visits, counts = job.topic("visits"), job.topic("counts")

@job.process(visits, to=counts)
def count(ctx, visit):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return ctx.state["n"]
"""


@pytest.fixture
def forgetful_kafka(tmp_path: Path) -> Iterator[str]:
    """A broker that forgets transactional ids within seconds instead of a week."""
    forgetting = {
        "transactional.id.expiration.ms": str(REMEMBERED_MS),
        "producer.id.expiration.ms": str(REMEMBERED_MS),
        "transaction.remove.expired.transaction.cleanup.interval.ms": "500",
        "producer.id.expiration.check.interval.ms": "500",
    }
    kafka = EmbeddedKafka(tmp_path / "kafka", adapt=lambda settings: settings | forgetting)
    yield kafka.start()
    kafka.stop()


def produce(brokers: str, count: int) -> None:
    producer = Producer({"bootstrap.servers": brokers})
    for number in range(count):
        producer.produce("visits", orjson.dumps({"number": number}), "k")
    assert producer.flush(30) == 0


def visible(brokers: str) -> int:
    return len(values(brokers))


def values(brokers: str) -> list[int]:
    (found,) = read_topic(
        brokers, "counts", READ_COMMITTED, lambda message: int(message.value() or 0)
    ).values()
    return found


def status(data_dir: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "fcluster", "status", "--json", "--data-dir", str(data_dir)]
    ended = subprocess.run(command, capture_output=True, timeout=30, cwd=REPOSITORY, check=True)
    return json.loads(ended.stdout)


def test_idle_job_keeps_its_leader_and_commits_its_next_record_at_once(
    forgetful_kafka: str, tmp_path: Path
) -> None:
    for topic in ("visits", "counts"):
        create_topic(forgetful_kafka, topic, 1)
    path = tmp_path / "job.py"
    path.write_text(JOB)
    produce(forgetful_kafka, 5)
    with Up(path, forgetful_kafka, tmp_path / "data") as up:
        up.wait_until(
            lambda: end_offsets(forgetful_kafka, ["counts"], READ_COMMITTED)[("counts", 0)], "output"
        )
        up.wait_until(lambda: visible(forgetful_kafka) == 5, "all records are counted")
        workers = set(transactional_ids("sleeper", 0))
        up.wait_until(
            lambda: not workers & transactional_ids_of(forgetful_kafka, "sleeper").keys(),
            "the worker's ids are forgotten",
        )
        assert coordinator_id("sleeper") in transactional_ids_of(forgetful_kafka, "sleeper"), "kept alive"
        produce(forgetful_kafka, 5)
        wait_until_equal(lambda: visible(forgetful_kafka), 10, "the rest", 15)
        assert values(forgetful_kafka) == list(range(1, 11))
        assert status(tmp_path / "data")["term"] == 1, "it had one leader all the time"
        up.interrupt()
        ended = up.wait(60)
    assert ended.code in (0, 130), ended.text
    for trouble in ("not leading", "term 1 is over", "ERROR", "Traceback"):
        assert trouble not in ended.text, ended.text
