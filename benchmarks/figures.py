"""The arithmetic of the benchmarks: schedules, percentiles, parts of a drain, medians and ratios.

No clock, no files, no Kafka: all of it is tested in `tests/unit/benchmarks`.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PERCENTILES = {"median_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999}


@dataclass(frozen=True)
class Schedule:
    """When each record is due, at a steady rate: an open loop, which waits for nobody.

    A latency counts from when its record was due, not from when it was written. Otherwise a writer that is
    held up writes nothing during the worst time, and just that time is missing from the figures ("coordinated
    omission").

    Attributes:
        rate: records a second.
        start_ns: when the first one is due.
    """

    rate: float
    start_ns: int

    def due_ns(self, number: int) -> int:
        """When the record of this number (from 0) is due."""
        return self.start_ns + round(number * 1e9 / self.rate)

    def count_due(self, now_ns: int) -> int:
        """How many records are due by now."""
        if now_ns < self.start_ns:
            return 0
        count = int((now_ns - self.start_ns) * self.rate / 1e9) + 1
        # Rounding may be off by one in either direction.
        while count and self.due_ns(count - 1) > now_ns:
            count -= 1
        while self.due_ns(count) <= now_ns:
            count += 1
        return count


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (more than 0, up to 1) of the values don't exceed.

    Args:
        ordered: the values, sorted; at least one.
    """
    rank = -int(-share * len(ordered) // 1)  # rounded up
    return ordered[max(0, rank - 1)]


def latency_figures(latencies_ns: Sequence[int], prefix: str = "") -> dict[str, float]:
    """Median, other percentiles and the longest, in milliseconds, by name.

    Raises:
        ValueError: there are none.
    """
    if not latencies_ns:
        raise ValueError("no record was seen in the measured time")
    ordered = [value / 1e6 for value in sorted(latencies_ns)]
    found = {prefix + name: percentile(ordered, share) for name, share in PERCENTILES.items()}
    found[f"{prefix}max_ms"] = ordered[-1]
    return found


class Progress(NamedTuple):
    """So many records were done at this time."""

    at_s: float
    records: int


def reached_s(progress: Sequence[Progress], records: int) -> float:
    """When so many records were done, between two looks in proportion.

    Args:
        progress: in the order of time; the last one is at least at `records`.
    """
    index = bisect_left([one.records for one in progress], records)
    after = progress[index]
    if index == 0 or after.records == records:
        return after.at_s
    before = progress[index - 1]
    share = (records - before.records) / (after.records - before.records)
    return before.at_s + share * (after.at_s - before.at_s)


def part_rates(progress: Sequence[Progress], split_at: int, part_records_min: int) -> dict[str, float]:
    """Records a second before and after `split_at` records; a part of too few records has no rate.

    Args:
        progress: from the first output to the last one.
    """
    first, last = progress[0], progress[-1]
    if not first.records < split_at < last.records:
        return {}
    middle_s = reached_s(progress, split_at)
    parts = {
        "first_part_rate": (split_at - first.records, middle_s - first.at_s),
        "second_part_rate": (last.records - split_at, last.at_s - middle_s),
    }
    return {
        name: records / seconds
        for name, (records, seconds) in parts.items()
        if seconds > 0 and records >= part_records_min
    }


class Spread(NamedTuple):
    """A figure over all rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def spreads(rounds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of each figure that some round has."""
    names = dict.fromkeys(name for one in rounds for name in one)
    return {name: Spread.of([one[name] for one in rounds if name in one]) for name in names}


def ratios(
    ours: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]]
) -> dict[str, Spread]:
    """The spread of our figure divided by the other's of the same round, for each figure that both have.

    What else the machine does changes from round to round, and hits both sides of one round alike: so the
    median of the ratios says more than the ratio of the medians.

    Args:
        ours, others: the figures by the number of the round.
    """
    found: dict[str, list[float]] = {}
    for number in sorted(ours.keys() & others.keys()):
        for name, value in ours[number].items():
            other = others[number].get(name)
            if other:
                found.setdefault(name, []).append(value / other)
    return {name: Spread.of(values) for name, values in found.items()}
