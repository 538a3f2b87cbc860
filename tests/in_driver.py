"""Runs a job in `fcluster.testing` on the contents of a real broker's topics, for tests that compare both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from confluent_kafka import Message

from fcluster import Job
from fcluster.testing import Driver
from tests.checker.reading import READ_COMMITTED, partitions_of, read_topic

Row = tuple[bytes | None, bytes | None, int, list[tuple[str, bytes | None]]]
"""Key, value, timestamp and headers."""


def rows_on_kafka(brokers: str, topic: str) -> dict[int, list[Row]]:
    """All committed records of a topic, by partition."""

    def row(message: Message) -> Row:
        return message.key(), message.value(), message.timestamp()[1], message.headers() or []  # type: ignore[return-value]

    return read_topic(brokers, topic, READ_COMMITTED, row)


def run_in_driver(job: Job, brokers: str, sources: Iterable[str]) -> Driver:
    """The job, after it has processed the contents of these topics, one partition after another."""
    found = {source: rows_on_kafka(brokers, source) for source in sources}
    counts = {source: len(partitions_of(brokers, source)) for source in found}
    driver = Driver(job, partitions=counts)
    for source, parts in found.items():
        for partition, rows in sorted(parts.items()):
            for key, value, timestamp, headers in rows:
                driver.send_raw(
                    source, value, key=key, timestamp=timestamp, headers=headers, partition=partition
                )
    return driver


def rows_in_driver(driver: Driver, topic: str) -> dict[int, list[Row]]:
    """All committed records of a topic, by partition. Partitions without records are left out."""
    parts: dict[int, list[Row]] = {}
    for record in driver.records(topic):
        row = (record.raw_key, record.raw_value, record.timestamp, record.headers)
        parts.setdefault(record.partition, []).append(row)
    return parts


def by_key(parts: dict[int, list[Row]]) -> dict[Any, list[bytes | None]]:
    """The values of each key, in order."""
    values: dict[Any, list[bytes | None]] = {}
    for _partition, rows in sorted(parts.items()):
        for key, value, *_rest in rows:
            values.setdefault(key, []).append(value)
    return values
