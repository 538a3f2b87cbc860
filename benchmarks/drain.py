"""How fast one worker drains a topic, compared with a bare loop over the same clients in the same run.

    python -m benchmarks.drain [--brokers HOST:PORT] [--records 1000000] [--rounds 1]

The job reads JSON records over many keys, keeps a running count and sum, and writes one output for each
input, exactly once. The bare loop consumes, calls `orjson.loads`, updates a dict, calls `orjson.dumps` and
produces: no state on disk, no transactions. It runs twice: with the clients' default settings, which is the
yardstick, and "tuned" with `TUNED`, because librdkafka by default waits 1,000 ms when its queue is full,
which limits a fast loop to about 100,000 records per wait. All read the same topic. The job's time runs from
the first output to the last committed one, so process start, join and restore don't count. The bare loop's
time runs from its first record to its flush. Rounds alternate between the two.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.support import Names, cluster, median, parser, settings_of, topics, workplace
from tests.checker.generate import create_topic, plain_producer
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, committed_offsets, end_offsets
from tests.harness import COORDINATOR, cpu_seconds, memory_bytes, wait_until, worker_name

DEADLINE_S = 600
TUNED = {"fetch.queue.backoff.ms": 10}


@dataclass(frozen=True)
class Drained:
    """One measurement."""

    rate: float
    cpu_s_per_million: float
    peak_bytes: int


def fill(brokers: str, topic: str, records: int, keys: int) -> None:
    """Write the input. The keys are visited in a fixed scattered order."""
    producer = plain_producer(brokers)
    for number in range(records):
        key = f"k{number * 7919 % keys}"
        value = orjson.dumps({"id": number, "key": key, "value": number % 1000, "at": 0})
        while True:
            try:
                producer.produce(topic, value, key)
                break
            except BufferError:
                producer.poll(0.05)
    if producer.flush(120):
        raise TimeoutError("the input is not written")


def bare_loop(
    brokers: str, source: str, output: str, partitions: int, records: int, config: dict[str, Any], answer: Any
) -> None:
    """Runs in its own process, so that its CPU time and memory can be measured."""
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": f"{output}-bare",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            **config,
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": brokers,
            "enable.idempotence": True,
            "linger.ms": 5,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    consumer.assign([TopicPartition(source, partition, 0) for partition in range(partitions)])
    state: dict[bytes, list[int]] = {}
    done, started_s, cpu_start_s = 0, 0.0, 0.0
    loads, dumps, produce = orjson.loads, orjson.dumps, producer.produce
    while done < records:
        batch = consumer.consume(5000, 1.0)
        if batch and not done:
            started_s, cpu_start_s = time.monotonic(), time.process_time()
        for message in batch:
            key, record = message.key(), loads(message.value())
            totals = state.get(key)
            if totals is None:
                totals = state[key] = [0, 0]
            totals[0] += 1
            totals[1] += record["value"]
            value = dumps(
                {"id": record["id"], "key": record["key"], "count": totals[0], "sum": totals[1], "at": 0}
            )
            try:
                produce(output, value, key)
            except BufferError:
                producer.poll(0.1)
                produce(output, value, key)
        producer.poll(0)
        done += len(batch)
    producer.flush(60)
    wall_s = time.monotonic() - started_s
    cpu_s = time.process_time() - cpu_start_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    consumer.close()
    answer.put(Drained(records / wall_s, cpu_s * 1e6 / records, peak))


def measure_bare(
    brokers: str, names: Names, partitions: int, records: int, config: dict[str, Any]
) -> Drained:
    """One pass of the bare loop. It writes into its own topic."""
    output = f"{names.job}-bare-{uuid.uuid4().hex[:6]}"
    create_topic(brokers, output, partitions)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(
        target=bare_loop,
        args=(brokers, names.source, output, partitions, records, config, answer),
        daemon=True,
    )
    process.start()
    try:
        return answer.get(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.join()


def measure_job(
    brokers: str, directory: Path, names: Names, records: int, settings: dict[str, str]
) -> tuple[Drained, float]:
    """One drain by a new job with one worker. Also returns the coordinator's CPU seconds."""
    with cluster(brokers, directory, names, 1, settings) as running:
        running.start()
        pids = running.pids()
        worker, coordinator = pids[worker_name(0)], pids[COORDINATOR]

        def written() -> int:
            running.assert_alive()
            return sum(end_offsets(brokers, [names.output], READ_UNCOMMITTED).values())

        first = wait_until(written, "the first output", 60, 0.01)
        started_s, cpu_start_s = time.monotonic(), cpu_seconds(worker)
        wait_until(lambda: written() >= records, "the last output", DEADLINE_S, 0.1)
        ends = end_offsets(brokers, [names.source], READ_COMMITTED)
        wait_until(lambda: ends.items() <= committed_offsets(brokers, names.job).items(), "the last commit")
        wall_s, cpu_s = time.monotonic() - started_s, cpu_seconds(worker) - cpu_start_s
        done = records - first
        drained = Drained(done / wall_s, cpu_s * 1e6 / done, memory_bytes(worker, "VmHWM"))
        return drained, cpu_seconds(coordinator)


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.add_argument("--records", type=int, default=1_000_000)
    made.add_argument("--keys", type=int, default=50_000)
    made.add_argument("--rounds", type=int, default=1, help="Rounds of both; medians are printed.")
    made.add_argument("--bare-only", action="store_true")
    arguments = made.parse_args()
    records, partitions = arguments.records, arguments.partitions
    bare: list[Drained] = []
    tuned: list[Drained] = []
    jobs: list[Drained] = []
    with workplace(arguments.brokers) as (brokers, directory):
        names = Names.new()
        with topics(brokers, names, partitions):
            fill(brokers, names.source, records, arguments.keys)
            print(
                f"{records:,} records, {arguments.keys:,} keys, {partitions} partitions, "
                f"{os.cpu_count()} cores shared with the broker"
            )
            for _ in range(arguments.rounds):
                bare.append(measure_bare(brokers, names, partitions, records, {}))
                show("bare loop", bare[-1])
                tuned.append(measure_bare(brokers, names, partitions, records, TUNED))
                show("bare loop, tuned", tuned[-1])
                if arguments.bare_only:
                    continue
                mine = Names.new(names.source)
                with topics(brokers, mine, partitions):
                    drained, coordinator_cpu_s = measure_job(
                        brokers, directory, mine, records, settings_of(arguments)
                    )
                jobs.append(drained)
                show("fcluster", drained, f"   (coordinator: {coordinator_cpu_s:.1f} CPU-s in all)")
    if jobs:
        summarise(bare, tuned, jobs)
    return 0


def summarise(bare: list[Drained], tuned: list[Drained], jobs: list[Drained]) -> None:
    """Print the medians of all rounds, and the ratios. Each ratio is from the figures of one round."""
    print(f"medians of {len(jobs)}:")
    for name, found in (("bare loop", bare), ("bare loop, tuned", tuned), ("fcluster", jobs)):
        show(
            name,
            Drained(
                median([one.rate for one in found]),
                median([one.cpu_s_per_million for one in found]),
                max(one.peak_bytes for one in found),
            ),
        )
    for name, loops in (("the bare loop", bare), ("the tuned one", tuned)):
        ratio = median([job.rate / loop.rate for job, loop in zip(jobs, loops, strict=True)])
        print(f"fcluster / {name}: {ratio:.2f}")


def show(name: str, drained: Drained, more: str = "") -> None:
    """Print one line of figures."""
    print(
        f"  {name:<18} {drained.rate:10,.0f} records/s   {drained.cpu_s_per_million:5.1f} CPU-s per million"
        f"   peak {drained.peak_bytes / 1e6:6,.0f} MB{more}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
