"""How long the committed output of other keys pauses while very many windows close at once.

    python -m benchmarks.closing [--windows 1000000] [--rate 200] [--brokers HOST:PORT]

A job with one shard has a window for each of so many keys, and counts other records, which have other keys.
The other records come at a steady rate. A read_committed consumer notes when each of their outputs becomes
visible. First no window closes, for some time: what is seen then is the job, the broker and the machine. Then
one record makes all windows due. The longest time without an output is given for both, and how the times
between two outputs are distributed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Producer, TopicPartition

from fcluster import Job, Tumbling, count
from fcluster.kafka.embedded import EmbeddedKafka
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, end_offsets, new_consumer
from tests.harness import Cluster

JOB, SOURCE, OTHERS, CLOSED = "closing-job", "closing-in", "closing-others", "closing-windows"
DAY_MS = 86_400_000
BEGIN_MS = 20_000 * DAY_MS
OTHER_KEYS = 100
QUIET_S = 20
LIMIT_S = 1_800

job = Job(JOB)
source = job.topic(SOURCE, value="bytes")
others, closed = job.topic(OTHERS), job.topic(CLOSED)
stream = job.stream(source)
(
    stream.filter(lambda value: value == b"w")
    .window(Tumbling(timedelta(milliseconds=DAY_MS)), name="days")
    .aggregate(n=count())
    .to(closed)
)


def counted(ctx, _value):
    """A running count of each of the other keys."""
    ctx.state["n"] = number = ctx.state.get("n", 0) + 1
    return number


stream.filter(lambda value: value == b"o").process(counted, name="others").to(others)


class Watch:
    """Notes when outputs become visible."""

    def __init__(self, brokers: str) -> None:
        self.seen_s: list[float] = []
        self._consumer = new_consumer(brokers, READ_COMMITTED, **{"fetch.wait.max.ms": 5})
        self._consumer.assign([TopicPartition(OTHERS, 0, OFFSET_BEGINNING)])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            message = self._consumer.poll(0.05)  # `consume` would wait for more of them
            if message is not None and message.error() is None:
                self.seen_s.append(time.monotonic())

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()
        self._consumer.close()

    def describe(self, from_s: float, to_s: float) -> str:
        """The times without output in between."""
        times = [from_s, *(at for at in self.seen_s if from_s <= at <= to_s), to_s]
        gaps_ms = sorted((after - before) * 1_000 for before, after in pairwise(times) if after > before)
        half_ms, most_ms = gaps_ms[len(gaps_ms) // 2], gaps_ms[len(gaps_ms) * 99 // 100]
        return (
            f"{len(times) - 2:,} outputs in {to_s - from_s:.0f} s; at most {gaps_ms[-1]:.0f} ms without one, "
            f"{sum(gap > 100 for gap in gaps_ms)} times more than 100 ms; half of the times at most "
            f"{half_ms:.0f} ms, 99 % at most {most_ms:.0f} ms"
        )


class Feed:
    """Writes other records at a steady rate."""

    def __init__(self, producer: Producer, rate: int) -> None:
        self.at_ms = BEGIN_MS
        self.sent = 0
        self._producer, self._rate = producer, rate
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began_s = time.monotonic()
        while not self._ended.wait(0.002):
            while self.sent < (time.monotonic() - began_s) * self._rate:
                key = b"o%d" % (self.sent % OTHER_KEYS)
                self._producer.produce(SOURCE, b"o", key, 0, timestamp=self.at_ms)
                self.sent += 1
            self._producer.poll(0)

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()


def fill(producer: Producer, windows: int) -> None:
    """A record for each window."""
    for number in range(windows):
        while True:
            try:
                producer.produce(SOURCE, b"w", b"k%d" % number, 0, timestamp=BEGIN_MS)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def wait_for(brokers: str, topic: str, records: int, cluster: Cluster) -> None:
    """Wait until a topic has so many committed records, or a few more."""
    began_s = time.monotonic()
    while end_offsets(brokers, [topic], READ_COMMITTED)[topic, 0] < records:
        cluster.assert_alive()
        if time.monotonic() - began_s > LIMIT_S:
            raise TimeoutError(f"{topic} doesn't get {records} records")
        time.sleep(0.5)


@contextmanager
def broker() -> Iterator[str]:
    """A broker of its own."""
    with tempfile.TemporaryDirectory(prefix="fcluster-closing-kafka-") as directory:
        kafka = EmbeddedKafka(Path(directory))
        try:
            yield kafka.start(progress=print)
        finally:
            kafka.stop()


def measure(brokers: str, windows: int, rate: int, directory: Path) -> None:
    """Fill, wait, close, and print what was seen."""
    for topic in (SOURCE, OTHERS, CLOSED):
        create_topic(brokers, topic, 1)
    producer = Producer({"bootstrap.servers": brokers, "linger.ms": 2})
    fill(producer, windows)
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with Cluster(Path(__file__), brokers, directory, workers=1) as cluster:
        cluster.start()
        watch, feed = Watch(brokers), Feed(producer, rate)
        try:
            wait_for(brokers, OTHERS, 1, cluster)
            time.sleep(5)
            began_s = time.monotonic()
            time.sleep(QUIET_S)
            print("no window closes:", watch.describe(began_s, time.monotonic()))
            feed.at_ms = BEGIN_MS + 2 * DAY_MS
            began_s = time.monotonic()
            wait_for(brokers, CLOSED, windows, cluster)
            print(f"{windows:,} windows close:", watch.describe(began_s, time.monotonic()))
            print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        finally:
            feed.close()
            watch.close()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=int, default=200, help="Other records a second.")
    parser.add_argument("--brokers", help="Default: a broker is started.")
    chosen = parser.parse_args()
    with (
        nullcontext(chosen.brokers) if chosen.brokers else broker() as brokers,
        tempfile.TemporaryDirectory(prefix="fcluster-closing-") as directory,
    ):
        measure(brokers, chosen.windows, chosen.rate, Path(directory))


if __name__ == "__main__":
    main()
