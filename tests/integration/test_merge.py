"""Jobs that merge topics, with real processes and a real broker."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Message

from fcluster.common.ids import repartition_topic
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic, plain_producer
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.feeding import all_the_time
from tests.harness import Cluster, Up, wait_until, wait_until_equal, worker_name
from tests.pauses import status_of

pytestmark = pytest.mark.timeout(180)

BALANCES = """
from fcluster import Job

job = Job("{prefix}job")
orders, payments = job.topic("{prefix}orders"), job.topic("{prefix}payments")

def balance(ctx, record):
    state = ctx.state
    state["count"] = state.get("count", 0) + 1
    state["sum"] = state.get("sum", 0) + record["amount"]
    return {{"id": record["id"], "topic": ctx.topic, "count": state["count"], "sum": state["sum"]}}

job.merge(orders, job.stream(payments).key_by("account")).process(balance, to=job.topic("{prefix}out"))
"""
IN_ORDER = """
from fcluster import Job

job = Job("{prefix}job")

def note(ctx, record):
    return {{"topic": ctx.topic, "timestamp": ctx.timestamp}}

merged = job.merge(job.topic("{prefix}orders"), job.topic("{prefix}payments"))
merged.process(note, to=job.topic("{prefix}out"))
"""
ACCOUNTS = 40
PARTITIONS = 4


class Work:
    """Two topics to merge. One of them may have other keys, or another number of partitions."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job = f"{prefix}job"
        self.orders, self.payments, self.output = (
            f"{prefix}{name}" for name in ("orders", "payments", "out")
        )
        self.path = directory / "job.py"
        self.data_dir = directory / "data"
        self.written: dict[str, dict[int, tuple[str, int]]] = {self.orders: {}, self.payments: {}}
        """Account and amount, by topic and id."""
        self._prefix = prefix
        self._producer = plain_producer(brokers)

    def prepare(self, job_text: str, orders: int, payments: int) -> None:
        """Write the job file, and create the topics with these numbers of partitions."""
        self.path.write_text(job_text.format(prefix=self._prefix))
        create_topic(self.brokers, self.orders, orders)
        create_topic(self.brokers, self.payments, payments)
        create_topic(self.brokers, self.output, orders)

    def write(self, count: int) -> None:
        """Write this many more orders and payments. Payments don't have their account as key."""
        for _ in range(count):
            for topic, records in self.written.items():
                number = len(records)
                account, amount = f"account-{number * 7 % ACCOUNTS}", number % 13
                records[number] = account, amount
                value = orjson.dumps({"id": number, "account": account, "amount": amount})
                key = account if topic == self.orders else f"payment-{number}"
                self._producer.produce(topic, value, key)
        assert self._producer.flush(30) == 0

    def write_at(self, topic: str, timestamps_ms: range) -> None:
        for timestamp_ms in timestamps_ms:
            self._producer.produce(topic, b"{}", "k", timestamp=timestamp_ms)
            self._producer.poll(0)
        assert self._producer.flush(30) == 0

    def writing(self) -> AbstractContextManager[None]:
        """Write continuously."""
        return all_the_time(lambda: self.write(5))

    def outputs(self) -> dict[str, list[dict[str, Any]]]:
        """All committed outputs, by key, in order."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for lines in read_topic(self.brokers, self.output, READ_COMMITTED, _decoded).values():
            for key, line in lines:
                found[key].append(line)
        return found

    def check_balances(self) -> None:
        """Check that each order and payment counted once, in its account, and each topic's records in their
        order."""
        outputs = self.outputs()
        repartition = repartition_topic(self.job, "balance")
        seen: dict[str, list[int]] = {self.orders: [], repartition: []}
        for account, lines in outputs.items():
            total = 0
            last = dict.fromkeys(seen, -1)
            assert [line["count"] for line in lines] == list(range(1, len(lines) + 1)), account
            for line in lines:
                topic, number = line["topic"], line["id"]
                source = self.orders if topic == self.orders else self.payments
                expected_account, amount = self.written[source][number]
                total += amount
                assert (account, line["sum"]) == (expected_account, total), line
                if topic == self.orders:  # an account's payments come from several partitions
                    assert number > last[topic], line
                last[topic] = number
                seen[topic].append(number)
        assert sorted(seen[self.orders]) == list(self.written[self.orders])
        assert sorted(seen[repartition]) == list(self.written[self.payments])

    def up(self) -> tuple[int, str]:
        """Run `fcluster up --until-caught-up` to its end. Returns the exit code and all output."""
        with Up(self.path, self.brokers, self.data_dir, "--until-caught-up") as up:
            ended = up.wait(60)
        return ended.code, ended.text


@pytest.fixture
def work(kafka: str, topic_prefix: str, tmp_path: Path) -> Work:
    return Work(kafka, topic_prefix, tmp_path)


def test_each_record_of_two_topics_counts_once_despite_a_death_a_take_over_and_a_move(work: Work) -> None:
    work.prepare(BALANCES, PARTITIONS, 3)
    repartition = repartition_topic(work.job, "balance")
    settings = {
        "num.standby.replicas": 1,
        "commit.interval.max.ms": 200,
        "session.timeout.ms": 3000,
        "initial.rebalance.delay.ms": 0,
    }
    with Cluster(work.path, work.brokers, work.data_dir, workers=2, settings=settings) as cluster:
        cluster.start()
        settle(cluster, work)
        with work.writing():
            wait_until_equal(lambda: len(work.outputs()), ACCOUNTS, "outputs for all accounts")
            name, in_flight = cluster.kill_mid_epoch([0, 1], [work.output])
            assert in_flight > 0
            cluster.start_worker(int(name.removeprefix(worker_name(0)[:-1])))
            status = settle(cluster, work)
            assert status["counters"]["warm_takeovers"] > 0
            cluster.start_worker(2)
            cluster.workers = 3
            status = settle(cluster, work)
            assert status["counters"]["moves"] > 0
        topics = [work.orders, work.payments, repartition]
        wait_until_committed(work.brokers, work.job, topics, 30)
        wait_until_equal(lambda: _lags(work), dict.fromkeys(topics, 0), "no lag in any input")
        cluster.terminate()
    work.check_balances()
    work.write(100)
    code, said = work.up()
    assert code == 0, said
    work.check_balances()


def settle(cluster: Cluster, work: Work) -> dict[str, Any]:
    """Wait until each worker runs merged shards with warm copies. Returns the status."""

    def look() -> dict[str, Any] | None:
        cluster.assert_alive()
        status = status_of(work.brokers, work.job)
        merged = [shard for shard in status.get("shards", []) if shard["stage"] == work.orders]
        copies = [copy["lag"] for shard in merged for copy in shard["standbys"]]
        settled = (
            {shard["slot"] for shard in merged} == set(range(cluster.workers))
            and all(shard["phase"] == "running" and shard["moving_to"] < 0 for shard in merged)
            and len(copies) == len(merged)
            and all(0 <= lag <= 100 for lag in copies)
        )
        return status if settled else None

    return wait_until(look, "a settled cluster", 60, 0.25) or {}


def _decoded(message: Message) -> tuple[str, dict[str, Any]]:
    return (message.key() or b"").decode(), orjson.loads(message.value() or b"")


def _lags(work: Work) -> dict[str, int]:
    """The lag of each topic according to the status. -1 if unknown."""
    lags: dict[str, int] = defaultdict(int)
    for shard in status_of(work.brokers, work.job).get("shards", []):
        for source in shard["inputs"]:
            lags[source["topic"]] += source["lag"] if source["lag"] >= 0 else -1_000_000
    return dict(lags)


def test_records_are_in_the_order_of_timestamps_however_far_one_topic_is_read_ahead(work: Work) -> None:
    work.prepare(IN_ORDER, 1, 1)
    began_ms = round(time.time() * 1000) - 200_000
    payments = range(began_ms + 50_000, began_ms + 110_000, 2)  # read ahead until reading is paused
    orders = range(began_ms + 1, began_ms + 60_000, 2)
    work.write_at(work.payments, payments)
    work.write_at(work.orders, orders)
    code, said = work.up()
    assert code == 0, said
    (lines,) = work.outputs().values()
    assert [line["timestamp"] for line in lines] == sorted([*payments, *orders])


def test_topics_with_different_numbers_of_partitions_are_refused(work: Work) -> None:
    work.prepare(IN_ORDER, 4, 3)
    code, said = work.up()
    assert code == 1, said
    assert "merges topics with different numbers of partitions" in said
    assert f"'{work.orders}' (4 partitions) and '{work.payments}' (3 partitions)" in said
    assert ".key_by(...)" in said
