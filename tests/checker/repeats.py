"""Distinguishes input records that the test's producer wrote twice.

An idempotent producer may do that. When librdkafka begins a new producer epoch (for example because a broker
goes down while requests are in flight), it writes again what may already be persisted, and the brokers can't
recognise it. Then the same record is in the source at two offsets, and a correct job has two outputs of it.

Responsible for: giving each such record its own id and sequence, in inputs and outputs alike, so that
everything else is judged as usual. Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.checker.records import InputRecord, OutputRecord

_Row = TypeVar("_Row", InputRecord, OutputRecord)

REPEAT_ID = 10**12
"""The id of the n-th repeat is greater by n times this."""


@dataclass
class Repeats:
    """The repeats of one source topic. False if there are none.

    Args:
        inputs: all records of the source that are judged, each partition in offset order.
    """

    inputs: Sequence[InputRecord]
    count: int = 0
    _occurrences: dict[int, list[InputRecord]] = field(default_factory=lambda: defaultdict(list))
    _at: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])

    def __post_init__(self) -> None:
        twice = {number for number, count in Counter(row.id for row in self.inputs).items() if count > 1}
        keys = {row.key for row in self.inputs if row.id in twice}
        first: dict[int, InputRecord] = {}
        repeats: Counter[str] = Counter()
        last: dict[str, int] = defaultdict(int)
        told_apart: list[InputRecord] = []
        for row in self.inputs:
            now = row
            if row.key in keys:
                before = first.setdefault(row.id, row)
                if before is row:
                    now = row._replace(sequence=row.sequence + repeats[row.key])
                elif _content(before) == _content(row):  # otherwise the verdict objects
                    repeats[row.key] += 1
                    nth = len(self._occurrences[row.id])
                    now = row._replace(id=row.id + nth * REPEAT_ID, sequence=last[row.key] + 1)
                last[row.key] = now.sequence
                self._at[row.partition, row.offset] = len(self._occurrences[row.id])
                self._occurrences[row.id].append(now)
            told_apart.append(now)
        self._originals = {row.id: row.sequence for row in first.values()}
        self.inputs = told_apart
        self.count = repeats.total()

    def __bool__(self) -> bool:
        return self.count > 0

    def of_outputs(self, outputs: Iterable[OutputRecord]) -> list[OutputRecord]:
        """The same outputs, with the ids and sequences of the inputs that they belong to. They are matched by
        the position that they name, or the n-th output of an id belongs to its n-th input. An additional
        output stays with the last input.
        """
        seen: Counter[int] = Counter()
        found: list[OutputRecord] = []
        for row in outputs:
            rows = self._occurrences.get(row.id)
            if rows is None:
                found.append(row)
                continue
            nth = self._at.get((row.partition, row.offset), seen[row.id])
            seen[row.id] += 1
            found.append(self._as(row, rows[min(nth, len(rows) - 1)]))
        return found

    def of_copies(self, seen: Mapping[int, Sequence[InputRecord]]) -> dict[int, list[InputRecord]]:
        """The same for copies of the input in a repartition topic whose beginning may be deleted: the last
        copy of an id belongs to its last input.
        """
        found: dict[int, list[InputRecord]] = {}
        for partition, copies in seen.items():
            left: Counter[int] = Counter()
            backwards: list[InputRecord] = []
            for row in reversed(copies):
                rows = self._occurrences.get(row.id)
                if rows is None:
                    backwards.append(row)
                    continue
                left[row.id] += 1
                backwards.append(self._as(row, rows[max(len(rows) - left[row.id], 0)]))
            found[partition] = backwards[::-1]
        return found

    def note(self) -> str:
        """A line for a report."""
        return f"{self.count} records stand in the source again: its producer had to begin a new epoch"

    def _as(self, row: _Row, wanted: InputRecord) -> _Row:
        shift = wanted.sequence - self._originals[row.id]
        return row._replace(id=wanted.id, sequence=row.sequence + shift)


def _content(row: InputRecord) -> tuple[str, int, int]:
    return row.key, row.sequence, row.value
