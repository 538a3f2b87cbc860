"""Bounded runs on a real broker: a worker is killed, others go on writing, and exactly the records before the
end are counted.
"""

from __future__ import annotations

import os
import runpy
import signal
from collections import Counter
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer

from fcluster.testing import Driver
from tests.checker.generate import create_topic
from tests.checker.reading import committed_offsets
from tests.harness import Up
from tests.in_driver import Row, rows_in_driver, rows_on_kafka

pytestmark = pytest.mark.timeout(180)

JOB = """
import os
import time
from datetime import timedelta

from fcluster import Job, Tumbling, Watermark, count

job = Job("{prefix}job")
minute = Tumbling(timedelta(minutes=1))
pause_s = float(os.environ.get("PAUSE_S", "0"))


def slowly(value):
    time.sleep(pause_s)
    return value


clicks = job.stream(job.topic("{prefix}in", watermark=Watermark(max_delay_ms=10_000))).map(slowly)
per_key = clicks.window(minute, name="per-key").aggregate(n=count())
by_minute = per_key.key_by(lambda result: str(result["start"]), name="minute")
per_minute = by_minute.window(minute, name="per-minute")
per_minute.aggregate(keys=count()).through(job.topic("{prefix}between")).to(job.topic("{prefix}out"))
"""
PARTITIONS = 3
RECORDS = 1_200
KEYS = 40
START_MS = 1_767_225_600_000


class Source:
    """A topic with three partitions, of which the last one stays empty."""

    def __init__(self, brokers: str, topic: str) -> None:
        self._brokers, self._topic = brokers, topic
        self.sent: list[tuple[int, str, int]] = []
        create_topic(brokers, topic, PARTITIONS)

    def produce(self, count: int, *, aborted: bool = False) -> None:
        """Write records in a transaction."""
        producer = Producer({"bootstrap.servers": self._brokers, "transactional.id": f"{self._topic}-writer"})
        producer.init_transactions(30)
        producer.begin_transaction()
        for number in range(len(self.sent), len(self.sent) + count):
            row = number % (PARTITIONS - 1), f"k{number % KEYS}", START_MS + 200 * number
            producer.produce(self._topic, b"{}", row[1], partition=row[0], timestamp=row[2])
            if not aborted:
                self.sent.append(row)
        if aborted:
            producer.flush(30)
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)


def test_run_to_the_end_counts_what_was_there_although_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    path, data = tmp_path / "job.py", tmp_path / "data"
    path.write_text(JOB.format(prefix=topic_prefix))
    source, output = Source(kafka, f"{topic_prefix}in"), f"{topic_prefix}out"
    source.produce(RECORDS)
    in_the_run = list(source.sent)
    source.produce(100, aborted=True)

    options = ["--start", "earliest", "--end", "end", "--plain"]
    with Up(path, kafka, data, *options, workers=2, env={"PAUSE_S": "0.004"}) as up:
        job = f"{topic_prefix}job"
        up.wait_until(
            lambda: any(
                offset > 50
                for (topic, _), offset in committed_offsets(kafka, job).items()
                if topic == f"{topic_prefix}in"
            ),
            "the first records are committed",
            120,
        )
        source.produce(200)  # behind the end
        os.kill(up.pid("worker-1"), signal.SIGKILL)
        ended = up.wait(120)
    assert ended.code == 0, ended.text
    assert "the run has come to its end (the end)" in ended.text

    with Driver(runpy.run_path(str(path))["job"], partitions={f"{topic_prefix}in": PARTITIONS}) as driver:
        for partition, key, timestamp in in_the_run:
            driver.send_raw(
                f"{topic_prefix}in", b"{}", key=key.encode(), timestamp=timestamp, partition=partition
            )
        driver.finish()
        assert driver.late == 0
        expected = _values(rows_in_driver(driver, output))
    assert _values(rows_on_kafka(kafka, output)) == expected
    assert sum(expected.values()) == len({at // 60_000 for _, _, at in in_the_run})

    with Up(path, kafka, data, "--plain") as up:
        ended = up.wait(60)
    assert ended.code == 1
    assert "has come to its end" in ended.text
    assert "fcluster reset" in ended.text


def _values(rows: dict[int, list[Row]]) -> Counter[str]:
    return Counter(
        orjson.dumps(orjson.loads(row[1] or b""), option=orjson.OPT_SORT_KEYS).decode()
        for part in rows.values()
        for row in part
    )
