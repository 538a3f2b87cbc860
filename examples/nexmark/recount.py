"""What the queries must give, computed by DuckDB in SQL: an independent answer.

It shares no code with the jobs. The events are three tables. Results with a time at which they are final (a
window that has closed, an auction that has expired) are those whose time event time has reached: `until`. For
q12, each bid has the time `arrived`, by the clock of the test.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

Row = dict[str, Any]
SHOWN_MAX = 10

TABLES = {
    "person": {
        "id": "BIGINT",
        "name": "VARCHAR",
        "city": "VARCHAR",
        "state": "VARCHAR",
        "date_time": "BIGINT",
    },
    "auction": {
        "id": "BIGINT",
        "item_name": "VARCHAR",
        "description": "VARCHAR",
        "initial_bid": "BIGINT",
        "reserve": "BIGINT",
        "date_time": "BIGINT",
        "expires": "BIGINT",
        "seller": "BIGINT",
        "category": "BIGINT",
    },
    "bid": {
        "auction": "BIGINT",
        "bidder": "BIGINT",
        "price": "BIGINT",
        "channel": "VARCHAR",
        "url": "VARCHAR",
        "date_time": "BIGINT",
        "extra": "VARCHAR",
        "arrived": "BIGINT",
    },
    "side_input": {"key": "BIGINT", "value": "VARCHAR"},
}

WINNING = """
    SELECT A.id AS auction, A.item_name, A.description, A.initial_bid, A.reserve, A.seller,
           A.category, A.date_time AS opened, A.expires, B.price, B.bidder, B.date_time AS bid_time
    FROM auction A JOIN bid B ON A.id = B.auction AND B.date_time BETWEEN A.date_time AND A.expires
    WHERE A.expires < $until
    QUALIFY row_number() OVER (PARTITION BY A.id ORDER BY B.price DESC, B.date_time, B.bidder) = 1
"""

BIDS_BY_RANK = """
    count(*) AS total_bids,
    count(*) FILTER (price < 10000) AS rank1_bids,
    count(*) FILTER (price >= 10000 AND price < 1000000) AS rank2_bids,
    count(*) FILTER (price >= 1000000) AS rank3_bids
"""

DISTINCT_BY_RANK = """
    count(DISTINCT bidder) AS total_bidders,
    count(DISTINCT bidder) FILTER (price < 10000) AS rank1_bidders,
    count(DISTINCT bidder) FILTER (price >= 10000 AND price < 1000000) AS rank2_bidders,
    count(DISTINCT bidder) FILTER (price >= 1000000) AS rank3_bidders,
    count(DISTINCT auction) AS total_auctions,
    count(DISTINCT auction) FILTER (price < 10000) AS rank1_auctions,
    count(DISTINCT auction) FILTER (price >= 10000 AND price < 1000000) AS rank2_auctions,
    count(DISTINCT auction) FILTER (price >= 1000000) AS rank3_auctions
"""

DAY = "date_time // 86400000 * 86400000"
DAY_IS_OVER = f"{DAY} + 86400000 <= $until"


@dataclass(frozen=True)
class Query:
    """A query, and what its results mean.

    Args:
        sql: gives the rows of the final result.
        key: the columns of which the newest result is the current one. None: each result stands for itself.
    """

    sql: str
    key: tuple[str, ...] | None = None


QUERIES: dict[str, Query] = {
    "q0": Query("SELECT auction, bidder, price, date_time, extra FROM bid"),
    "q1": Query("SELECT auction, bidder, 908 * price AS price_thousandths, date_time FROM bid"),
    "q2": Query("SELECT auction, price FROM bid WHERE auction IN (1007, 1020, 2001, 2019, 2087)"),
    "q3": Query(
        """
        SELECT P.name, P.city, P.state, A.id AS auction
        FROM auction A JOIN person P ON A.seller = P.id
        WHERE A.category = 10 AND P.state IN ('OR', 'ID', 'CA')
        """
    ),
    "q4": Query(
        f"SELECT category, sum(price)::DOUBLE / count(*) AS average FROM ({WINNING}) GROUP BY category",
        ("category",),
    ),
    "q5": Query(
        """
        WITH counts AS (
            SELECT auction, (date_time // 2000 + 1 + slide) * 2000 AS "end", count(*) AS num
            FROM bid, range(5) AS slides(slide)
            GROUP BY ALL
        )
        SELECT auction, num, "end" FROM counts WHERE "end" <= $until
        QUALIFY num = max(num) OVER (PARTITION BY "end")
        """
    ),
    "q6": Query(
        f"""
        SELECT seller, sum(price)::DOUBLE / count(*) AS average
        FROM (
            SELECT * FROM ({WINNING})
            QUALIFY row_number() OVER (PARTITION BY seller ORDER BY expires DESC, auction DESC) <= 10
        )
        GROUP BY seller
        """,
        ("seller",),
    ),
    "q7": Query(
        """
        SELECT auction, price, bidder, date_time
        FROM bid
        WHERE (date_time // 10000 + 1) * 10000 <= $until
        QUALIFY price = max(price) OVER (PARTITION BY date_time // 10000)
        """
    ),
    "q8": Query(
        """
        SELECT DISTINCT P.id, P.name, P.date_time // 10000 * 10000 AS start
        FROM person P JOIN auction A ON P.id = A.seller AND P.date_time // 10000 = A.date_time // 10000
        WHERE (P.date_time // 10000 + 1) * 10000 <= $until
        """
    ),
    "q9": Query(WINNING),
    "q11": Query(
        """
        WITH marked AS (
            SELECT bidder, date_time,
                   coalesce(date_time - lag(date_time) OVER times > 10000, true)::INT AS begins
            FROM bid WINDOW times AS (PARTITION BY bidder ORDER BY date_time)
        ), numbered AS (
            SELECT bidder, date_time,
                   sum(begins) OVER (PARTITION BY bidder ORDER BY date_time
                                     ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS session
            FROM marked
        )
        SELECT bidder, min(date_time) AS start, max(date_time) + 10000 AS "end", count(*) AS bids
        FROM numbered GROUP BY bidder, session HAVING "end" <= $until
        """
    ),
    "q12": Query(
        """
        SELECT bidder, (arrived // 10000 + 1) * 10000 AS "end", count(*) AS bids
        FROM bid WHERE arrived IS NOT NULL GROUP BY ALL
        """
    ),
    "q13": Query(
        """
        SELECT B.auction, B.bidder, B.price, B.date_time, S.value
        FROM bid B JOIN side_input S ON B.auction % 500 = S.key
        """
    ),
    "q14": Query(
        """
        SELECT auction, bidder, 908 * price AS price_thousandths,
               CASE WHEN hour(epoch_ms(date_time)) BETWEEN 8 AND 18 THEN 'dayTime'
                    WHEN hour(epoch_ms(date_time)) <= 6 OR hour(epoch_ms(date_time)) >= 20 THEN 'nightTime'
                    ELSE 'otherTime' END AS bid_time_type,
               date_time, length(extra) - length(replace(extra, 'c', '')) AS c_counts
        FROM bid WHERE 0.908 * price > 1000000 AND 0.908 * price < 50000000
        """
    ),
    "q15": Query(
        f"""
        SELECT {DAY} AS start, {BIDS_BY_RANK}, {DISTINCT_BY_RANK}
        FROM bid WHERE {DAY_IS_OVER} GROUP BY start
        """
    ),
    "q16": Query(
        f"""
        SELECT channel, {DAY} AS start, max(strftime(epoch_ms(date_time), '%H:%M')) AS minute,
               {BIDS_BY_RANK}, {DISTINCT_BY_RANK}
        FROM bid WHERE {DAY_IS_OVER} GROUP BY channel, start
        """
    ),
    "q17": Query(
        f"""
        SELECT auction, {DAY} AS start, {BIDS_BY_RANK}, min(price) AS min_price, max(price) AS max_price,
               sum(price)::DOUBLE / count(*) AS avg_price, sum(price)::BIGINT AS sum_price
        FROM bid WHERE {DAY_IS_OVER} GROUP BY auction, start
        """
    ),
    "q18": Query(
        """
        SELECT auction, bidder, price, channel, url, date_time FROM bid
        QUALIFY row_number() OVER (PARTITION BY bidder, auction ORDER BY date_time DESC, price) = 1
        """,
        ("auction", "bidder"),
    ),
    "q19": Query(
        """
        SELECT auction, list([price, date_time, bidder] ORDER BY price DESC, date_time, bidder) AS top
        FROM (
            SELECT * FROM bid
            QUALIFY row_number() OVER (PARTITION BY auction ORDER BY price DESC, date_time, bidder) <= 10
        )
        GROUP BY auction
        """,
        ("auction",),
    ),
    "q20": Query(
        """
        SELECT B.auction, B.bidder, B.price, B.channel, B.url, B.date_time, A.item_name, A.description,
               A.initial_bid, A.reserve, A.date_time AS opened, A.expires, A.seller, A.category
        FROM bid B JOIN auction A ON B.auction = A.id WHERE A.category = 10
        """
    ),
    "q21": Query(
        """
        SELECT auction, bidder, price, channel,
               CASE lower(channel)
                    WHEN 'apple' THEN '0' WHEN 'google' THEN '1' WHEN 'facebook' THEN '2'
                    WHEN 'baidu' THEN '3'
                    ELSE regexp_extract(url, '(&|^)channel_id=([^&]*)', 2) END AS channel_id
        FROM bid WHERE channel_id <> ''
        """
    ),
    "q22": Query(
        """
        SELECT auction, bidder, price, channel, split_part(url, '/', 4) AS dir1,
               split_part(url, '/', 5) AS dir2, split_part(url, '/', 6) AS dir3
        FROM bid
        """
    ),
}


class Recount:
    """The events in DuckDB, in memory.

    Args:
        persons, auctions, bids: the events' values.
        side_inputs: the values of the table of q13, by key.
        until_ms: the event time that the job has reached.
    """

    def __init__(
        self,
        persons: Iterable[Row],
        auctions: Iterable[Row],
        bids: Iterable[Row],
        side_inputs: Mapping[int, Row],
        until_ms: int,
    ) -> None:
        self._until_ms = until_ms
        self._duckdb = duckdb.connect(config={"threads": 1})
        sides = [{"key": key, **row} for key, row in side_inputs.items()]
        for table, rows in zip(TABLES, (persons, auctions, bids, sides), strict=True):
            self._fill(table, rows)

    def rows(self, query: str) -> list[Row]:
        """The rows that the query must give in the end, in no particular order."""
        sql = QUERIES[query].sql
        found = self._duckdb.execute(sql, {"until": self._until_ms} if "$until" in sql else None)
        assert found.description is not None
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def differences(self, query: str, written: Sequence[Row]) -> list[str]:
        """Where what the job has written, in the order of each key, differs. Empty if it doesn't."""
        expected, found = Counter(map(_text, self.rows(query))), Counter(map(_text, final(query, written)))
        missing, extra = (expected - found).elements(), (found - expected).elements()
        lines = [f"{query}: not written: {row}" for row in missing]
        return lines + [f"{query}: written, but wrong or too often: {row}" for row in extra]

    def _fill(self, table: str, rows: Iterable[Row]) -> None:
        columns = TABLES[table]
        names = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        self._duckdb.execute(f"CREATE TABLE {table} ({names})")
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "rows.json"
            lines = (json.dumps({name: row.get(name) for name in columns}) for row in rows)
            file.write_text("\n".join(lines))
            if file.stat().st_size:
                reading = "read_json(?, format='newline_delimited', columns=?)"
                self._duckdb.execute(f"INSERT INTO {table} SELECT * FROM {reading}", [str(file), columns])


def final(query: str, written: Sequence[Row]) -> list[Row]:
    """The current results: all of them, or the newest one of each key."""
    key = QUERIES[query].key
    if key is None:
        return list(written)
    return list({tuple(row[name] for name in key): row for row in written}.values())


def _text(row: Row) -> str:
    return json.dumps(row, sort_keys=True)
