"""Latency from producer to consumer, with the job between them and without ("the floor").

The floor: one producer at a steady rate into the source topic, a read_committed and a read_uncommitted reader
of that topic. With the job: the same producer, the same two readers, but of the job's output. Each is a
process of its own. A record carries the time when it was due, by the host's monotonic clock, which all
processes share: its latency counts from there (`figures.Schedule`), not from when it was written. So it
includes up to a tick of the producer's, in the floor just as with the job. The first seconds don't count.
"""

from __future__ import annotations

import multiprocessing
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from confluent_kafka import Producer

from benchmarks.drain import Usage
from benchmarks.figures import Schedule, latency_figures, percentile
from benchmarks.lanes import Lane, Running, Task
from benchmarks.live import READ_AT_A_TIME, consumer_at_end
from benchmarks.records import STEP, encode
from benchmarks.support import Names, Place
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, end_offsets
from tests.harness import wait_until

START_TIMEOUT_S = 300
LAST_TIMEOUT_S = 30
TICK_S = 0.001
"""The producer wakes this often and writes what is due."""
LEAD_S = 0.2
"""From the decision to begin until the first record is due."""
WARM_UP_RECORDS = 200


@dataclass(frozen=True)
class Watched:
    """What a reader reads."""

    topic: str
    isolation: str = READ_COMMITTED


def both_ways(topic: str) -> dict[str, Watched]:
    """Two readers of one topic, by the prefix of their figures."""
    return {
        "committed_": Watched(topic, READ_COMMITTED),
        "uncommitted_": Watched(topic, READ_UNCOMMITTED),
    }


@dataclass(frozen=True)
class Load:
    """What is written.

    Attributes:
        rate: records a second.
        seconds: that are measured.
        warm_up_s: seconds before them that aren't.
        keys: how many distinct ones.
    """

    rate: float
    seconds: float = 30.0
    warm_up_s: float = 15.0
    keys: int = 1000

    @property
    def records(self) -> int:
        """How many are written in all."""
        return round(self.rate * (self.warm_up_s + self.seconds))


def produce(brokers: str, topic: str, load: Load, ready: Any, start_ns: Any, answer: Any) -> None:
    """Runs in a process of its own: write each record when it is due. Answers with its 99th percentile of
    being late, in milliseconds."""
    producer = Producer(
        {
            "bootstrap.servers": brokers,
            "linger.ms": 1,
            "partitioner": "murmur2_random",
            "acks": "all",
            # A broker that has just started is slow. Without a limit, thousands of requests would wait in its
            # socket, each with a few records: seconds of latency that are the writer's.
            "max.in.flight.requests.per.connection": 5,
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    producer.list_topics(topic, timeout=10)
    ready.set()
    while not start_ns.value:
        time.sleep(TICK_S)
    schedule, clock = Schedule(load.rate, start_ns.value), time.monotonic_ns
    written, late_ns = 0, array("q")
    while written < load.records:
        due = min(schedule.count_due(clock()), load.records)
        while written < due:
            key, due_ns = f"k{written * STEP % load.keys}", schedule.due_ns(written)
            producer.produce(topic, encode(written, key, due_ns), key)
            late_ns.append(clock() - due_ns)
            written += 1
        producer.poll(0)
        time.sleep(TICK_S)
    producer.flush(LAST_TIMEOUT_S)
    answer.put(percentile(sorted(late_ns), 0.99) / 1e6)


def read(
    brokers: str, topic: str, partitions: int, isolation: str, ready: Any, seen: Any, end: Any, answer: Any
) -> None:
    """Runs in a process of its own: each record's time when it was due, and its latency, in nanoseconds.

    Args:
        seen: tells meanwhile how many there were.
    """
    consumer = consumer_at_end(brokers, topic, partitions, isolation)
    found = array("q")
    loads, clock = orjson.loads, time.monotonic_ns
    ready.set()
    while not end.is_set():
        first = consumer.poll(0.1)
        if first is None:
            continue
        messages = (first, *consumer.consume(READ_AT_A_TIME, 0))
        now_ns = clock()
        for message in messages:
            if message.error() is None and (due_ns := loads(message.value())["at"]):
                found.extend((due_ns, now_ns - due_ns))
        seen.value = len(found) // 2
    answer.put(found)
    consumer.close()


class _Probes:
    """The producer and the readers; ended with the `with` block."""

    def __init__(
        self, brokers: str, written: str, watched: Mapping[str, Watched], partitions: int, load: Load
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.start_ns = context.Value("q", 0, lock=False)
        self.end = context.Event()
        self.late = context.Queue()
        self.answers = {prefix: context.Queue() for prefix in watched}
        self.seen = {prefix: context.Value("q", 0, lock=False) for prefix in watched}
        self._ready = [context.Event() for _ in range(len(watched) + 1)]
        self.processes = [
            context.Process(
                target=read,
                args=(
                    brokers,
                    one.topic,
                    partitions,
                    one.isolation,
                    ready,
                    self.seen[prefix],
                    self.end,
                    self.answers[prefix],
                ),
                daemon=True,
            )
            for (prefix, one), ready in zip(watched.items(), self._ready, strict=False)
        ]
        self.processes.append(
            context.Process(
                target=produce,
                args=(brokers, written, load, self._ready[-1], self.start_ns, self.late),
                daemon=True,
            )
        )

    def __enter__(self) -> _Probes:
        for process in self.processes:
            process.start()
        for ready in self._ready:
            if not ready.wait(START_TIMEOUT_S):
                self.__exit__()
                raise TimeoutError("a probe doesn't start")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.pid is not None:
                process.kill()
                process.join()


def measure_probes(
    brokers: str,
    written: str,
    watched: Mapping[str, Watched],
    partitions: int,
    load: Load,
    look: Callable[[], dict[str, float]] = dict,
) -> dict[str, float]:
    """Write and read: latencies of all readers, and how late the producer itself was.

    Args:
        watched: what each reader reads, by the prefix of its figures.
        look: figures that grow (processor time); how much they grow in the measured time is in the answer.
    """
    with _Probes(brokers, written, watched, partitions, load) as probes:
        start_ns = time.monotonic_ns() + int(LEAD_S * 1e9)
        probes.start_ns.value = start_ns
        time.sleep(LEAD_S + load.warm_up_s)
        before = look()
        time.sleep(load.seconds)
        after = look()
        late_ms = probes.late.get(timeout=LAST_TIMEOUT_S + load.seconds)

        def missing() -> dict[str, int]:
            return {name: load.records - seen.value for name, seen in probes.seen.items()}

        deadline_s = time.monotonic() + LAST_TIMEOUT_S
        while any(missing().values()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not seen by the readers: {missing()} of {load.records:,} records")
            time.sleep(0.1)
        probes.end.set()
        from_ns = Schedule(load.rate, start_ns).due_ns(round(load.rate * load.warm_up_s))
        figures = {"records": load.records - round(load.rate * load.warm_up_s), "writer_late_p99_ms": late_ms}
        for prefix in watched:
            rows = probes.answers[prefix].get(timeout=LAST_TIMEOUT_S)
            latencies_ns = [
                latency_ns
                for due_ns, latency_ns in zip(rows[::2], rows[1::2], strict=True)
                if due_ns >= from_ns
            ]
            figures |= latency_figures(latencies_ns, prefix)
        return figures | {name: after[name] - before[name] for name in before}


def measure_floor(place: Place, partitions: int, names: Names, load: Load) -> dict[str, float]:
    """Producer and readers on one topic, no job."""
    return measure_probes(place.brokers, names.source, both_ways(names.source), partitions, load)


def measure(lane: Lane, place: Place, names: Names, task: Task, load: Load) -> dict[str, float]:
    """A fresh job between producer and readers; its topics exist."""
    with lane.run(place, names, task) as running:
        warm_up(place.brokers, names, running)

        def cpu() -> dict[str, float]:
            usage = Usage.of(running, place)
            found = {"cpu_s": usage.workers_s + usage.coordinator_s}
            return found if place.broker_pid is None else found | {"broker_cpu_s": usage.broker_s}

        watched = both_ways(names.output)
        figures = measure_probes(place.brokers, names.source, watched, task.partitions, load, cpu)
        running.assert_alive()
        return figures


def warm_up(brokers: str, names: Names, running: Running) -> None:
    """Some records through each partition: the job runs, its producers are connected."""
    producer = Producer({"bootstrap.servers": brokers, "partitioner": "murmur2_random"})
    for number in range(WARM_UP_RECORDS):
        producer.produce(names.source, encode(-1, f"k{number}", 0), f"k{number}")
    producer.flush(LAST_TIMEOUT_S)

    def processed() -> bool:
        running.assert_alive()
        # Commit markers count, too: all that matters is that each partition works.
        ends = end_offsets(brokers, [names.output], READ_COMMITTED).values()
        return all(ends) and sum(ends) >= WARM_UP_RECORDS

    wait_until(processed, "the job's first commit", START_TIMEOUT_S)
