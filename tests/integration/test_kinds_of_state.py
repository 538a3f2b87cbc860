"""All kinds of state on a real broker: a worker is killed, and nothing is lost or repeated."""

from __future__ import annotations

import random
import runpy
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from examples.orders.recount import recount
from tests.checker.reading import READ_COMMITTED, committed_offsets, end_offsets, read_topic
from tests.feeding import all_the_time
from tests.harness import REPOSITORY, wait_until
from tests.in_driver import rows_in_driver, rows_on_kafka, run_in_driver
from tests.job_run import JobRun

pytestmark = pytest.mark.timeout(180)

JOB = REPOSITORY / "examples" / "orders" / "orders.py"
PARTITIONS = 2
CUSTOMERS = 40
ORDERS = 2_500
STEP_MS = 8_000
BEGIN_MS = 1_700_000_000_000


class Run(JobRun):
    """A cluster with the example job."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        super().__init__(brokers, prefix, directory, JOB, PARTITIONS)
        self._random = random.Random(5)

    def send(self, count: int = 60) -> None:
        """Write orders in the order of time. Some are repeats, of recent orders or of orders older than an
        hour."""
        producer = self._producer
        for number in range(self.sent, self.sent + count):
            order = number
            if self._random.random() < 0.3:
                order = max(0, number - self._random.choice((1, 40, 500, 1_000, 2_000)))
            producer.produce(
                self.source,
                orjson.dumps({"number": f"n{order}", "price": order * 7919 % 1_000}),
                f"c{order % CUSTOMERS}",
                timestamp=BEGIN_MS + number * STEP_MS - self._random.choice((0, 0, 20_000)),
            )
            producer.poll(0)
        assert producer.flush(30) == 0
        self.sent += count

    def committed(self) -> int:
        """How many records are committed."""
        self.cluster.assert_alive()
        return sum(committed_offsets(self.brokers, self.job).values())

    def all_committed(self) -> bool:
        """Whether everything is committed, judged by offsets, which also count the markers of
        transactions."""
        self.cluster.assert_alive()
        ends = end_offsets(self.brokers, [self.source], READ_COMMITTED)
        committed = committed_offsets(self.brokers, self.job)
        return all(committed.get(at, 0) >= end for at, end in ends.items())

    def wait_committed(self, count: int) -> None:
        """Wait until this many records are committed."""
        wait_until(lambda: self.committed() >= count, f"{count} records are done", 60, 0.1)


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster:
        yield run


def test_kinds_of_state_survive_a_killed_worker(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.cluster.start()
    with all_the_time(run.send):
        run.wait_committed(ORDERS)
        killed, in_flight = run.cluster.kill_mid_epoch(range(2), [run.output])
        assert in_flight > 0
        run.cluster.start_worker(int(killed.rpartition("-")[2]))
        run.wait_committed(run.committed() + ORDERS // 4)
    wait_until(run.all_committed, "all records are done", 60, 0.1)
    outputs = read_topic(run.brokers, run.output, READ_COMMITTED, lambda m: orjson.loads(m.value() or b""))
    inputs = read_topic(
        run.brokers,
        run.source,
        READ_COMMITTED,
        lambda m: ((m.key() or b"").decode(), orjson.loads(m.value() or b""), m.timestamp()[1]),
    )
    repeated_within, repeated_beyond = 0, 0
    for partition, records in inputs.items():
        expected, within, beyond = recount(records)
        assert outputs[partition] == expected
        repeated_within += within
        repeated_beyond += beyond
    assert repeated_within > 100
    assert repeated_beyond > 100
    # `fcluster.testing` gives the same bytes.
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    driver = run_in_driver(runpy.run_path(str(JOB))["job"], run.brokers, [run.source])
    assert rows_in_driver(driver, run.output) == rows_on_kafka(run.brokers, run.output)
