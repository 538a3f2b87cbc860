"""The examples with event time on a real broker: a worker is killed in between, and the results are those
that DuckDB computes of the same events.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer
from rich.console import Console

from examples.flights.data import read_schedule, read_weather
from examples.flights.load import load_by_time
from examples.flights.recount_sql import Recount
from examples.nexmark.recount import QUERIES
from fcluster.graph.partitioner import partition_of
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, committed_offsets, end_offsets
from tests.harness import REPOSITORY, Up
from tests.in_driver import rows_on_kafka
from tests.nexmark_events import DIRECTORY as NEXMARK
from tests.nexmark_events import KINDS, Arrivals, in_one_window, side_records

pytestmark = pytest.mark.timeout(420)

FLIGHTS = REPOSITORY / "examples" / "flights"
ROWS = 600
PARTITIONS = 2
FOREVER_MS = 2**52
PAUSE_S = 0.02
SETTINGS = ("--set", "commit.interval.max.ms=100", "--set", "initial.rebalance.delay.ms=0")
BY_THE_WALL_CLOCK = "q12"
"""The query that isn't done when a bounded run is: its timers stay set."""


def slowed(text: str, killed: Path) -> str:
    """A job file in which each record that is read takes some time until the file `killed` exists. So the job
    is busy when its worker is killed, however slow this process is.
    """
    pause = f"__import__('time').sleep({PAUSE_S} * (not __import__('os').path.exists({str(killed)!r})))"
    changed = re.sub(r"job\.stream\(\w+\)", lambda found: f"{found[0]}.peek(lambda _value: {pause})", text)
    assert changed != text
    return changed


@contextmanager
def up_with_a_kill(
    job_file: Path,
    job: str,
    sources: Iterable[str],
    brokers: str,
    data: Path,
    *options: str,
    env: dict[str, str] | None = None,
) -> Iterator[Up]:
    """Run the job. A worker is killed when it has committed some records, but not all of them. Then there is
    a file `killed` in the directory of the job file.
    """
    total = sum(end_offsets(brokers, sources, READ_COMMITTED).values())
    options = ("--start", "earliest", "--plain", *SETTINGS, *options)
    with Up(job_file, brokers, data, *options, workers=2, env=env) as up:

        def processed() -> int:
            offsets = committed_offsets(brokers, job)
            return sum(offset for (topic, _), offset in offsets.items() if topic in set(sources))

        done = up.wait_until(processed, "the first records are committed", 120)
        os.kill(up.pid("worker-1"), signal.SIGKILL)
        assert done < total, "the worker was killed too late"
        (job_file.parent / "killed").touch()
        yield up


def run_with_a_kill(
    job_file: Path,
    job: str,
    sources: Iterable[str],
    brokers: str,
    data: Path,
    env: dict[str, str] | None = None,
) -> None:
    """Run the job to the end of its topics, see `up_with_a_kill`."""
    with up_with_a_kill(job_file, job, sources, brokers, data, "--end", "end", env=env) as up:
        ended = up.wait(200)
    assert ended.code == 0, ended.text


def values_in(brokers: str, topic: str) -> list[dict[str, Any]]:
    """The values of a topic, in the order of each key."""
    rows = rows_on_kafka(brokers, topic)
    return [orjson.loads(row[1] or b"") for part in rows.values() for row in part]


def in_columns(rows: list[dict[str, Any]], *columns: str) -> list[tuple[Any, ...]]:
    return sorted((tuple(row[name] for name in columns) for row in rows), key=repr)


def test_flights_jobs_give_what_duckdb_gives_although_workers_are_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    flights = [
        {**flight, "arrived": number, "partition": partition_of(flight["origin"].encode(), PARTITIONS)}
        for number, flight in enumerate(read_schedule(ROWS))
    ]
    weather = [row for row in read_weather() if row["observed"] <= flights[-1]["scheduled"]]
    recount = Recount(flights, weather)
    quiet = Console(quiet=True)
    loaded = load_by_time(kafka, quiet, rows=ROWS, prefix=topic_prefix, partitions=PARTITIONS)
    departed = sum(flight["departed"] is not None for flight in flights)
    assert loaded == departed + ROWS + len(weather)
    assert load_by_time(kafka, quiet, rows=ROWS, prefix=topic_prefix, partitions=PARTITIONS) == 0

    for name, job, source in (
        ("airports", "airport-delays", "departures"),
        ("weather", "flights-weather", "schedule"),
        ("rotations", "aircraft-rotations", "schedule"),
    ):
        text = (FLIGHTS / f"{name}.py").read_text()
        file = tmp_path / name / f"{name}.py"
        file.parent.mkdir()
        text = re.sub(r'(Job|topic)\("', rf"\g<0>{topic_prefix}", text)
        file.write_text(slowed(text, file.parent / "killed"))
        job, source = f"{topic_prefix}{job}", f"{topic_prefix}{source}"
        run_with_a_kill(file, job, [source], kafka, tmp_path / f"data-{name}")

    def written(topic: str, *columns: str) -> list[tuple[Any, ...]]:
        return in_columns(values_in(kafka, f"{topic_prefix}{topic}"), *columns)

    def expected(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        assert rows
        return sorted(rows, key=repr)

    hours = written("airport-hours", "key", "end", "flights", "delayed", "minutes", "worst")
    assert hours == expected(recount.hours(FOREVER_MS))
    assert written("departures-late", "origin", "departed", "tailnum") == expected(recount.late())
    columns = ("flight", "origin", "scheduled", "dep_delay", "observed", "wind_speed", "visib")
    assert written("flights-weather", *columns) == expected(recount.flights_weather())
    columns = ("key", "start", "end", "flights", "miles", "first", "last")
    assert written("aircraft-rotations", *columns) == expected(recount.rotations(FOREVER_MS))


def write_events(brokers: str, prefix: str, arrivals: Arrivals) -> None:
    """The events of Nexmark and the table of q13, in topics that begin with `prefix`."""
    for kind in KINDS:
        create_topic(brokers, f"{prefix}{kind}", PARTITIONS)
    create_topic(brokers, f"{prefix}side-inputs", PARTITIONS, {"cleanup.policy": "compact"})
    producer = Producer({"bootstrap.servers": brokers, "partitioner": "murmur2_random", "linger.ms": 20})
    for key, value in side_records():
        producer.produce(f"{prefix}side-inputs", value, key, timestamp=1)
    for kind, partition, value in arrivals.arrivals:
        producer.produce(f"{prefix}{kind}", orjson.dumps(value), partition=partition)
    assert producer.flush(60) == 0


def nexmark_job(prefix: str, directory: Path, queries: Iterable[str]) -> tuple[Path, dict[str, str]]:
    """A copy of the jobs in which bids take their time, see `slowed`: the job file and its environment."""
    jobs = directory / "nexmark"
    shutil.copytree(NEXMARK, jobs)
    site = jobs / "auction_site.py"
    site.write_text(slowed(site.read_text(), jobs / "killed"))
    env = {"NEXMARK_PREFIX": prefix, "NEXMARK_JOB": f"{prefix}job", "NEXMARK_QUERIES": ",".join(queries)}
    return jobs / "together.py", env


def test_queries_of_nexmark_give_what_duckdb_gives_although_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    arrivals = Arrivals(PARTITIONS, count=200, seed=2)
    write_events(kafka, topic_prefix, arrivals)
    queries = [query for query in QUERIES if query != BY_THE_WALL_CLOCK]
    job_file, env = nexmark_job(topic_prefix, tmp_path, queries)
    sources = [f"{topic_prefix}{kind}" for kind in KINDS]
    run_with_a_kill(job_file, f"{topic_prefix}job", sources, kafka, tmp_path / "data", env)
    recount = arrivals.recount(FOREVER_MS)
    for query in queries:
        rows = values_in(kafka, f"{topic_prefix}{query}")
        assert rows, query
        assert recount.differences(query, rows) == []


def test_windows_of_the_wall_clock_have_each_bid_once_although_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    arrivals = Arrivals(PARTITIONS, count=50)
    write_events(kafka, topic_prefix, arrivals)
    job_file, env = nexmark_job(topic_prefix, tmp_path, [BY_THE_WALL_CLOCK])
    windows = job_file.with_name("q12.py")
    text = windows.read_text()
    assert "seconds(10)" in text
    windows.write_text(text.replace("seconds(10)", "seconds(0.5)"))  # so that the last windows are over soon
    bids = sum(kind == "bids" for kind, _, _ in arrivals.arrivals)
    job, sources = f"{topic_prefix}job", [f"{topic_prefix}bids"]

    def counted() -> list[dict[str, Any]]:
        return values_in(kafka, f"{topic_prefix}{BY_THE_WALL_CLOCK}")

    with up_with_a_kill(job_file, job, sources, kafka, tmp_path / "data", env=env) as up:
        up.wait_until(lambda: sum(row["bids"] for row in counted()) >= bids, "all bids are counted", 120)
        up.interrupt()
        ended = up.wait(60)
    assert ended.code == 0, ended.text
    rows = counted()
    assert arrivals.recount().differences(BY_THE_WALL_CLOCK, in_one_window(rows)) == []
    assert len({(row["bidder"], row["end"]) for row in rows}) == len(rows), "a window has one result"
