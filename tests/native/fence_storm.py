"""Producers that are fenced during a transaction, and destroyed with or without serving their reports.

python -m tests.native.fence_storm BROKERS MODE ID_PREFIX SECONDS [THREADS]

Each thread begins a transaction, produces, lets another producer with the same transactional id take over,
continues to produce until it is refused, and drops the producer. MODE is `dropped` (nothing is served before)
or `served` (reports are served first, as in fcluster). At the end it prints how many rounds succeeded. Run it
under `valgrind`, `MALLOC_PERTURB_` or `widen.c` to see what the native code does (decision 0073).
"""

from __future__ import annotations

import sys
import threading
import time

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from fcluster.kafka.clients import serve_rest

TIMEOUT_S = 30
RECORDS = 50
"""How many records are written before the fence. After it, records are written until it is noticed."""


def begin(brokers: str, transactional_id: str) -> Producer:
    """A producer that now has the id."""
    config = {
        "bootstrap.servers": brokers,
        "transactional.id": transactional_id,
        "linger.ms": 0,
        "log_level": 0,
    }
    producer = Producer(config)
    producer.init_transactions(TIMEOUT_S)
    producer.begin_transaction()
    return producer


def one_round(brokers: str, topic: str, transactional_id: str, mode: str) -> bool:
    """Write until the producer is refused. Returns whether that happened in time."""
    producer = begin(brokers, transactional_id)

    def write() -> None:
        producer.produce(
            topic, b"value", b"key", headers={"h": b"1"}, on_delivery=lambda _error, _record: None
        )

    for _ in range(RECORDS):
        write()
    successor = begin(brokers, transactional_id)
    successor.abort_transaction(TIMEOUT_S)
    refused, end_s = False, time.monotonic() + TIMEOUT_S
    while not refused and time.monotonic() < end_s:
        try:
            write()
            time.sleep(0.001)
        except BufferError:
            time.sleep(0.01)
        except KafkaException:
            refused = True
    if mode == "served":
        serve_rest(producer)
        serve_rest(successor)
    return refused


def main(brokers: str, mode: str, prefix: str, seconds: str, threads: str = "6") -> None:
    """Play rounds in all threads until the time is over."""
    topic, counts = f"{prefix}topic", {"rounds": 0, "refused": 0, "failures": 0}
    maker = AdminClient({"bootstrap.servers": brokers})
    for answer in maker.create_topics([NewTopic(topic, 3, 1)]).values():
        answer.result(TIMEOUT_S)
    end_s = time.monotonic() + float(seconds)

    def run(number: int) -> None:
        while time.monotonic() < end_s:
            try:
                counts["refused"] += one_round(brokers, topic, f"{prefix}{number}", mode)
                counts["rounds"] += 1
            except KafkaException:
                counts["failures"] += 1

    running = [threading.Thread(target=run, args=(number,)) for number in range(int(threads))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for answer in maker.delete_topics([topic]).values():
        answer.result(TIMEOUT_S)
    print(" ".join(f"{name}={count}" for name, count in counts.items()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
