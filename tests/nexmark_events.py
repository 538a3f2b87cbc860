"""Events of Nexmark for tests: three busy times of a day, in partitions, out of order, and an end.

Responsible for: what is sent and what DuckDB is told. The end is an event in each partition of each topic,
days later. It moves event time past everything before it, and is an event like any other.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from examples.nexmark.generator import AUCTIONS, OF, PERSONS, SIDE_INPUTS, Event, Generator, side_inputs
from examples.nexmark.recount import Recount
from tests.harness import REPOSITORY

DIRECTORY = REPOSITORY / "examples" / "nexmark"
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
MIDNIGHT_MS = 1_436_918_400_000
"""2015-07-15"""
BUSY_FROM_MS = (7 * HOUR_MS - 10_000, 19 * HOUR_MS - 10_000, DAY_MS - 10_000)
"""Each begins at this time: shortly before night becomes day, day becomes evening, and midnight."""
DELAY_MS = 4_000
"""The delay of the topics' watermarks."""
END_MS = MIDNIGHT_MS + 4 * DAY_MS
UNTIL_MS = END_MS - DELAY_MS
"""The event time at the end."""
FIRST_END_MS = 10_000
"""The end of the first window of q12."""
KINDS = ("persons", "auctions", "bids")
Arrival = tuple[str, int, dict[str, Any]]
"""Topic without its prefix, partition, and value."""


def busy_times(count: int, gap_ms: float, seed: int) -> Iterator[Event]:
    """So many events in each of the three times."""
    for number, begin_ms in enumerate(BUSY_FROM_MS):
        first = number * count
        start_ms = MIDNIGHT_MS + begin_ms - int(first * gap_ms)
        site = Generator(seed, start_ms, gap_ms, active_persons=20, open_auctions=20)
        yield from site.events(count, first)


def end_of(partition: int) -> Iterator[Event]:
    """An event of each kind at the end, which has to do with no other one."""
    site = Generator(99, END_MS, 0)
    new = 10**9 + partition
    for number, change in (
        (0, {"id": new}),
        (PERSONS, {"id": new, "seller": new, "category": 99}),
        (PERSONS + AUCTIONS, {"auction": new, "bidder": new}),
    ):
        assert number < OF
        kind, value = site.event(number)
        yield Event(kind, value | change)


def side_records() -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the table of q13, as they are in its topic."""
    for key, row in side_inputs().items():
        yield key.to_bytes(8, "big"), orjson.dumps(row)


@dataclass
class Arrivals:
    """Events in the order in which they arrive.

    In each partition, an event may be up to 3.9 s late. Partitions are written in turn, some of them much
    faster than others.

    Args:
        partitions: of each topic.
        count: the number of events in each busy time.
        gap_ms: the time between two events.
        seed: another seed: other events, partitions and orders.
    """

    partitions: int
    count: int = 300
    gap_ms: float = 60
    seed: int = 1
    arrivals: list[Arrival] = field(init=False)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        places = [(kind, partition) for kind in KINDS for partition in range(self.partitions)]
        queues: dict[tuple[str, int], list[tuple[float, dict[str, Any]]]] = {place: [] for place in places}
        for kind, value in busy_times(self.count, self.gap_ms, self.seed):
            late_ms = chance.choice((0, 0, chance.uniform(0, DELAY_MS - 100)))
            place = kind, chance.randrange(self.partitions)
            queues[place].append((value["date_time"] + late_ms, value))
        for queue in queues.values():
            queue.sort(key=lambda one: one[0], reverse=True)
        speeds = [chance.choice((1, 3, 10)) for _ in places]
        self.arrivals = []
        while any(queues.values()):
            for place in chance.choices(places, speeds, k=len(places)):
                if queues[place]:
                    self.arrivals.append((*place, queues[place].pop()[1]))
        for partition in range(self.partitions):
            self.arrivals += [(kind, partition, value) for kind, value in end_of(partition)]

    def recount(self, until_ms: int = UNTIL_MS) -> Recount:
        """DuckDB with these events, until that event time. Bids that don't say when they have arrived are in
        the first window of q12.
        """
        rows = (
            [{"arrived": 0, **value} for kind, _, value in self.arrivals if kind == wanted]
            for wanted in KINDS
        )
        return Recount(*rows, side_inputs(), until_ms)


def in_one_window(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of q12, with all bids of a person in the first window. In which one they are depends on the
    wall clock, but each bid has to be in one.
    """
    bids: Counter[int] = Counter()
    for row in rows:
        bids[row["bidder"]] += row["bids"]
    return [{"bidder": bidder, "end": FIRST_END_MS, "bids": number} for bidder, number in bids.items()]


__all__ = ["DIRECTORY", "KINDS", "SIDE_INPUTS", "UNTIL_MS", "Arrivals", "in_one_window", "side_records"]
