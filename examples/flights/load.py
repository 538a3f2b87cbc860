"""Writes the flights to a Kafka topic, keyed by carrier; or the topics of the jobs with event time.

    python examples/flights/load.py --brokers HOST:PORT              # flights: for flights.py
    python examples/flights/load.py --brokers HOST:PORT --by-time    # departures, schedule and weather: for
                                                                     # airports.py, weather.py, rotations.py

Responsible for: the topics and their content, written once. A topic that has all records is left alone. One
that has only some of them (because a load was interrupted) is created again. Records are written by an
idempotent producer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import click
import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.flights.data import FLIGHTS, read_flights, read_schedule, read_weather
from fcluster.common.errors import FclusterError, KafkaUnavailable

TOPIC = "flights"
PARTITIONS = 8
NOW_MS = 0
"""The timestamp that a producer replaces by the present time."""


class Line(NamedTuple):
    """A record: its key, its value, and its timestamp in milliseconds since 1970."""

    key: str
    value: dict[str, Any]
    timestamp_ms: int


def load_flights(brokers: str, console: Console, *, rows: int = FLIGHTS, topic: str = TOPIC) -> int:
    """Make sure that `topic` contains the first `rows` flights, each of them once.

    Returns:
        The number of records written: 0 if they were all there.

    Raises:
        KafkaUnavailable: the brokers can't be reached or refuse the records.
        FlightsMissing: the data files aren't there.
    """
    lines = (Line(flight["carrier"], flight, NOW_MS) for flight in read_flights(rows))
    return _load(brokers, console, topic, lines, rows, PARTITIONS)


def load_by_time(
    brokers: str,
    console: Console,
    *,
    rows: int = FLIGHTS,
    prefix: str = "",
    partitions: int = PARTITIONS,
) -> int:
    """Make sure that the topics `departures`, `schedule` and `weather` contain the first `rows` flights, and
    the weather until the last one, keyed by airport.

    Kafka's timestamps are those of the data, of the year 2013. So the topics keep their records for ever.

    Args:
        brokers, console, rows: as in `load_flights`.
        prefix: the beginning of the topics' names.
        partitions: of each topic.

    Returns, Raises:
        As `load_flights`.
    """
    flights = read_schedule(rows)
    until_ms = flights[-1]["scheduled"]
    topics = {
        "departures": [
            Line(flight["origin"], flight, flight["departed"])
            for flight in flights
            if flight["departed"] is not None
        ],
        "schedule": [Line(flight["origin"], flight, flight["scheduled"]) for flight in flights],
        "weather": [
            Line(row["origin"], row, row["observed"]) for row in read_weather() if row["observed"] <= until_ms
        ],
    }
    return sum(
        _load(brokers, console, f"{prefix}{topic}", lines, len(lines), partitions)
        for topic, lines in topics.items()
    )


def _load(
    brokers: str, console: Console, topic: str, lines: Iterable[Line], count: int, partitions: int
) -> int:
    """Make sure that `topic` contains these `count` lines, each of them once. Returns how many were
    written.
    """
    admin = AdminClient({"bootstrap.servers": brokers})
    present = _records_in(brokers, admin, topic)
    if present == count:
        console.print(f"Topic {topic!r} holds the {count:,} records already.")
        return 0
    if present:
        console.print(f"Topic {topic!r} holds {present:,} of {count:,} records: it is made anew.")
        _delete(admin, topic)
    if present != 0:
        keep = {"retention.ms": "-1"}
        new = NewTopic(topic, num_partitions=partitions, replication_factor=-1, config=keep)
        admin.create_topics([new])[topic].result(30)
    _write(brokers, topic, lines, count, console)
    written = _records_in(brokers, admin, topic)
    if written != count:
        raise FclusterError(
            f"Topic {topic!r} holds {written} records after {count} were written to it.",
            remedy="Something else writes to the topic: stop it, or load into another topic.",
        )
    return count


def _write(brokers: str, topic: str, lines: Iterable[Line], count: int, console: Console) -> None:
    failed: list[KafkaError] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(error)

    producer = Producer(
        {
            "bootstrap.servers": brokers,
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "linger.ms": 20,
            "compression.type": "lz4",
            "queue.buffering.max.messages": 50_000,
            "log_level": 3,  # a broker that has just started answers the first request with "loading"
        }
    )
    with _Bar(console, f"Loading into {topic!r}", count) as bar:
        for line in lines:
            _produce(producer, topic, line, delivered)
            bar.advance()
            if failed:
                break
        producer.flush(60)
    if failed:
        raise KafkaUnavailable(
            f"The records can't be written to {topic!r}: {failed[0].str()}",
            remedy="Look at the broker's log, then run this again.",
        )


def _produce(producer: Producer, topic: str, line: Line, delivered: Any) -> None:
    value = orjson.dumps(line.value)
    while True:
        try:
            producer.produce(
                topic, value, line.key.encode(), timestamp=line.timestamp_ms, on_delivery=delivered
            )
            producer.poll(0)
            return
        except BufferError:
            producer.poll(0.1)


def _records_in(brokers: str, admin: AdminClient, topic: str) -> int | None:
    """The number of records in `topic`; None if there is no such topic."""
    try:
        # This asks for all topics: asking for one by name would create it on brokers with auto-creation.
        known = admin.list_topics(timeout=15).topics
    except KafkaException as error:
        raise KafkaUnavailable(
            f"No Kafka broker answers at {brokers}: {error.args[0].str()}",
            remedy="Start Kafka (`fcluster kafka start` starts an embedded one), or name other brokers.",
        ) from error
    if topic not in known:
        return None
    partitions = known[topic].partitions
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "flights-loader"})
    try:
        marks = [consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=15) for p in partitions]
    finally:
        consumer.close()
    return sum(high - low for low, high in marks)


def _delete(admin: AdminClient, topic: str) -> None:
    admin.delete_topics([topic], operation_timeout=30)[topic].result(30)
    deadline = time.monotonic() + 30
    while topic in admin.list_topics(timeout=15).topics:
        if time.monotonic() > deadline:
            raise KafkaUnavailable(
                f"Topic {topic!r} was deleted but doesn't go away.", remedy="Try again in a minute."
            )
        time.sleep(0.1)


class _Bar:
    """A progress bar on a terminal. Elsewhere, a line at each quarter."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._done = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._task, completed=self._done)
        self._progress.stop()

    def advance(self) -> None:
        self._done += 1
        if self._done % 2000 == 0:
            self._progress.update(self._task, completed=self._done)
        if not self._console.is_terminal and self._done % max(1, self._total // 4) == 0:
            self._console.print(f"{self._title}: {self._done:,} of {self._total:,}")


@click.command()
@click.option("--brokers", required=True, help="Bootstrap servers, HOST:PORT.")
@click.option("--rows", default=FLIGHTS, show_default=True, help="How many flights, from the first on.")
@click.option("--topic", default=TOPIC, show_default=True)
@click.option("--by-time", is_flag=True, help="Write departures, schedule and weather instead.")
def main(brokers: str, rows: int, topic: str, by_time: bool) -> None:
    """Write the flights of 2013 to a Kafka topic."""
    console = Console()
    try:
        if by_time:
            load_by_time(brokers, console, rows=rows)
        else:
            load_flights(brokers, console, rows=rows, topic=topic)
    except FclusterError as error:
        console.print(error.message, error.remedy, sep="\n", style="red")
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
