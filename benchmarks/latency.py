"""Latency from producer to consumer, with the job between them and without it ("the floor").

    python -m benchmarks.latency [--brokers HOST:PORT] [--rate 2000] [--seconds 30] [--rounds 1]

For the floor, one producer writes at a steady rate into the source topic, and a read_committed and a
read_uncommitted reader read that topic. With the job, the producer is the same, and the same two readers read
the job's output. The records carry timestamps from `time.time_ns` of one host. Each probe is its own process,
the same in both phases. The first seconds of each phase don't count. Rounds alternate between the phases, and
medians are printed.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Producer

from benchmarks.live import consumer_at_end
from benchmarks.support import Names, cluster, median, parser, settings_of, topics, workplace
from tests.checker.live import percentile
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, committed_offsets
from tests.harness import Cluster, cpu_seconds, wait_until

KEYS = 1000
START_TIMEOUT_S = 60
TICK_S = 0.005
"""The producer wakes up this often and writes what is due: 10 records at 2,000/s."""


@dataclass(frozen=True)
class Latency:
    """The latency of one reader in one phase."""

    median_ms: float
    p99_ms: float
    records: int


def produce(brokers: str, topic: str, rate: float, seconds: float) -> None:
    """Write at a steady rate. Each record carries the time at which it was written. Runs in its own
    process.
    """
    producer = Producer(
        {"bootstrap.servers": brokers, "linger.ms": 1, "partitioner": "murmur2_random", "acks": "all"}
    )
    producer.list_topics(topic, timeout=10)
    started_s, written = time.monotonic(), 0
    while (elapsed_s := time.monotonic() - started_s) < seconds:
        while written < rate * elapsed_s:
            key = f"k{written * 7919 % KEYS}"
            record = {"id": written, "key": key, "value": written % 1000, "at": time.time_ns()}
            producer.produce(topic, orjson.dumps(record), key)
            written += 1
        producer.poll(0)
        time.sleep(TICK_S)
    producer.flush(30)


def read(
    brokers: str, topic: str, partitions: int, isolation: str, ready: Any, end: Any, answer: Any
) -> None:
    """Note each record's (producer's time, latency) in nanoseconds until `end`. Runs in its own process."""
    consumer = consumer_at_end(brokers, topic, partitions, isolation)
    seen: list[tuple[int, int]] = []
    ready.set()
    while not end.is_set():
        message = consumer.poll(0.1)
        if message is None or message.error() is not None:
            continue
        now_ns = time.time_ns()
        at = orjson.loads(message.value())["at"]
        if at:
            seen.append((at, now_ns - at))
    answer.put(seen)
    consumer.close()


def measure(brokers: str, written: str, watched: str, arguments: Any) -> tuple[Latency, Latency]:
    """One phase. Returns what the read_committed and the read_uncommitted reader saw."""
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    readers: list[tuple[Any, Any, Any]] = []
    writer = context.Process(
        target=produce,
        args=(brokers, written, arguments.rate, arguments.seconds + arguments.warm_up),
        daemon=True,
    )
    try:
        for isolation in (READ_COMMITTED, READ_UNCOMMITTED):
            ready, answer = context.Event(), context.Queue()
            reader = context.Process(
                target=read,
                args=(brokers, watched, arguments.partitions, isolation, ready, end, answer),
                daemon=True,
            )
            reader.start()
            readers.append((reader, ready, answer))
        for _, ready, _ in readers:
            if not ready.wait(START_TIMEOUT_S):
                raise TimeoutError("a reader doesn't start")
        started_ns = time.time_ns()
        writer.start()
        writer.join(arguments.seconds + arguments.warm_up + START_TIMEOUT_S)
        if writer.exitcode != 0:
            raise TimeoutError(f"the producer ended with {writer.exitcode}")
        time.sleep(1.5)
        end.set()
        from_ns = started_ns + int(arguments.warm_up * 1e9)
        found = [summarise(answer.get(timeout=30), from_ns) for _, _, answer in readers]
        return found[0], found[1]
    finally:
        for process in (writer, *(reader for reader, _, _ in readers)):
            if process.pid is not None:
                process.kill()
                process.join()


def summarise(seen: list[tuple[int, int]], from_ns: int) -> Latency:
    """The median and the p99 of the records written after `from_ns`."""
    latencies_ms = [latency_ns / 1e6 for at, latency_ns in seen if at >= from_ns]
    return Latency(percentile(latencies_ms, 0.5), percentile(latencies_ms, 0.99), len(latencies_ms))


def measure_with_job(brokers: str, directory: Path, arguments: Any) -> tuple[Latency, Latency, float]:
    """A new job between producer and readers. Also returns the cluster's CPU use in cores."""
    names = Names.new()
    with (
        topics(brokers, names, arguments.partitions),
        cluster(brokers, directory, names, arguments.workers, settings_of(arguments)) as running,
    ):
        running.start()
        warm_up(brokers, names, running)
        before_s, started_s = sum(map(cpu_seconds, running.pids().values())), time.monotonic()
        committed, uncommitted = measure(brokers, names.source, names.output, arguments)
        used = sum(map(cpu_seconds, running.pids().values())) - before_s
        running.assert_alive()
        return committed, uncommitted, used / (time.monotonic() - started_s)


def warm_up(brokers: str, names: Names, running: Cluster) -> None:
    """Send one record through each partition, so that the job runs and its producers are connected."""
    producer = Producer({"bootstrap.servers": brokers, "partitioner": "murmur2_random"})
    for number in range(200):
        record = {"id": -1, "key": f"k{number}", "value": 0, "at": 0}
        producer.produce(names.source, orjson.dumps(record), f"k{number}")
    producer.flush(30)

    def processed() -> bool:
        running.assert_alive()
        offsets = committed_offsets(brokers, names.job)
        return sum(offset for (topic, _), offset in offsets.items() if topic == names.source) >= 200

    wait_until(processed, "the job's first commit", START_TIMEOUT_S)


def measure_floor(brokers: str, arguments: Any) -> tuple[Latency, Latency]:
    """Producer and readers on one topic, without a job."""
    names = Names.new()
    with topics(brokers, names, arguments.partitions):
        return measure(brokers, names.source, names.source, arguments)


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.add_argument("--rate", type=float, default=2000, help="Records a second.")
    made.add_argument("--seconds", type=float, default=30, help="Measured seconds of each phase.")
    made.add_argument("--warm-up", type=float, default=5, help="Seconds before them that don't count.")
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--rounds", type=int, default=1)
    made.add_argument("--floor-only", action="store_true")
    arguments = made.parse_args()
    phases: dict[str, list[Latency]] = {}
    print(
        f"{arguments.rate:,.0f} records/s, {arguments.partitions} partitions, {arguments.seconds:g} s a phase"
    )
    with workplace(arguments.brokers) as (brokers, directory):
        for _ in range(arguments.rounds):
            committed, uncommitted = measure_floor(brokers, arguments)
            note(phases, "floor, read_committed", committed)
            note(phases, "floor, read_uncommitted", uncommitted)
            if arguments.floor_only:
                continue
            committed, uncommitted, cores = measure_with_job(brokers, directory, arguments)
            note(phases, "job, read_committed", committed)
            note(phases, "job, read_uncommitted", uncommitted)
            print(f"  coordinator and workers used {cores:.2f} cores", flush=True)
    for name, found in phases.items():
        print(
            f"medians of {len(found)}: {name:<24} median {middle(found, 'median_ms'):7.1f} ms"
            f"   p99 {middle(found, 'p99_ms'):7.1f} ms"
        )
    if not arguments.floor_only:
        for reader in ("read_committed", "read_uncommitted"):
            job, floor = phases[f"job, {reader}"], phases[f"floor, {reader}"]
            above = {at: middle(job, at) - middle(floor, at) for at in ("median_ms", "p99_ms")}
            print(
                f"above the floor, {reader}: median {above['median_ms']:+.1f} ms, "
                f"p99 {above['p99_ms']:+.1f} ms"
            )
    return 0


def middle(found: list[Latency], figure: str) -> float:
    """The median of one figure over the rounds."""
    return median([getattr(latency, figure) for latency in found])


def note(phases: dict[str, list[Latency]], name: str, latency: Latency) -> None:
    """Keep and print one result."""
    phases.setdefault(name, []).append(latency)
    print(
        f"  {name:<24} median {latency.median_ms:7.1f} ms   p99 {latency.p99_ms:7.1f} ms"
        f"   {latency.records:,} records",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
