"""A bare loop with exactly-once, by the client library alone: what fcluster's latency is compared with.

    python -m benchmarks.bare_transactions BROKERS NAME SOURCE OUTPUT CHANGELOG PARTITIONS

It consumes, decodes, encodes and produces, and every 10 ms it commits a transaction: the outputs, a record
for the changelog of each partition that something was read from, and the offsets. It keeps no state, and
knows no other process, no failure and no end. So its latency is what the client library, the broker and the
interval take, whatever is built on them. As in a worker, two producers take turns, since a broker refuses a
producer's next transaction until it has written the markers of the one before.
"""

from __future__ import annotations

import sys
import time

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition

from fcluster.worker.consuming import BATCH_RECORDS_MAX, GATHERING_FETCH
from fcluster.worker.sending import nudge

INTERVAL_S = 0.01
TIMEOUT_S = 30.0
DELTA = bytes(200)


def main() -> None:
    """Run until it is killed."""
    brokers, name, source, output, changelog, count = sys.argv[1:]
    producers: list[Producer] = []
    for number in range(2):
        config: dict[str, str | int] = {
            "bootstrap.servers": brokers,
            "transactional.id": f"{name}-{number}",
            "partitioner": "murmur2_random",
            "linger.ms": 10_000,
        }
        producers.append(Producer(config))
        producers[-1].init_transactions(TIMEOUT_S)
    config = {"bootstrap.servers": brokers, "group.id": name, "enable.auto.commit": False}
    consumer = Consumer(config | GATHERING_FETCH)
    consumer.assign([TopicPartition(source, partition, 0) for partition in range(int(count))])
    group = consumer.consumer_group_metadata()
    positions: dict[int, int] = {}
    committed_s = 0.0
    producer, other = producers
    while True:
        first = consumer.poll(0.003 if positions else 0.05)
        for message in (first, *consumer.consume(BATCH_RECORDS_MAX, 0)) if first is not None else ():
            value, partition, offset = message.value(), message.partition(), message.offset()
            if message.error() is not None or value is None or partition is None or offset is None:
                continue
            if not positions:
                producer.begin_transaction()
            record = orjson.loads(value)
            result = {"id": record["id"], "key": record["key"], "count": 1, "sum": 1, "at": record["at"]}
            producer.produce(output, orjson.dumps(result), message.key())
            positions[partition] = offset + 1
        if positions and time.monotonic() - committed_s >= INTERVAL_S:
            committed_s = time.monotonic()
            for partition in positions:
                producer.produce(changelog, DELTA, partition=partition)
            nudge(producer)
            offsets = [TopicPartition(source, partition, offset) for partition, offset in positions.items()]
            producer.send_offsets_to_transaction(offsets, group, TIMEOUT_S)
            producer.commit_transaction(TIMEOUT_S)
            positions.clear()
            producer, other = other, producer


if __name__ == "__main__":
    main()
