"""A job whose keys, values and state are models, with a real broker. A worker is killed."""

from __future__ import annotations

import runpy
from collections import defaultdict
from pathlib import Path

import orjson
import pytest

from fcluster.common.ids import repartition_topic
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, committed_offsets, read_topic
from tests.feeding import all_the_time
from tests.harness import REPOSITORY, wait_until
from tests.in_driver import by_key, rows_in_driver, rows_on_kafka, run_in_driver
from tests.job_run import JobRun

pytestmark = pytest.mark.timeout(180)

JOB = REPOSITORY / "tests" / "jobs" / "typed.py"
PARTITIONS = 2
RECORDS = 1_500


class Run(JobRun):
    """A cluster with the job. One record in 50 has text as its amount."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        super().__init__(brokers, prefix, directory, JOB, PARTITIONS)
        self.dead = f"{self.output}-dead"
        create_topic(brokers, self.dead, 1)

    def send(self, count: int = 50) -> None:
        for number in range(self.sent, self.sent + count):
            amount = str(number) if number % 50 == 7 else number
            status = "settled" if number % 3 else "new"
            currency = "EUR" if number % 2 else "USD"
            payment = {"account": f"a{number % 20}", "currency": currency, "amount": amount, "status": status}
            self._producer.produce(self.source, orjson.dumps(payment), f"k{number % 7}")
            self._producer.poll(0)
        assert self._producer.flush(30) == 0
        self.sent += count

    def committed(self) -> int:
        """How many records of the source are done."""
        self.cluster.assert_alive()
        offsets = committed_offsets(self.brokers, self.job)
        return sum(offset for (topic, _), offset in offsets.items() if topic == self.source)


def test_models_survive_a_killed_worker(
    kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster:
        run.cluster.start()
        with all_the_time(run.send):
            wait_until(lambda: run.committed() >= RECORDS, f"{RECORDS} records are done", 60, 0.1)
            killed, _in_flight = run.cluster.kill_mid_epoch(range(2), [run.output])
            run.cluster.start_worker(int(killed.rpartition("-")[2]))
            more = run.committed() + RECORDS // 4
            wait_until(lambda: run.committed() >= more, "the other worker goes on", 60, 0.1)
        wait_until_committed(kafka, run.job, [run.source, repartition_topic(run.job, "add")], 60)

        inputs = read_topic(kafka, run.source, READ_COMMITTED, lambda m: orjson.loads(m.value() or b""))
        payments = [payment for records in inputs.values() for payment in records]
        wrong = [payment for payment in payments if isinstance(payment["amount"], str)]
        letters = read_topic(kafka, run.dead, READ_COMMITTED, lambda m: (m.value(), dict(m.headers() or ())))
        dead = [letter for records in letters.values() for letter in records]
        assert sorted(value or b"" for value, _ in dead) == sorted(map(orjson.dumps, wrong))
        assert len(wrong) > 20
        for value, headers in dead:
            amount = orjson.loads(value or b"")["amount"]
            message = f"amount: expected int, got str ('{amount}'), at $.amount (declared as Payment)"
            assert headers["fcluster.error"] == message.encode()

        expected: dict[bytes, list[int]] = defaultdict(lambda: [0, 0])
        for payment in payments:
            if payment["status"] == "settled" and payment not in wrong:
                total = expected[orjson.dumps({name: payment[name] for name in ("account", "currency")})]
                total[0] += payment["amount"]
                total[1] += 1
        outputs = by_key(rows_on_kafka(kafka, run.output))
        lasts = {key: orjson.loads(values[-1] or b"") for key, values in outputs.items()}
        assert lasts == {key: {"amount": a, "payments": n} for key, (a, n) in expected.items()}
        assert sum(map(len, outputs.values())) == sum(n for _, n in expected.values())

        for name, value in run.environment.items():
            monkeypatch.setenv(name, value)
        driver = run_in_driver(runpy.run_path(str(JOB))["job"], kafka, [run.source])
        in_driver = by_key(rows_in_driver(driver, run.output))
        assert {key: values[-1] for key, values in in_driver.items()} == {
            key: values[-1] for key, values in outputs.items()
        }
