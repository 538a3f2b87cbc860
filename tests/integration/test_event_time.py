"""Event time of a job with two stages, with real processes and a real broker."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, TopicPartition

from fcluster.common.errors import FclusterError
from fcluster.common.ids import repartition_topic
from fcluster.common.settings import resolve
from fcluster.engine.clock import EventClock
from fcluster.kafka.clients import make_consumer
from fcluster.kafka.offsets import read_committed_positions
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic, plain_producer
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.feeding import all_the_time
from tests.harness import Cluster, Up, wait_until, worker_name
from tests.pauses import status_of

pytestmark = pytest.mark.timeout(180)

JOB = """
from fcluster import Job, Watermark

job = Job("{prefix}job")
orders = job.topic("{prefix}orders", watermark=Watermark(max_delay_ms=50, idle_ms=500))

def total(ctx, order):
    ctx.state["sum"] = ctx.state.get("sum", 0) + order["amount"]
    return {{"id": order["id"], "sum": ctx.state["sum"]}}

job.stream(orders).key_by("shop").process(total, to=job.topic("{prefix}out"), name="per-shop")
"""
PARTITIONS = 3
MAX_DELAY_MS = 50
BEGIN_MS = 1_767_225_600_000
SHOPS = 20


class Orders:
    """Orders at a steady pace in event time, in all partitions but the last, which stays empty."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job = f"{prefix}job"
        self.source, self.output = f"{prefix}orders", f"{prefix}out"
        self.repartition = repartition_topic(self.job, "per-shop")
        self.path, self.data_dir = directory / "job.py", directory / "data"
        self.path.write_text(JOB.format(prefix=prefix))
        self.written = 0
        self._producer = plain_producer(brokers)
        for topic in (self.source, self.output):
            create_topic(brokers, topic, PARTITIONS)

    @property
    def goal_ms(self) -> int:
        """The event time that follows from the orders. The slowest partition that isn't idle decides."""
        return BEGIN_MS + self.written - 2 - MAX_DELAY_MS

    def write(self, count: int) -> None:
        """Write this many more orders, one per millisecond, to the partitions in turn."""
        for number in range(self.written, self.written + count):
            value = orjson.dumps({"id": number, "shop": f"shop-{number * 7 % SHOPS}", "amount": number % 13})
            partition = number % (PARTITIONS - 1)
            self._producer.produce(self.source, value, "k", partition, timestamp=BEGIN_MS + number)
        self.written += count
        assert self._producer.flush(30) == 0

    def coming(self) -> AbstractContextManager[None]:
        """Write continuously."""
        return all_the_time(lambda: self.write(10))

    def check_outputs(self) -> None:
        """Check that each order was counted once."""
        sums: dict[str, int] = defaultdict(int)
        last: dict[str, int] = {}
        seen: list[int] = []
        for lines in read_topic(
            self.brokers, self.output, READ_COMMITTED, lambda m: (m.key(), m.value())
        ).values():
            for key, value in lines:
                shop, line = (key or b"").decode(), orjson.loads(value or b"")
                sums[shop] += line["id"] % 13
                last[shop] = line["sum"]
                seen.append(line["id"])
        assert sorted(seen) == list(range(self.written))
        assert last == sums


class CommittedTimes:
    """The event time that is committed for each shard, polled all the time. It must never go back."""

    def __init__(self, orders: Orders) -> None:
        settings = resolve({}, None, {}, {"bootstrap.servers": orders.brokers})
        self._consumer: Consumer = make_consumer(settings, "read-uncommitted", **{"group.id": orders.job})
        self._job = orders.job
        self._delays: dict[str, int | None] = {orders.source: MAX_DELAY_MS, orders.repartition: None}
        self.latest: dict[tuple[str, int], int] = {}
        self.went_back: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> CommittedTimes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._consumer.close()

    def at_least(self, topic: str, time_ms: int) -> bool:
        """Whether all shards that read the topic and aren't idle have reached this time."""
        times = [self.latest.get((topic, partition), -1) for partition in range(PARTITIONS)]
        return all(at >= time_ms for at in times)

    def _run(self) -> None:
        wanted = [TopicPartition(topic, number) for topic in self._delays for number in range(PARTITIONS)]
        while not self._stop.wait(0.02):
            try:
                committed = read_committed_positions(self._consumer, self._job, wanted)
            except FclusterError:
                continue  # the group's coordinator is busy
            for at, position in committed.items():
                if position is not None:
                    self._note(at, position.clock)

    def _note(self, at: TopicPartition, text: str) -> None:
        clock = EventClock([self._delays[at.topic]])
        clock.restore(0, text)
        before = self.latest.get((at.topic, at.partition), -1)
        time_ms = -1 if clock.now_ms is None else clock.now_ms
        if time_ms < before:
            self.went_back.append((at.topic, at.partition, before, time_ms))
        self.latest[at.topic, at.partition] = time_ms


@pytest.fixture
def orders(kafka: str, topic_prefix: str, tmp_path: Path) -> Orders:
    return Orders(kafka, topic_prefix, tmp_path)


def test_event_time_crosses_a_repartition_and_never_goes_back_when_workers_die(orders: Orders) -> None:
    settings = {
        "num.standby.replicas": 1,
        "commit.interval.max.ms": 200,
        "session.timeout.ms": 3000,
        "initial.rebalance.delay.ms": 0,
    }
    with (
        Cluster(orders.path, orders.brokers, orders.data_dir, workers=2, settings=settings) as cluster,
        CommittedTimes(orders) as times,
    ):
        cluster.start()
        with orders.coming():
            wait_until(
                lambda: times.at_least(orders.repartition, BEGIN_MS), "event time behind the repartition"
            )
            name, in_flight = cluster.kill_mid_epoch([0, 1], [orders.repartition])
            assert in_flight > 0
            cluster.start_worker(int(name.removeprefix(worker_name(0)[:-1])))
            killed_at_ms = orders.goal_ms
            wait_until(
                lambda: times.at_least(orders.repartition, killed_at_ms), "event time after the death", 60
            )
            cluster.kill_all()
            cluster.start()
            killed_at_ms = orders.goal_ms
            wait_until(
                lambda: times.at_least(orders.repartition, killed_at_ms), "event time after all died", 60
            )
        # No stage needs it here, so it is told less often, but in the end all of it is told.
        wait_until(
            lambda: times.at_least(orders.repartition, orders.goal_ms), "the whole event time behind it"
        )
        wait_until_committed(orders.brokers, orders.job, [orders.source, orders.repartition], 30)
        check_status(orders)
        cluster.terminate()
        orders.write(100)
        with Up(orders.path, orders.brokers, orders.data_dir, "--until-caught-up") as up:
            ended = up.wait(60)
        assert ended.code == 0, ended.text
    assert times.went_back == []
    orders.check_outputs()


def check_status(orders: Orders) -> None:
    """Check that status names the event time of both stages, and the partition that is left out."""

    def look() -> dict[str, dict[str, Any]] | None:
        stages = {one["stage"]: one for one in status_of(orders.brokers, orders.job).get("event_times", [])}
        if not stages or stages[orders.source]["time_ms"] < orders.goal_ms:
            return None
        return stages if stages["per-shop"]["idle_upstream"] else None

    stages = wait_until(look, "status with both event times")
    assert stages is not None
    source, behind = stages[orders.source], stages["per-shop"]
    assert {"topic": orders.source, "partition": PARTITIONS - 1} in source["idle"]
    assert BEGIN_MS < behind["time_ms"] <= source["time_ms"]
    assert behind["behind_ms"] > 0
