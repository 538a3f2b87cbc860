"""A steady load and a live read_committed reader, each in its own process, and what they observe.

For benchmarks of disturbances in a running cluster: how long outputs of a partition pause, and what latency
the other partitions have meanwhile. Producer and reader share nothing with each other or with the script that
disturbs the cluster, so neither waits for the other's interpreter. Outputs keep their input's key and so its
partition: a shard's output is one partition of the output topic, and each record carries the time when its
input was produced.
"""

from __future__ import annotations

import multiprocessing
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.support import Names, cluster, settings_of, topics
from tests.checker.live import percentile
from tests.checker.reading import READ_COMMITTED
from tests.harness import Cluster, wait_until

START_TIMEOUT_S = 60
TICK_S = 0.005
"""The producer wakes up this often and writes what is due: 10 records at 2,000/s."""
READ_AT_A_TIME = 1000


@dataclass(frozen=True)
class Seen:
    """One output in one partition: when its input was produced, and when the reader received it, in
    nanoseconds.
    """

    produced_ns: int
    seen_ns: int

    @property
    def latency_ms(self) -> float:
        """The time from one to the other."""
        return (self.seen_ns - self.produced_ns) / 1e6


def produce(brokers: str, topic: str, rate: float, keys: int, end: Any) -> None:
    """Write at a steady rate until `end`. Runs in its own process."""
    producer = Producer(
        {"bootstrap.servers": brokers, "linger.ms": 1, "partitioner": "murmur2_random", "acks": "all"}
    )
    producer.list_topics(topic, timeout=10)
    started_s, written = time.monotonic(), 0
    while not end.is_set():
        due = rate * (time.monotonic() - started_s)
        while written < due:
            key = f"k{written * 7919 % keys}"
            record = {"id": written, "key": key, "value": written % 1000, "at": time.time_ns()}
            try:
                producer.produce(topic, orjson.dumps(record), key)
            except BufferError:
                producer.poll(0.05)
                continue
            written += 1
        producer.poll(0)
        time.sleep(TICK_S)
    producer.flush(30)


def consumer_at_end(
    brokers: str, topic: str, partitions: int, isolation: str, group: str = "fcluster-bench"
) -> Consumer:
    """A consumer that reads what comes from now on."""
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": group,
            "enable.auto.commit": False,
            "isolation.level": isolation,
        }
    )
    # Not OFFSET_END: the client looks for the end later, and on a busy machine it misses what comes before.
    wanted = [TopicPartition(topic, partition) for partition in range(partitions)]
    ends = [consumer.get_watermark_offsets(one, timeout=30)[1] for one in wanted]
    consumer.assign([TopicPartition(topic, *at) for at in enumerate(ends)])
    consumer.poll(1.0)
    return consumer


def read(brokers: str, topic: str, partitions: int, newest: Any, ready: Any, end: Any, answer: Any) -> None:
    """Note each record until `end`. Meanwhile, `newest` shows how far the reader is. Runs in its own
    process.
    """
    consumer = consumer_at_end(brokers, topic, partitions, READ_COMMITTED)
    seen = {partition: array("q") for partition in range(partitions)}
    loads, clock = orjson.loads, time.time_ns
    ready.set()
    while not end.is_set():
        first = consumer.poll(0.1)
        if first is None:
            continue
        for message in (first, *consumer.consume(READ_AT_A_TIME, 0)):
            if message.error() is None:
                produced_ns = loads(message.value())["at"]
                partition = message.partition()
                seen[partition].extend((produced_ns, clock()))
                newest[partition] = produced_ns
    answer.put(seen)
    consumer.close()


class Load:
    """Producer and reader around a job. Use it in a `with` block, then read `seen`.

    Args:
        rate: records a second, over `keys` keys.
        partitions: the partition count of source and output.
    """

    def __init__(
        self, brokers: str, source: str, output: str, *, rate: float, keys: int, partitions: int
    ) -> None:
        self.partitions = partitions
        self.seen: dict[int, list[Seen]] = {}
        context = multiprocessing.get_context("spawn")
        self._end_writing, self._end_reading = context.Event(), context.Event()
        self._ready, self._answer = context.Event(), context.Queue()
        self._newest = context.Array("q", partitions, lock=False)
        self._writer = context.Process(
            target=produce, args=(brokers, source, rate, keys, self._end_writing), daemon=True
        )
        self._reader = context.Process(
            target=read,
            args=(brokers, output, partitions, self._newest, self._ready, self._end_reading, self._answer),
            daemon=True,
        )

    def __enter__(self) -> Load:
        self._reader.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise TimeoutError("the reader doesn't start")
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._writer, self._reader):
            if process.pid is not None:
                process.kill()
                process.join()

    def newest_ns(self, partition: int) -> int:
        """When the input of the newest output in this partition was produced. 0 if there is none."""
        return self._newest[partition]

    def wait_flowing(self, partitions: Iterable[int], seconds: float) -> None:
        """Wait until all these partitions have had steady output for this long."""
        from_ns = time.time_ns() + int(seconds * 1e9)
        wanted = list(partitions)
        wait_until(lambda: self._reached(wanted, from_ns), "steady output", START_TIMEOUT_S, 0.02)

    def wait_reached(self, partitions: Iterable[int], produced_ns: int) -> None:
        """Wait until outputs of records produced at this time were seen in all these partitions."""
        wanted = list(partitions)
        wait_until(lambda: self._reached(wanted, produced_ns), "output", START_TIMEOUT_S, 0.02)

    def _reached(self, partitions: Sequence[int], produced_ns: int) -> bool:
        return all(self._newest[partition] > produced_ns for partition in partitions)

    def finish(self) -> Mapping[int, list[Seen]]:
        """Stop writing and reading. Returns what was seen, by partition, in the order of reading."""
        self._end_writing.set()
        self._writer.join(START_TIMEOUT_S)
        time.sleep(1.0)
        self._end_reading.set()
        rows: dict[int, array[int]] = self._answer.get(timeout=START_TIMEOUT_S)
        self.seen = {
            partition: [Seen(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
            for partition, flat in rows.items()
        }
        return self.seen


def load_of(brokers: str, source: str, output: str, arguments: Any) -> Load:
    """The load that the arguments describe."""
    return Load(
        brokers,
        source,
        output,
        rate=arguments.rate,
        keys=arguments.keys,
        partitions=arguments.partitions,
    )


@contextmanager
def cluster_under_load(
    brokers: str, directory: Path, names: Names, settings: dict[str, str], arguments: Any
) -> Iterator[tuple[Cluster, Load]]:
    """The job on as many workers as the arguments say, started, and the load that they describe.

    Settings given with --set take precedence over `settings`.
    """
    with (
        topics(brokers, names, arguments.partitions),
        cluster(brokers, directory, names, arguments.workers, settings | settings_of(arguments)) as running,
    ):
        running.start()
        with load_of(brokers, names.source, names.output, arguments) as load:
            yield running, load


@dataclass(frozen=True)
class Pause:
    """The longest time without output in one partition. Nanoseconds on the host's clock."""

    partition: int
    from_ns: int
    to_ns: int

    @property
    def ms(self) -> float:
        """How long it was."""
        return (self.to_ns - self.from_ns) / 1e6


def longest_pause(seen: Sequence[Seen], partition: int, from_ns: int, to_ns: int) -> Pause:
    """The longest pause of a partition among the records that were seen during this time."""
    times_ns = sorted(one.seen_ns for one in seen if from_ns <= one.seen_ns <= to_ns)
    assert len(times_ns) > 1, f"next to nothing was seen in partition {partition}"
    begin_ns, end_ns = max(pairwise(times_ns), key=lambda pair: pair[1] - pair[0])
    return Pause(partition, begin_ns, end_ns)


def latencies_ms(
    seen: Mapping[int, Sequence[Seen]], partitions: Iterable[int], counts: Callable[[Seen], bool]
) -> list[float]:
    """The latencies of the counted records in these partitions."""
    return [one.latency_ms for partition in partitions for one in seen[partition] if counts(one)]


def under_way(from_ns: int, to_ns: int) -> Callable[[Seen], bool]:
    """Whether a record was on its way at any time between these two moments."""
    return lambda one: one.produced_ns <= to_ns and one.seen_ns >= from_ns


def seen_before(to_ns: int, seconds: float) -> Callable[[Seen], bool]:
    """Whether a record was seen in this many seconds before this moment."""
    from_ns = to_ns - int(seconds * 1e9)
    return lambda one: from_ns <= one.seen_ns < to_ns


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return percentile(values, 0.99)
