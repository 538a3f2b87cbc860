"""Timers on a real broker: a worker is killed, and each timer fires exactly once, in both clocks."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.feeding import all_the_time
from tests.harness import REPOSITORY, wait_until
from tests.in_driver import Row, rows_in_driver, rows_on_kafka, run_in_driver
from tests.job_run import TimedRun

pytestmark = pytest.mark.timeout(180)

JOB = REPOSITORY / "tests" / "jobs" / "timed.py"
PARTITIONS = 2
RECORDS = 1_000


class Run(TimedRun):
    """A cluster with the job."""

    step_ms = 20

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        super().__init__(brokers, prefix, directory, JOB, PARTITIONS)

    def counts(self) -> Counter[str]:
        """How many outputs each callback has written."""
        self.cluster.assert_alive()
        return Counter(by for parts in self.rows().values() for by, _row in parts)

    def rows(self) -> dict[int, list[tuple[str, Row]]]:
        """The committed outputs, and what wrote them."""
        return marked(rows_on_kafka(self.brokers, self.output))


def marked(rows: dict[int, list[Row]]) -> dict[int, list[tuple[str, Row]]]:
    """The outputs of each partition, with what wrote them."""
    return {
        number: [(orjson.loads(row[1] or b"")["by"], row) for row in found] for number, found in rows.items()
    }


def shard_of(row: Row) -> int:
    """The source partition that the output comes from."""
    return int(orjson.loads(row[1] or b"")["value"]) % PARTITIONS


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster:
        yield run


def test_timers_fire_exactly_once_when_a_worker_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.cluster.start()
    with all_the_time(run.send):
        wait_until(lambda: run.counts()["event"] >= RECORDS, "timers fire", 60, 0.5)
        killed, in_flight = run.cluster.kill_mid_epoch(range(2), [run.output])
        assert in_flight > 0
        run.cluster.start_worker(int(killed.rpartition("-")[2]))
        after = run.counts()
        wait_until(
            lambda: run.counts()["event"] >= after["event"] + RECORDS // 3, "the workers continue", 60, 0.5
        )
    run.let_time_pass()
    expected = {"record": run.sent + PARTITIONS, "processing": run.sent + PARTITIONS, "event": run.sent}
    wait_until(lambda: run.counts().total() >= sum(expected.values()), f"{expected} are written", 60, 0.5)
    assert run.counts() == expected
    rows: dict[int, list[tuple[str, Any]]] = run.rows()
    fired = Counter((by, row[0]) for parts in rows.values() for by, row in parts)
    assert set(fired.values()) == {1}
    # In event time, the order and the bytes are those of the driver, wherever epochs ended.
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    driver = run_in_driver(runpy.run_path(str(JOB))["job"], run.brokers, [run.source])
    in_driver = marked(rows_in_driver(driver, run.output))
    for number, found in rows.items():
        for shard in range(PARTITIONS):
            expected_rows = [row for _by, row in in_driver[number] if shard_of(row) == shard]
            assert [
                row for by, row in found if by != "processing" and shard_of(row) == shard
            ] == expected_rows
