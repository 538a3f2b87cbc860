"""What `airports.py`, `weather.py` and `rotations.py` must write, computed by DuckDB in SQL.

It shares no code with the jobs. Results are tuples, in the order of all their columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb

FLIGHT = {
    "arrived": "BIGINT",
    "partition": "BIGINT",
    "carrier": "VARCHAR",
    "flight": "BIGINT",
    "tailnum": "VARCHAR",
    "origin": "VARCHAR",
    "dest": "VARCHAR",
    "distance": "BIGINT",
    "dep_delay": "BIGINT",
    "scheduled": "BIGINT",
    "departed": "BIGINT",
}
WEATHER = {"origin": "VARCHAR", "observed": "BIGINT", "wind_speed": "DOUBLE", "visib": "DOUBLE"}

# A record is late if the end of its hour and 15 minutes have passed in the event time before it: that is the
# latest departure before it in its partition, minus half an hour.
DEPARTURES = """
    SELECT *, departed // 3600000 * 3600000 + 3600000 AS "end",
        coalesce(
            "end" + 900000 <= max(departed) OVER (
                PARTITION BY partition ORDER BY arrived ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) - 1800000,
            false
        ) AS late
    FROM flight WHERE departed IS NOT NULL
"""


class Recount:
    """Flights and observations in DuckDB, in memory.

    Args:
        flights: with "arrived", which numbers them in the order in which they were sent, and "partition",
            which is that of their airport.
        weather: the observations.
    """

    def __init__(self, flights: Iterable[dict[str, Any]], weather: Iterable[dict[str, Any]]) -> None:
        self._duckdb = duckdb.connect(config={"threads": 1})
        self._fill("flight", FLIGHT, flights)
        self._fill("weather", WEATHER, weather)

    def hours(self, until_ms: int) -> list[tuple[Any, ...]]:
        """Airport, end, flights, delayed ones, minutes and worst delay of the hours that have closed."""
        return self._rows(
            f"""
            SELECT origin, "end", count(*), count(*) FILTER (dep_delay > 15), sum(dep_delay)::BIGINT,
                   max(dep_delay)
            FROM ({DEPARTURES}) WHERE NOT late AND "end" + 900000 <= ?
            GROUP BY origin, "end" ORDER BY ALL
            """,
            until_ms,
        )

    def late(self) -> list[tuple[Any, ...]]:
        """Airport, departure and tail number of the flights that came too late."""
        return self._rows(f"SELECT origin, departed, tailnum FROM ({DEPARTURES}) WHERE late ORDER BY ALL")

    def flights_weather(self) -> list[tuple[Any, ...]]:
        """Flight, airport, scheduled time, delay, and time, wind and visibility of the observation."""
        return self._rows(
            """
            SELECT F.carrier || F.flight, F.origin, F.scheduled, F.dep_delay, W.observed, W.wind_speed,
                   W.visib
            FROM flight F ASOF LEFT JOIN weather W ON F.origin = W.origin AND F.scheduled >= W.observed
            ORDER BY ALL
            """
        )

    def rotations(self, until_ms: int) -> list[tuple[Any, ...]]:
        """Tail number, start, end, flights, miles, first airport and last destination of the sessions that
        have closed.
        """
        return self._rows(
            """
            WITH marked AS (
                SELECT *, coalesce(scheduled - lag(scheduled) OVER times > 43200000, true)::INT AS begins
                FROM flight WHERE tailnum IS NOT NULL AND dep_delay IS NOT NULL
                WINDOW times AS (PARTITION BY tailnum ORDER BY scheduled)
            ), numbered AS (
                SELECT *, sum(begins) OVER (PARTITION BY tailnum ORDER BY scheduled
                                            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS session
                FROM marked
            )
            SELECT tailnum, min(scheduled), max(scheduled) + 43200000 AS "end", count(*),
                   sum(distance)::BIGINT, arg_min(origin, scheduled), arg_max(dest, scheduled)
            FROM numbered GROUP BY tailnum, session HAVING "end" <= ? ORDER BY ALL
            """,
            until_ms,
        )

    def _rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self._duckdb.execute(sql, list(parameters)).fetchall()

    def _fill(self, table: str, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
        names = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        self._duckdb.execute(f"CREATE TABLE {table} ({names})")
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "rows.json"
            file.write_text("\n".join(json.dumps({name: row.get(name) for name in columns}) for row in rows))
            reading = "read_json(?, format='newline_delimited', columns=?)"
            self._duckdb.execute(f"INSERT INTO {table} SELECT * FROM {reading}", [str(file), columns])
