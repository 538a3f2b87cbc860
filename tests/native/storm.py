"""Threads that ask one admin client about topics whose metadata it doesn't have yet.

python -m tests.native.storm BROKERS CLIENT TOPIC_PREFIX SECONDS

`ListOffsets` and `DeleteRecords` of librdkafka look for the leaders in the calling thread. If two calls at
the same time are about a topic that the client doesn't know, they use memory that librdkafka's main thread
has freed. CLIENT is `bare` (confluent_kafka's own) or `ours`. At the end it prints how many rounds succeeded.
A crash shows as the signal that ended the process.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Any

from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from fcluster.common.settings import resolve
from fcluster.kafka import clients as kafka_clients

TOPICS, PARTITIONS, THREADS = 12, 3, 4
TIMEOUT_S = 20


def make_client(kind: str, brokers: str, known_topic: str) -> AdminClient:
    """A connected client that knows no topic except that one."""
    if kind == "bare":
        client = AdminClient({"bootstrap.servers": brokers, "log_level": 0})
    else:
        client = kafka_clients.make_admin(resolve({}, None, {}, {"brokers": brokers}))
    client.list_topics(known_topic, timeout=TIMEOUT_S)
    return client


def await_leaders(client: AdminClient, topics: list[str]) -> None:
    """Wait until new topics have leaders."""
    left = set(topics)
    while left:
        for topic in sorted(left):
            partitions = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
            answers = client.list_offsets(dict.fromkeys(partitions, OffsetSpec.latest()))
            if all(answer.exception(TIMEOUT_S) is None for answer in answers.values()):
                left.remove(topic)


def ask(client: Any, topic: str, number: int, barrier: threading.Barrier) -> None:
    """The request of one thread: three of four ask for offsets, the last one deletes records."""
    partitions = [TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)]
    barrier.wait()
    if number == THREADS - 1:
        answers = client.delete_records(partitions, request_timeout=TIMEOUT_S)
    else:
        spec = OffsetSpec.earliest() if number % 2 else OffsetSpec.latest()
        answers = client.list_offsets(dict.fromkeys(partitions, spec), request_timeout=TIMEOUT_S)
    for answer in answers.values():
        answer.result(TIMEOUT_S)


def main(brokers: str, kind: str, prefix: str, seconds: str) -> None:
    """Ask about one topic after another until the time is over, with all threads at once."""
    topics = [f"{prefix}{number}" for number in range(TOPICS)]
    maker = AdminClient({"bootstrap.servers": brokers})
    for answer in maker.create_topics([NewTopic(topic, PARTITIONS, 1) for topic in topics]).values():
        answer.result(TIMEOUT_S)
    await_leaders(maker, topics)
    rounds, failures, end_s = 0, [], time.monotonic() + float(seconds)

    def run(client: Any, topic: str, number: int, barrier: threading.Barrier) -> None:
        try:
            ask(client, topic, number, barrier)
        except Exception as error:  # noqa: BLE001  (it is told at the end)
            failures.append(repr(error))

    while time.monotonic() < end_s:
        client = make_client(kind, brokers, topics[0])
        for topic in topics[1:]:
            barrier = threading.Barrier(THREADS)
            threads = [
                threading.Thread(target=run, args=(client, topic, number, barrier))
                for number in range(THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rounds += 1
    pauses = getattr(ctypes.CDLL(None), "widen_pauses", int)()
    print(f"rounds={rounds} failures={len(failures)} pauses={pauses} {failures[:3]}", flush=True)
    for answer in maker.delete_topics(topics).values():
        answer.result(TIMEOUT_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
