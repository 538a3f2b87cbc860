"""The examples with event time over the flights of the first days of 2013, compared with DuckDB."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from examples.flights import airports, rotations, weather
from examples.flights.data import read_schedule, read_weather
from examples.flights.recount_sql import Recount
from fcluster.graph.partitioner import partition_of
from fcluster.testing import Driver

ROWS = 1_500
PARTITIONS = 2
DAY_MS = 86_400_000


@cache
def flights() -> list[dict[str, Any]]:
    """In the order in which they are sent, with the partition of their airport."""
    return [
        {**flight, "arrived": number, "partition": partition_of(flight["origin"].encode(), PARTITIONS)}
        for number, flight in enumerate(read_schedule(ROWS))
    ]


@cache
def observations() -> list[dict[str, Any]]:
    until_ms = flights()[-1]["scheduled"]
    return [row for row in read_weather() if row["observed"] <= until_ms]


@cache
def recount() -> Recount:
    return Recount(flights(), observations())


def in_columns(rows: list[dict[str, Any]], *columns: str) -> list[tuple[Any, ...]]:
    return sorted((tuple(row[name] for name in columns) for row in rows), key=repr)


def as_before(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return sorted(rows, key=repr)


def send(driver: Driver, topic: Any, rows: list[dict[str, Any]], crash_every: int) -> None:
    for number, row in enumerate(rows, start=1):
        driver.send(topic, row, key=row["origin"])
        if crash_every and number % crash_every == 0:
            driver.crash() if number % 2 else driver.barrier()
    driver.settle()


@pytest.mark.parametrize("crash_every", [0, 97])
def test_hours_and_late_departures_are_those_of_duckdb(crash_every: int) -> None:
    departed = [flight for flight in flights() if flight["departed"] is not None]
    with Driver(airports.job, partitions=PARTITIONS, auto_barrier=not crash_every) as driver:
        send(driver, airports.departures, departed, crash_every)
        until_ms = max(flight["departed"] for flight in departed) + DAY_MS
        driver.advance(to_ms=until_ms, clock="event")
        driver.settle()
        hours, late = driver.read_values(airports.hours), driver.read_values(airports.late)
    expected = recount().hours(until_ms)
    assert len(expected) > 40
    columns = ("key", "end", "flights", "delayed", "minutes", "worst")
    assert in_columns(hours, *columns) == as_before(expected)
    assert len(recount().late()) > 5
    assert in_columns(late, "origin", "departed", "tailnum") == as_before(recount().late())


@pytest.mark.parametrize("crash_every", [0, 97])
def test_flights_meet_the_weather_of_their_time(crash_every: int) -> None:
    both = [("weather", row["observed"], row) for row in observations()]
    both += [("schedule", row["scheduled"], row) for row in flights()]
    # Of the same time, the weather comes first.
    both.sort(key=lambda one: (one[1], one[0] != "weather"))
    with Driver(weather.job, partitions=PARTITIONS, auto_barrier=not crash_every) as driver:
        for number, (topic, timestamp, row) in enumerate(both, start=1):
            driver.send(topic, row, key=row["origin"], timestamp=timestamp)
            if crash_every and number % crash_every == 0:
                driver.crash() if number % 2 else driver.barrier()
        driver.settle()
        found = driver.read_values(weather.flights_weather)
    columns = ("flight", "origin", "scheduled", "dep_delay", "observed", "wind_speed", "visib")
    assert in_columns(found, *columns) == as_before(recount().flights_weather())
    assert len(found) == ROWS


@pytest.mark.parametrize("crash_every", [0, 97])
def test_rotations_of_aircraft_are_those_of_duckdb(crash_every: int) -> None:
    with Driver(rotations.job, partitions=PARTITIONS, auto_barrier=not crash_every) as driver:
        send(driver, rotations.schedule, flights(), crash_every)
        until_ms = flights()[-1]["scheduled"] + 2 * DAY_MS
        driver.advance(to_ms=until_ms, clock="event")
        driver.settle()
        found = driver.read_values(rotations.rotations)
    expected = recount().rotations(until_ms)
    assert len(expected) > 300
    columns = ("key", "start", "end", "flights", "miles", "first", "last")
    assert in_columns(found, *columns) == as_before(expected)


def changed(flight: dict[str, Any], **changes: Callable[[Any], Any]) -> dict[str, Any]:
    return flight | {name: change(flight[name]) for name, change in changes.items()}


def test_duckdb_finds_a_wrong_time_delay_or_observation() -> None:
    later = [changed(flight, scheduled=lambda at: at + 3_600_000) for flight in flights()]
    windier = [changed(row, wind_speed=lambda speed: (speed or 0) + 1) for row in observations()]
    wrong = Recount(later, windier)
    until_ms = flights()[-1]["scheduled"] + 2 * DAY_MS
    assert wrong.rotations(until_ms) != recount().rotations(until_ms)
    assert wrong.flights_weather() != recount().flights_weather()
    slower = [changed(one, dep_delay=lambda minutes: minutes and minutes + 1) for one in flights()]
    assert Recount(slower, []).hours(until_ms) != recount().hours(until_ms)
