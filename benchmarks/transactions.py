"""What the client library takes for the transaction of an epoch, beside Java's client: the floor of latency.

    python -m benchmarks.transactions [--rounds 3] [--partitions 4] [--records 20] [--interval-ms 15]

A transaction writes records to all partitions of an output topic, one to each partition of a changelog, and
the offsets of as many source partitions, as an epoch of a worker does. There is no job: what is measured is
the client library and the broker, from beginning the transaction until the commit is acknowledged. Java's
client, which Kafka Streams uses, does the same in turn, and so does the client library with the partitions
split between two processes, as two workers have them. Java needs a JDK, and Maven once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks import peers
from benchmarks.support import compile_fully
from fcluster.kafka.embedded import EmbeddedKafka
from fcluster.kafka.jars import find_java
from tests.checker.generate import create_topic
from tests.harness import cpu_seconds

WARM_UP = 300
"""Transactions that aren't measured: Java's compiler is at work, and so it is in the broker."""
TIMEOUT_S = 30.0
JAVA = Path(__file__).parent / "kafka_client" / "Transactions.java"


def main() -> int:
    """Run and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--partitions", type=int, default=4)
    made.add_argument("--records", type=int, default=20, help="Of a transaction.")
    made.add_argument("--interval-ms", type=float, default=15.0, help="From one transaction to the next.")
    made.add_argument("--transactions", type=int, default=600, help="Measured in each round.")
    made.add_argument("--as-part", nargs=4, help=argparse.SUPPRESS)  # brokers, name, partitions, records
    arguments = made.parse_args()
    if arguments.as_part:
        brokers, name, partitions, records = arguments.as_part
        took = run(brokers, name, [*map(int, partitions.split(","))], int(records), arguments)
        print(json.dumps(took))
        return 0
    with tempfile.TemporaryDirectory(prefix="fcluster-bench-") as directory:
        compile_fully()
        broker = EmbeddedKafka(Path(directory) / "kafka")
        brokers = broker.start()
        try:
            return compare(brokers, broker.pid, arguments)
        finally:
            broker.stop()


def compare(brokers: str, broker_pid: int, arguments: argparse.Namespace) -> int:
    """All lanes in turn, and a table of medians over the rounds. The first round only warms the broker up."""
    partitions = [*range(arguments.partitions)]
    half = len(partitions) // 2
    lanes = {
        "librdkafka": lambda name: [part(brokers, name, partitions, arguments.records, arguments)],
        "librdkafka, two processes": lambda name: [
            part(brokers, f"{name}-{index}", share, arguments.records // 2, arguments, topics=name)
            for index, share in enumerate((partitions[:half], partitions[half:]))
        ],
        "Java's client": lambda name: [java(brokers, name, arguments)],
    }
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in lanes}
    for number in range(arguments.rounds + 1):
        for lane in list(lanes) if number % 2 else list(lanes)[::-1]:
            name = f"transactions-{uuid.uuid4().hex[:8]}"
            for topic in (source_of(name), outputs_of(name), changelog_of(name)):
                create_topic(brokers, topic, len(partitions))
            before_s = cpu_seconds(broker_pid)
            running = lanes[lane](name)
            took: list[float] = []
            for process in running:
                written, _ = process.communicate(timeout=300)
                if process.returncode:
                    raise SystemExit(f"{lane} failed")
                took += json.loads(written)
            transactions = WARM_UP + arguments.transactions
            broker_ms = (cpu_seconds(broker_pid) - before_s) * 1000 / transactions
            quantiles = statistics.quantiles(took, n=100)
            if number:
                figures[lane].append((statistics.median(took), quantiles[98], broker_ms))
    print(f"{len(partitions)} partitions, {arguments.records} records in a transaction; medians of rounds")
    print(f"{'':<28}{'median ms':>12}{'p99 ms':>12}{'broker CPU ms each':>22}")
    for lane, rounds in figures.items():
        median, p99, broker_ms = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{lane:<28}{median:>12.2f}{p99:>12.2f}{broker_ms:>22.2f}")
    return 0


def source_of(name: str) -> str:
    """The topic whose offsets are committed."""
    return f"{name}-in"


def outputs_of(name: str) -> str:
    """The topic of outputs."""
    return f"{name}-out"


def changelog_of(name: str) -> str:
    """The topic of deltas."""
    return f"{name}-changelog"


def part(
    brokers: str,
    name: str,
    partitions: Sequence[int],
    records: int,
    arguments: argparse.Namespace,
    topics: str = "",
) -> subprocess.Popen[str]:
    """This module as a process of its own, with some of the partitions."""
    command = [sys.executable, "-m", "benchmarks.transactions", "--interval-ms", str(arguments.interval_ms)]
    command += ["--transactions", str(arguments.transactions)]
    names = f"{name}/{topics or name}"
    command += ["--as-part", brokers, names, ",".join(map(str, partitions)), str(records)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def java(brokers: str, name: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """The same by Java's client."""
    command = [str(find_java()), "-cp", f"{peers.resolve()}{os.sep}*", str(JAVA), brokers, name]
    command += [source_of(name), outputs_of(name), changelog_of(name)]
    for number in (arguments.partitions, arguments.records, arguments.interval_ms):
        command.append(str(number))
    command += [str(WARM_UP), str(arguments.transactions)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def run(
    brokers: str, names: str, partitions: Sequence[int], records: int, arguments: argparse.Namespace
) -> list[float]:
    """Milliseconds of each transaction, as a worker does them: what waits is sent at once, then the offsets
    follow, then the commit.
    """
    name, topics = names.split("/")
    config: dict[str, str | int] = {
        "bootstrap.servers": brokers,
        "transactional.id": name,
        "linger.ms": 10_000,
    }
    producer = Producer(config)
    producer.init_transactions(TIMEOUT_S)
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": topics})
    group = consumer.consumer_group_metadata()
    outputs, changelog, source = outputs_of(topics), changelog_of(topics), source_of(topics)
    value = bytes(100)
    took_ms: list[float] = []
    due_s = time.monotonic()
    for number in range(WARM_UP + arguments.transactions):
        due_s += arguments.interval_ms / 1000
        time.sleep(max(0.0, due_s - time.monotonic()))
        begun_s = time.monotonic()
        producer.begin_transaction()
        for record in range(records):
            producer.produce(outputs, value, partition=partitions[record % len(partitions)])
        for partition in partitions:
            producer.produce(changelog, value, partition=partition)
        producer.flush(0.001)  # the threads notice that they should send
        offsets = [TopicPartition(source, partition, number) for partition in partitions]
        producer.send_offsets_to_transaction(offsets, group, TIMEOUT_S)
        producer.commit_transaction(TIMEOUT_S)
        took_ms.append((time.monotonic() - begun_s) * 1000)
    consumer.close()
    return took_ms[WARM_UP:]


if __name__ == "__main__":
    sys.exit(main())
