"""The demo's recount: it agrees with lines that were counted by hand, and finds each kind of wrong total."""

from __future__ import annotations

from typing import Any

import pytest

from examples.flights.recount import differences, recount


def line(
    carrier: str, tailnum: str, departure: str, arrival: str, air_time: str, miles: str
) -> dict[str, str]:
    return {
        "carrier": carrier,
        "tailnum": tailnum,
        "dep_delay": departure,
        "arr_delay": arrival,
        "air_time": air_time,
        "distance": miles,
    }


LINES = [
    line("UA", "N1", "5", "-3", "60", "400"),
    line("UA", "N1", "7", "20", "61", "400"),
    line("DL", "N1", "0", "NA", "NA", "900"),
    line("UA", "NA", "NA", "NA", "NA", "500"),
]
CARRIERS = {
    "UA": {
        "carrier": "UA",
        "flights": 3,
        "cancelled": 1,
        "departure_delay": 12,
        "arrived": 2,
        "arrival_delay": 17,
        "worst_delay": 20,
    },
    "DL": {"carrier": "DL", "flights": 1, "departure_delay": 0},
}
AIRCRAFT = {
    "N1": {"tailnum": "N1", "flights": 3, "miles": 1700, "minutes": 121, "carriers": {"UA": 2, "DL": 1}}
}


def outputs_of(expected: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        key: [{**totals, "flights": number} for number in range(1, totals["flights"] + 1)]
        for key, totals in expected.items()
    }


def test_lines_with_missing_values_are_counted_correctly() -> None:
    assert recount(LINES) == (CARRIERS, AIRCRAFT)


def test_totals_equal_to_the_recount_show_no_difference() -> None:
    assert differences("carrier", CARRIERS, outputs_of(CARRIERS)) == []
    assert differences("aircraft", AIRCRAFT, outputs_of(AIRCRAFT)) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lost", "2 results for 3 flights"),
        ("twice", "4 results for 3 flights"),
        ("swapped", "isn't 1, 2, 3"),
        ("wrong", "the job says"),
        ("missing", "0 results for 1 flights"),
        ("extra", "XX: is not in the CSV"),
    ],
)
def test_totals_that_differ_from_the_recount_are_named(fault: str, message: str) -> None:
    outputs = outputs_of(CARRIERS)
    ua = outputs["UA"]
    if fault == "lost":
        del ua[1]
    elif fault == "twice":
        ua.insert(1, ua[1])
    elif fault == "swapped":
        ua[0], ua[1] = ua[1], ua[0]
    elif fault == "wrong":
        ua[-1] = {**ua[-1], "arrival_delay": 16}
    elif fault == "missing":
        del outputs["DL"]
    else:
        outputs["XX"] = [{"carrier": "XX", "flights": 1}]
    assert any(message in found for found in differences("carrier", CARRIERS, outputs))
