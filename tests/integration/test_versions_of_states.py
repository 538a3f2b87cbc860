"""A job gets another version with other states, on a real broker, while a worker is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checker.check import wait_until_committed
from tests.feeding import all_the_time
from tests.harness import REPOSITORY, Cluster, wait_until
from tests.in_driver import by_key, rows_on_kafka
from tests.job_run import JobRun

pytestmark = pytest.mark.timeout(240)

JOB = REPOSITORY / "tests" / "jobs" / "versioned.py"
PARTITIONS = 2
KEYS = 200


class Run(JobRun):
    """Two versions of the job, one after the other."""

    def send(self, count: int = 100) -> None:
        for number in range(self.sent, self.sent + count):
            self._producer.produce(self.source, b"%d" % number, f"k{number % KEYS}")
            self._producer.poll(0)
        assert self._producer.flush(30) == 0
        self.sent += count

    def version(self, number: int, directory: Path) -> Cluster:
        settings = {"initial.rebalance.delay.ms": 0, "commit.interval.ms": 50}
        environment = {**self.environment, "FCLUSTER_TEST_VERSION": str(number)}
        return Cluster(JOB, self.brokers, directory, workers=2, env=environment, settings=settings)

    def written(self) -> int:
        return sum(map(len, rows_on_kafka(self.brokers, self.output).values()))


def test_entries_are_migrated_once_over_restarts_moves_and_a_killed_worker(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    run = Run(kafka, topic_prefix, tmp_path / "unused", JOB, PARTITIONS)
    with run.version(1, tmp_path / "first") as former:
        former.start()
        run.send(2 * KEYS)
        wait_until_committed(kafka, run.job, [run.source], 60)
        former.terminate()
    # Other directories: all state comes from the changelogs.
    with run.version(2, tmp_path / "second") as present:
        present.start()
        with all_the_time(run.send):
            wait_until(lambda: run.written() >= 3 * KEYS, "some entries are migrated", 60, 0.1)
            killed, _in_flight = present.kill_mid_epoch(range(2), [run.output])
            present.start_worker(int(killed.rpartition("-")[2]))
            more = run.sent + 2 * KEYS
            wait_until(lambda: run.written() >= more, "the other worker goes on", 60, 0.1)
        wait_until_committed(kafka, run.job, [run.source], 60)
        present.terminate()

    outputs = by_key(rows_on_kafka(kafka, run.output))
    assert len(outputs) == KEYS
    assert sum(map(len, outputs.values())) == run.sent, "each record once"
    for key, values in outputs.items():
        last = json.loads(values[-1] or b"")
        n = len(values)
        assert last["document"] == {"n": n, "migrations": 1}, key
        assert last["value"] == {"n": n, "migrations": 1}, key
        assert sum(entry["n"] for entry in last["map"].values()) == n, key
        former_parts = {str(number % 3) for number in range(int(key[1:]), 2 * KEYS, KEYS)}
        assert {part for part, entry in last["map"].items() if entry["migrations"]} == former_parts, key
        assert max(entry["migrations"] for entry in last["map"].values()) == 1, key
