"""The example job, tested as a user would test it."""

from __future__ import annotations

from examples.flights.flights import aircraft_totals, carrier_totals, flights, job
from fcluster.testing import Driver

FLIGHT = {"tailnum": "N1", "carrier": "AA", "dep_delay": 5, "arr_delay": -3, "distance": 100, "air_time": 20}


def test_flights_are_counted_by_carrier_and_by_aircraft() -> None:
    with Driver(job) as driver:
        driver.send(flights, FLIGHT, key="AA")
        driver.send(flights, FLIGHT | {"dep_delay": None, "arr_delay": None, "air_time": None}, key="AA")
        driver.send(flights, FLIGHT | {"carrier": "UA", "arr_delay": 8}, key="UA")
        assert driver.read_values(carrier_totals)[1:] == [
            {
                "carrier": "AA",
                "flights": 2,
                "departure_delay": 5,
                "arrived": 1,
                "arrival_delay": -3,
                "worst_delay": -3,
                "cancelled": 1,
            },
            {
                "carrier": "UA",
                "flights": 1,
                "departure_delay": 5,
                "arrived": 1,
                "arrival_delay": 8,
                "worst_delay": 8,
            },
        ]
        assert driver.state("aircraft", "N1") == {
            "flights": 3,
            "miles": 300,
            "minutes": 40,
            "carriers": {"AA": 2, "UA": 1},
        }


def test_flight_without_an_aircraft_is_counted_for_its_carrier_only() -> None:
    with Driver(job) as driver:
        driver.send(flights, FLIGHT | {"tailnum": None}, key="AA")
        assert len(driver.read(carrier_totals)) == 1
        assert driver.read(aircraft_totals) == []
