"""Windows on a real broker: a worker is killed, and each window's result is written exactly once."""

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

JOB = REPOSITORY / "tests" / "jobs" / "windowed.py"
PARTITIONS = 2
KEYS = 40
RESULTS = 400


class Run(TimedRun):
    """A cluster with the job."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        super().__init__(brokers, prefix, directory, JOB, PARTITIONS)

    def key(self, number: int) -> str:
        return f"k{number % KEYS}"

    def results(self) -> Counter[str]:
        """How many results each window has written."""
        self.cluster.assert_alive()
        rows = rows_on_kafka(self.brokers, self.output)
        return Counter(row["by"] for row in values_in(rows))


def values_in(rows: dict[int, list[Row]]) -> list[dict[str, Any]]:
    return [orjson.loads(row[1] or b"") for found in rows.values() for row in found]


def by_window(rows: dict[int, list[Row]]) -> dict[tuple[str, str], list[Row]]:
    """The results of each step and key, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for part in rows.values():
        for row in part:
            value = orjson.loads(row[1] or b"")
            found.setdefault((value["by"], value["key"]), []).append(row)
    return found


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster:
        yield run


def test_windows_close_exactly_once_when_a_worker_is_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.cluster.start()
    with all_the_time(run.send):
        wait_until(lambda: run.results()["key"] >= RESULTS, "windows close", 60, 0.5)
        killed, in_flight = run.cluster.kill_mid_epoch(range(2), [run.output])
        assert in_flight > 0
        run.cluster.start_worker(int(killed.rpartition("-")[2]))
        after = run.results()
        wait_until(
            lambda: run.results()["key"] >= after["key"] + RESULTS // 2, "the workers continue", 60, 0.5
        )
    run.let_time_pass()
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    driver = run_in_driver(runpy.run_path(str(JOB))["job"], run.brokers, [run.source])
    assert driver.late == 0
    expected = rows_in_driver(driver, run.output)
    count = len(values_in(expected))
    wait_until(lambda: run.results().total() >= count, f"{count} results are written", 60, 0.5)
    rows = rows_on_kafka(run.brokers, run.output)
    # For each key, the results are the same bytes as the driver's, wherever epochs ended.
    assert by_window(rows) == by_window(expected)
    counted = [value for value in values_in(rows) if value["by"] == "key"]
    assert sorted(one for value in counted for one in value["values"]) == list(range(run.sent))
