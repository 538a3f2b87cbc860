"""The example with windows, in the driver: crashes don't change what it writes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from examples.meters.meters import hours, job, late, quarters, readings
from examples.meters.recount import QUARTER_MS, Reading, recount_hours, recount_quarters
from fcluster.testing import Driver
from fcluster.testing.driver import START_MS


def plan(count: int, delays_ms: tuple[int, ...]) -> list[Reading]:
    chance = random.Random(5)
    found: list[Reading] = []
    for number in range(count):
        meter = chance.randrange(12)
        value: dict[str, Any] = {
            "meter": f"m{meter}",
            "district": f"d{meter % 3}",
            "wh": chance.randrange(50) * 1_000 + number,
        }
        found.append((f"m{meter}", value, START_MS + number * 45_000 - chance.choice(delays_ms)))
    return found


def send(driver: Driver, given: list[Reading], crash_every: int) -> None:
    for number, (meter, reading, at_ms) in enumerate(given, start=1):
        driver.send(readings, reading, key=meter, timestamp=at_ms)
        if crash_every and number % crash_every == 0:
            driver.crash()


@pytest.mark.parametrize("crash_every", [0, 23])
def test_quarters_and_late_readings_equal_the_recount(crash_every: int) -> None:
    given = plan(400, (0, 0, 5_000, 200_000))
    expected, expected_late = recount_quarters(given)
    assert len(expected) > 150
    assert len(expected_late) > 5
    with Driver(job, partitions=1) as driver:
        send(driver, given, crash_every)
        assert driver.read_values(quarters) == expected
        assert driver.read_values(late) == expected_late


@pytest.mark.parametrize("crash_every", [0, 23])
def test_hours_of_districts_equal_the_recount(crash_every: int) -> None:
    given = plan(300, (0, 0, 10_000))
    with Driver(job, partitions=3) as driver:
        send(driver, given, crash_every)
        driver.advance(by_ms=QUARTER_MS, clock="event")
        driver.settle()
        until_ms = min(at for at in driver.event_times("district-hour").values() if at is not None)
        rows = driver.read_values(hours)
        assert driver.late == 0
    used = {(row["key"], row["end"]): row["wh"] for row in rows}
    assert used == recount_hours(given, until_ms)
    assert len(used) == len(rows) > 30
    assert all(len(row["most"]) == 2 for row in rows[6:-6])
