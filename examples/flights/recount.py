"""The independent recount: what the job's totals must be, straight from the CSV.

Responsible for: final totals by carrier and by aircraft, and comparing them with what the job wrote. It is
pure except for reading the CSV. It shares no code with the job, and doesn't use the loader's typed records.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from examples.flights.data import flight_lines

Totals = dict[str, Any]
DIFFERENCES_SHOWN_MAX = 20


def recount(lines: Iterable[Mapping[str, str]]) -> tuple[dict[str, Totals], dict[str, Totals]]:
    """The totals by carrier and by tail number, from lines of flights.csv."""
    by_carrier: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    by_aircraft: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for line in lines:
        by_carrier[line["carrier"]].append(line)
        if line["tailnum"] != "NA":
            by_aircraft[line["tailnum"]].append(line)
    return (
        {carrier: {"carrier": carrier, **_carrier_totals(of)} for carrier, of in by_carrier.items()},
        {tailnum: {"tailnum": tailnum, **_aircraft_totals(of)} for tailnum, of in by_aircraft.items()},
    )


def recount_csv(rows: int) -> tuple[dict[str, Totals], dict[str, Totals]]:
    """The totals of the first `rows` flights."""
    return recount(islice(flight_lines(), rows))


def differences(
    what: str, expected: Mapping[str, Totals], outputs: Mapping[str, Sequence[Totals]]
) -> list[str]:
    """Where the job's output differs from what it must be. Empty if it doesn't.

    Args:
        what: "carrier" or "aircraft", for the messages.
        expected: the final totals of each key.
        outputs: everything the job wrote for each key, in order: one line for each flight. The running number
            of flights must be 1, 2, 3, ..., and the last line must be equal to the final totals.
    """
    found: list[str] = []
    for key, totals in expected.items():
        rows = outputs.get(key, ())
        if len(rows) != totals["flights"]:
            found.append(f"{what} {key}: {len(rows)} results for {totals['flights']} flights")
        numbers = [row.get("flights") for row in rows]
        if numbers != list(range(1, len(rows) + 1)):
            found.append(f"{what} {key}: the running number of flights isn't 1, 2, 3, ...")
        if rows and rows[-1] != totals:
            found.append(f"{what} {key}: the job says {rows[-1]}, the CSV {totals}")
    found.extend(f"{what} {key}: is not in the CSV" for key in outputs.keys() - expected.keys())
    return found


def _carrier_totals(lines: Sequence[Mapping[str, str]]) -> Totals:
    departures = [int(line["dep_delay"]) for line in lines if line["dep_delay"] != "NA"]
    arrivals = [int(line["arr_delay"]) for line in lines if line["arr_delay"] != "NA"]
    totals: Totals = {"flights": len(lines)}
    if len(departures) < len(lines):
        totals["cancelled"] = len(lines) - len(departures)
    if departures:
        totals["departure_delay"] = sum(departures)
    if arrivals:
        totals |= {"arrived": len(arrivals), "arrival_delay": sum(arrivals), "worst_delay": max(arrivals)}
    return totals


def _aircraft_totals(lines: Sequence[Mapping[str, str]]) -> Totals:
    return {
        "flights": len(lines),
        "miles": sum(int(line["distance"]) for line in lines),
        "minutes": sum(int(line["air_time"]) for line in lines if line["air_time"] != "NA"),
        "carriers": dict(Counter(line["carrier"] for line in lines)),
    }
