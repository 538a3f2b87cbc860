"""The examples with event time in the simulation: processes crash and stop, messages are lost, and the
results are those that DuckDB computes of the same events.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest

from examples.flights import airports, rotations, weather
from examples.flights.data import read_schedule, read_weather
from examples.flights.recount_sql import Recount as FlightsRecount
from examples.nexmark.recount import QUERIES, Recount
from fcluster import Job
from fcluster.api.loader import load_job
from fcluster.common.settings import Settings
from fcluster.graph.partitioner import partition_of
from tests.nexmark_events import DIRECTORY, UNTIL_MS, Arrivals, in_one_window, side_records
from tests.simulation.jobs import SimJob, Written
from tests.simulation.run import run

SEEDS = (1, 2, 3)
WAITING_SEEDS = (1, 2, 4, 5, 6)
"""With these, a shard waits for an input of which it knows that there is more (`max.task.idle.ms` is not
negative).
"""
PARTITIONS = 2
ROWS = 150
DAY_MS = 86_400_000
Row = dict[str, Any]


pytestmark = pytest.mark.usefixtures("forgets_jobs")


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading a job adds its directory to the import path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for file in DIRECTORY.glob("*.py"):
        sys.modules.pop(file.stem, None)


def written(
    job: Job, given: Sequence[tuple[str, Written]], seed: int, *, there: int = 0, awaits_timers: bool = False
) -> dict[str, list[Row]]:
    """What the job writes to each of its topics, in the order of each partition. The first `there` of what is
    given are there before it starts.
    """
    topology = job.build(Settings())
    read = {source.name for source in topology.sources}
    mine = [one for one in given if one[0] in read]
    played = SimJob(topology, given=mine, there=there, partitions=PARTITIONS, awaits_timers=awaits_timers)
    result = run(seed, job=played)
    assert not result.failure, result.failure
    return {
        topic: [record.data for part in parts for record in part] for topic, parts in result.outputs.items()
    }


# --- Nexmark --------------------------------------------------------------------------------------------


@cache
def arrivals() -> Arrivals:
    return Arrivals(PARTITIONS, count=50, seed=4)


@cache
def recount() -> Recount:
    return arrivals().recount(UNTIL_MS)


def key_in(partition: int) -> bytes:
    """A key of that partition. The queries don't look at the keys of their sources."""
    return next(key for n in range(100) if partition_of(key := b"%d" % n, PARTITIONS) == partition)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("query", QUERIES)
def test_query_of_nexmark_gives_what_duckdb_gives(query: str, seed: int) -> None:
    given = [("nexmark-side-inputs", Written(key, value, 1)) for key, value in side_records()]
    given += [
        (f"nexmark-{kind}", Written(key_in(partition), json.dumps(value).encode(), value["date_time"]))
        for kind, partition, value in arrivals().arrivals
    ]
    job = load_job(str(DIRECTORY / f"q{int(query[1:]):02}.py"))
    by_the_wall_clock = query == "q12"
    rows = written(job, given, seed, awaits_timers=by_the_wall_clock)[f"nexmark-{query}"]
    assert recount().differences(query, in_one_window(rows) if by_the_wall_clock else rows) == []


def test_events_lead_to_results_of_all_queries() -> None:
    assert [query for query in QUERIES if not recount().rows(query)] == []


# --- flights --------------------------------------------------------------------------------------------


@cache
def flights() -> list[Row]:
    return [
        {**flight, "arrived": number, "partition": partition_of(flight["origin"].encode(), PARTITIONS)}
        for number, flight in enumerate(read_schedule(ROWS))
    ]


@cache
def observations() -> list[Row]:
    until_ms = flights()[-1]["scheduled"]
    return [row for row in read_weather() if row["observed"] <= until_ms]


@cache
def flights_recount() -> FlightsRecount:
    return FlightsRecount(flights(), observations())


def line(topic: str, row: Row, at_ms: int) -> tuple[str, Written]:
    return topic, Written(row["origin"].encode(), json.dumps(row).encode(), at_ms)


def in_columns(rows: Sequence[Row], *columns: str) -> list[tuple[Any, ...]]:
    return sorted((tuple(row[name] for name in columns) for row in rows), key=repr)


def as_sorted(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return sorted(rows, key=repr)


@pytest.mark.parametrize("seed", SEEDS)
def test_late_departures_are_those_of_duckdb(seed: int) -> None:
    given = [
        line("departures", flight, flight["departed"])
        for flight in flights()
        if flight["departed"] is not None
    ]
    found = written(airports.job, given, seed)
    columns = ("key", "end", "flights", "delayed", "minutes", "worst")
    # Event time ends with the last departure of each airport, so only hours before it have closed everywhere.
    hours = in_columns(found["airport-hours"], *columns)
    assert hours
    assert set(hours) <= set(flights_recount().hours(flights()[-1]["departed"] + DAY_MS))
    late = in_columns(found["departures-late"], "origin", "departed", "tailnum")
    assert late == as_sorted(flights_recount().late())


@pytest.mark.parametrize("seed", SEEDS)
def test_rotations_of_aircraft_are_those_of_duckdb(seed: int) -> None:
    end_ms = flights()[-1]["scheduled"] + 3 * DAY_MS
    given = [line("schedule", flight, flight["scheduled"]) for flight in flights()]
    for origin in {flight["origin"] for flight in flights()}:
        last = {**flights()[-1], "origin": origin, "tailnum": None, "scheduled": end_ms}
        given.append(line("schedule", last, end_ms))
    found = written(rotations.job, given, seed)["aircraft-rotations"]
    columns = ("key", "start", "end", "flights", "miles", "first", "last")
    assert in_columns(found, *columns) == as_sorted(flights_recount().rotations(end_ms))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_flight_is_written_once_with_the_weather_that_was_there(seed: int) -> None:
    both = [line("weather", row, row["observed"]) for row in observations()]
    both += [line("schedule", flight, flight["scheduled"]) for flight in flights()]
    both.sort(key=lambda one: (one[1].timestamp_ms, one[0] != "weather"))
    found = written(weather.job, both, seed)["flights-weather"]
    columns = ("flight", "origin", "scheduled", "dep_delay")
    expected = [row[: len(columns)] for row in flights_recount().flights_weather()]
    assert in_columns(found, *columns) == as_sorted(expected)
    # Which observation has been read before depends on when the topics are read: they are written meanwhile.
    known = {None, *(row["observed"] for row in observations())}
    assert {row["observed"] for row in found} <= known


@pytest.mark.parametrize("seed", WAITING_SEEDS)
def test_each_flight_meets_the_weather_of_its_time_if_it_is_there(seed: int) -> None:
    both = [line("weather", row, row["observed"]) for row in observations()]
    both += [line("schedule", flight, flight["scheduled"]) for flight in flights()]
    found = written(weather.job, both, seed, there=len(both))["flights-weather"]
    columns = ("flight", "origin", "scheduled", "dep_delay", "observed", "wind_speed", "visib")
    expected = flights_recount().flights_weather()
    assert len({row[4] for row in expected}) > 3, "different observations belong to the flights"
    assert in_columns(found, *columns) == as_sorted(expected)
