"""What the kinds of state cost, without Kafka: the step of a handler that uses one, and its share of the
barrier.

    python -m benchmarks.kinds

Each line is the best of several rounds: microseconds of processor time for a record, with its own RocksDB,
and a barrier every 1,000 records.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.engine import Epochs
from fcluster import Job, ListState, MapState, ValueState
from fcluster.storage.store import StoreDirectory

RECORDS = 5_000
KEYS = 500
EPOCH_RECORDS = 1_000
ROUNDS = 3

TOTAL: ValueState[int] = ValueState("total", "int")
BY_TIME: MapState[int, int] = MapState("by-time", key="int", value="int")
SEEN: MapState[int, int] = MapState("seen", key="int", value="int", ttl=timedelta(seconds=2))
LAST: ListState[int] = ListState("last", "int")


class Message:
    """A consumed record."""

    def __init__(self, number: int) -> None:
        self._number = number

    def key(self) -> bytes:
        """One of some hundred keys."""
        return b"k%d" % (self._number % KEYS)

    def value(self) -> bytes:
        """Its number."""
        return b"%d" % self._number

    def timestamp(self) -> tuple[int, int]:
        """A millisecond for each record."""
        return 1, 1_700_000_000_000 + self._number

    def headers(self) -> None:
        """None."""

    def topic(self) -> str:
        """Any topic."""
        return "in"

    def partition(self) -> int:
        """Any partition."""
        return 0

    def offset(self) -> int:
        """Its number."""
        return self._number


def document(ctx: Any, value: int) -> None:
    """Uses the dict."""
    ctx.state["n"] = ctx.state.get("n", 0) + value


def total(ctx: Any, value: int) -> None:
    """Uses a value."""
    state = ctx.value(TOTAL)
    state.set(state.get(0) + value)


def put(ctx: Any, value: int) -> None:
    """Adds an entry to a map."""
    ctx.map(BY_TIME)[value] = value


def put_and_scan(ctx: Any, value: int) -> None:
    """Does the same, reads the five newest entries, and deletes older ones."""
    entries = ctx.map(BY_TIME)
    entries[value] = value
    newest = [key for key, _ in zip_five(entries.scan(reverse=True))]
    if len(newest) == 5:
        for key, _ in entries.scan(None, newest[-1]):
            del entries[key]


def zip_five(pairs: Any) -> list[Any]:
    """The first five items."""
    return [pair for _, pair in zip(range(5), pairs, strict=False)]


def seen(ctx: Any, value: int) -> None:
    """Uses a map with a TTL: each entry expires four records of its key later."""
    ctx.map(SEEN)[value] = value


def last(ctx: Any, value: int) -> None:
    """Keeps the last three in a list."""
    state = ctx.list(LAST)
    state.append(value)
    if len(state) > 3:
        state.popleft()


CASES: list[tuple[Callable[..., Any], list[Any]]] = [
    (document, []),
    (total, [TOTAL]),
    (put, [BY_TIME]),
    (put_and_scan, [BY_TIME]),
    (seen, [SEEN]),
    (last, [LAST]),
]


def measure(handler: Callable[..., Any], states: list[Any]) -> float:
    """Returns the seconds of processor time for all records."""
    job = Job("j")
    job.process(job.topic("in"), states=states)(handler)
    messages = [Message(number) for number in range(RECORDS)]
    with tempfile.TemporaryDirectory() as directory:
        stores = StoreDirectory(Path(directory))
        epochs = Epochs(job, stores, cache_entries_max=1_000, epoch_records=EPOCH_RECORDS)
        began_s = time.process_time()
        epochs.run(messages)
        took_s = time.process_time() - began_s
        stores.close_all()
    return took_s


def main() -> None:
    """Print a line for each case."""
    for handler, states in CASES:
        best_s = min(measure(handler, states) for _ in range(ROUNDS))
        print(f"{handler.__name__:14} {1e6 * best_s / RECORDS:6.2f} us")


if __name__ == "__main__":
    main()
