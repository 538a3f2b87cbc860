"""How fast a job drains a topic, and a bare loop over the same clients.

JSON records over many keys, one output for each input. The bare loop consumes, `orjson.loads`, updates a
dict, `orjson.dumps`, produces: no state on disk, no transactions. It comes with the clients' default settings
and "tuned" with `TUNED`, since librdkafka's default of waiting 1,000 ms when its queue is full holds a fast
loop to about 100,000 records a wait.

A job's time counts from the last look at which there was no output until there is an output of each record
and no transaction is open, so process start, join and restore are outside; the bare loop's from its first
record to its flush.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.figures import Progress, part_rates
from benchmarks.lanes import Lane, Running, Task
from benchmarks.records import Input, encode, key_numbers
from benchmarks.support import Names, Place
from tests.checker.generate import create_topic, plain_producer
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, end_offsets
from tests.harness import cpu_seconds, memory_bytes, wait_until

START_TIMEOUT_S = 300
DRAIN_TIMEOUT_S = 1800
LOOK_S = 0.1
FIRST_LOOK_S = 0.01
PART_RECORDS_MIN = 20_000
"""A part of the records is quick: of fewer than these, the looks say little about its rate."""
TUNED = {"fetch.queue.backoff.ms": 10}


def fill(brokers: str, topic: str, made: Input) -> None:
    """Write the input."""
    producer = plain_producer(brokers)
    for number, key_number in enumerate(key_numbers(made)):
        key = f"k{key_number}"
        value = encode(number, key, 0, made.size_bytes)
        while True:
            try:
                producer.produce(topic, value, key)
                break
            except BufferError:
                producer.poll(0.05)
    if producer.flush(120):
        raise TimeoutError("the input is not written")


# --- a job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time since the processes' start."""

    workers_s: float
    coordinator_s: float
    broker_s: float

    @classmethod
    def of(cls, running: Running, place: Place) -> Usage:
        """Until now."""
        coordinator, broker = running.coordinator, place.broker_pid
        return cls(
            running.cpu_s(),
            0.0 if coordinator is None else cpu_seconds(coordinator),
            0.0 if broker is None else cpu_seconds(broker),
        )


def measure(
    lane: Lane, place: Place, names: Names, task: Task, records: int, split_at: int
) -> dict[str, float]:
    """One drain by a fresh job; its topics exist.

    Args:
        records: in the source.
        split_at: so many of them are the first part.
    """
    with lane.run(place, names, task) as running:

        def count_written() -> int:
            running.assert_alive()
            return sum(end_offsets(place.brokers, [names.output], READ_UNCOMMITTED).values())

        def is_committed() -> bool:
            running.assert_alive()
            return is_all_committed(place.brokers, names.output)

        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            before, progress = Usage.of(running, place), [Progress(time.monotonic(), 0)]
            if written := count_written():
                break
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no output within {START_TIMEOUT_S} s")
            time.sleep(FIRST_LOOK_S)
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        while written < records:
            progress.append(Progress(time.monotonic(), written))
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{written:,} of {records:,} outputs within {DRAIN_TIMEOUT_S} s")
            time.sleep(LOOK_S)
            written = count_written()
        wait_until(is_committed, "the last commit", 60)
        progress.append(Progress(time.monotonic(), records))
        after = Usage.of(running, place)
        figures = {
            "rate": records / (progress[-1].at_s - progress[0].at_s),
            **part_rates(progress, split_at, PART_RECORDS_MIN),
            "cpu_s_per_million": (after.workers_s - before.workers_s) * 1e6 / records,
            "cpu_s": after.workers_s,
            "peak_mb": running.peak_bytes() / 1e6,
        }
        if running.coordinator is not None:
            figures["coordinator_cpu_s"] = after.coordinator_s
            figures["coordinator_peak_mb"] = memory_bytes(running.coordinator, "VmHWM") / 1e6
        if place.broker_pid is not None:
            figures["broker_cpu_s_per_million"] = (after.broker_s - before.broker_s) * 1e6 / records
        return figures


def is_all_committed(brokers: str, topic: str) -> bool:
    """Whether a read_committed reader sees all that is in the topic now. (Kafka Streams' committed offsets
    come with metadata that isn't text, which the client can't return.)"""
    return end_offsets(brokers, [topic], READ_COMMITTED) == end_offsets(brokers, [topic], READ_UNCOMMITTED)


# --- the bare loop ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BareLoop:
    """A yardstick. `config` is added to its consumer's."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])


def bare_loop(
    brokers: str, source: str, output: str, partitions: int, records: int, config: dict[str, Any], answer: Any
) -> None:
    """Runs in a process of its own, so that its CPU time and memory are its own."""
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
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    consumer.close()
    answer.put(
        {"rate": records / wall_s, "cpu_s_per_million": cpu_s * 1e6 / records, "peak_mb": peak_bytes / 1e6}
    )


def measure_bare(
    loop: BareLoop, place: Place, names: Names, partitions: int, records: int
) -> dict[str, float]:
    """One pass of the bare loop into a topic of its own."""
    output = f"{names.job}-bare-{uuid.uuid4().hex[:6]}"
    create_topic(place.brokers, output, partitions)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(
        target=bare_loop,
        args=(place.brokers, names.source, output, partitions, records, dict(loop.config), answer),
        daemon=True,
    )
    process.start()
    try:
        return answer.get(timeout=DRAIN_TIMEOUT_S)
    finally:
        process.kill()
        process.join()
