"""The order in which a shard with several inputs processes their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fcluster.engine.merging import InputMerge


@dataclass(frozen=True)
class Stamped:
    """What a merge needs to know about a record."""

    name: str
    timestamp_ms: int

    def timestamp(self) -> tuple[int, int]:
        return 1, self.timestamp_ms


def add(merge: InputMerge, number: int, *stamps: int) -> None:
    """Add these records (`input:timestamp`) to an input whose end isn't known."""
    records: list[Any] = [Stamped(f"{number}:{stamp}", stamp) for stamp in stamps]
    merge.add(number, records)


def take(merge: InputMerge, now_ms: float = 0, records_max: int = 100) -> list[str]:
    taken: list[Any] = merge.take(now_ms, records_max)
    return [record.name for record in taken]


def test_smallest_timestamp_is_next_and_equal_ones_in_the_order_of_inputs() -> None:
    merge = InputMerge(3, 0)
    add(merge, 2, 10, 30)
    add(merge, 0, 10, 20)
    add(merge, 1, 5, 20)
    assert take(merge) == ["1:5", "0:10", "2:10", "0:20"]
    assert take(merge) == [], "input 0 has no record ready, and may have more"


def test_precedence_decides_between_equal_timestamps() -> None:
    merge = InputMerge(3, 0, (2, 0, 1))
    for number in range(3):
        add(merge, number, 5, 9)
    assert take(merge) == ["2:5", "0:5", "1:5", "2:9"]
    add(merge, 2, 9)
    assert take(merge) == ["2:9"]


def test_within_an_input_offsets_decide_whatever_the_timestamps_are() -> None:
    merge = InputMerge(2, 0)
    add(merge, 0, 50, 10, 60)
    add(merge, 1, 40, 55)
    assert take(merge) == ["1:40", "0:50", "0:10", "1:55"]


def test_input_is_waited_for_until_its_end_is_known_and_reached() -> None:
    merge = InputMerge(2, 0)
    add(merge, 0, 10)
    assert take(merge) == [], "nothing is known about input 1"
    merge.note(1, 7, None)
    assert take(merge) == [], "its end isn't known"
    merge.note(1, 7, 9)
    assert take(merge) == [], "it has more records"
    merge.note(1, 9, 8)
    assert take(merge) == [], "an end before the position is out of date"
    merge.note(1, 9, 9)
    assert take(merge) == ["0:10"]


def test_record_after_a_known_end_makes_the_end_unknown() -> None:
    merge = InputMerge(2, 0)
    merge.note(1, 0, 0)
    add(merge, 1, 10)
    add(merge, 0, 20, 30)
    assert take(merge) == ["1:10"]
    merge.note(1, 1, 1)
    assert take(merge) == ["0:20", "0:30"]


def test_input_at_its_end_is_waited_for_as_long_as_it_may_be_idle() -> None:
    merge = InputMerge(2, 500)
    add(merge, 0, 10)
    assert (take(merge, 1_000), merge.due_ms()) == ([], None)
    merge.note(1, 3, 3)
    assert (take(merge, 2_000), merge.due_ms()) == ([], 2_500)
    assert take(merge, 2_499) == []
    assert take(merge, 2_500) == ["0:10"]
    add(merge, 0, 20)
    assert take(merge, 2_501) == ["0:20"], "it has been empty for long enough"
    add(merge, 1, 5)
    merge.note(1, 4, 4)
    add(merge, 0, 30)
    assert (take(merge, 3_000), merge.due_ms()) == (["1:5"], 3_500)
    assert take(merge, 3_500) == ["0:30"]
    assert merge.due_ms() is None, "nothing waits"


def test_nothing_is_waited_for_if_waiting_is_off() -> None:
    merge = InputMerge(2, -1)
    add(merge, 1, 20, 40)
    assert take(merge) == ["1:20", "1:40"]
    add(merge, 0, 10)
    assert take(merge) == ["0:10"]


def test_take_returns_no_more_than_requested() -> None:
    merge = InputMerge(2, -1)
    add(merge, 0, 1, 2, 3)
    assert take(merge, records_max=2) == ["0:1", "0:2"]
    assert merge.count(0) == 1


STAMPS = st.lists(st.integers(0, 20), max_size=12)


@given(st.lists(STAMPS, min_size=2, max_size=4), st.data())
def test_order_does_not_depend_on_how_records_arrive(inputs: Sequence[Sequence[int]], data: Any) -> None:
    """However they are split into reads: a record that is known to be at the brokers is waited for."""

    def played() -> list[str]:
        merge = InputMerge(len(inputs), 0)
        left = [list(stamps) for stamps in inputs]
        order: list[str] = []
        for number, stamps in enumerate(inputs):
            merge.note(number, 0, len(stamps))
        while any(left):
            number = data.draw(st.sampled_from([n for n, stamps in enumerate(left) if stamps]))
            count = data.draw(st.integers(1, len(left[number])))
            add(merge, number, *left[number][:count])
            left[number] = left[number][count:]
            merge.note(number, len(inputs[number]) - len(left[number]), len(inputs[number]))
            order += take(merge, records_max=data.draw(st.integers(1, 5)))
        return order + take(merge)

    expected = played()
    assert played() == expected
    assert len(expected) == sum(map(len, inputs))


def test_inputs_that_are_not_loaded_are_read_alone_whatever_the_timestamps_are() -> None:
    unloaded = {1}
    merge = InputMerge(2, 0, (1, 0), unloaded=lambda: unloaded)
    add(merge, 0, 5)
    assert take(merge) == []
    assert merge.due_ms() is None
    merge.note(1, 0, 0)
    assert take(merge, now_ms=1_000) == [], "it is at its end, but there is more to come"
    add(merge, 1, 30, 20)
    assert take(merge) == ["1:30", "1:20"]
    unloaded.clear()
    add(merge, 1, 10)
    assert take(merge) == ["0:5"], "from then on, timestamps decide"
    add(merge, 0, 50)
    assert take(merge) == ["1:10"]
    unloaded.add(0)
    add(merge, 1, 60)
    assert take(merge) == ["0:50"], "it isn't asked again"
