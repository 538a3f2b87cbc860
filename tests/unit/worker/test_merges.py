"""Records of a shard with several inputs that wait in a worker for their turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fcluster.worker import merges
from fcluster.worker.calls import taken_out
from fcluster.worker.merges import ShardMerge


class Reader:
    """Records which partitions are paused."""

    def __init__(self) -> None:
        self.held: list[tuple[str, int]] = []

    def hold(self, partition: tuple[str, int]) -> None:
        self.held.append(partition)

    def release(self, partition: tuple[str, int]) -> None:
        self.held.remove(partition)


class FakeMessage:
    def __init__(self, topic: str, timestamp_ms: int, size_bytes: int = 10, partition: int = 3) -> None:
        self._topic, self._timestamp_ms, self._size_bytes = topic, timestamp_ms, size_bytes
        self._partition = partition

    def __len__(self) -> int:
        return self._size_bytes

    def topic(self) -> str:
        return self._topic

    def partition(self) -> int:
        return self._partition

    def timestamp(self) -> tuple[int, int]:
        return 1, self._timestamp_ms


class Bench:
    """A shard that reads `a` and `b`."""

    def __init__(self) -> None:
        self.reader: Any = Reader()
        self.inputs: list[Any] = [
            SimpleNamespace(topic=topic, partition=3, number=number, begun_at=0, read_position=0, end=-1)
            for number, topic in enumerate("ab")
        ]
        self.merge = ShardMerge(self.inputs, [self.reader, self.reader], 0)

    def read(self, number: int, *stamps: int, end: int | None = None, size_bytes: int = 10) -> None:
        messages: list[Any] = [FakeMessage("ab"[number], stamp, size_bytes) for stamp in stamps]
        self.merge.add(number, messages)
        position = self.merge._positions[number] + len(stamps)
        self.merge.note(number, position, end)

    def next_stamps(self) -> list[int] | None:
        batch = self.merge.next_batch(0)
        return None if batch is None else [message.timestamp()[1] for message in batch.messages]


def test_next_batch_comes_when_the_one_before_is_processed() -> None:
    bench = Bench()
    bench.read(0, 1, 4, end=2)
    bench.read(1, 2, 3, end=2)
    assert bench.next_stamps() == [1, 2, 3, 4]
    bench.read(0, 5, end=3)
    assert bench.next_stamps() is None
    bench.merge.done()
    assert bench.next_stamps() == [5]


def test_records_count_as_read_only_when_none_of_them_waits() -> None:
    bench = Bench()
    bench.read(0, 1, 9, end=2)
    assert [one.read_position for one in bench.inputs] == [0, 0]
    bench.read(1, 5, end=7)
    assert bench.next_stamps() == [1, 5]
    assert [one.read_position for one in bench.inputs] == [0, 0], "it is in the batch"
    bench.merge.done()
    assert [one.read_position for one in bench.inputs] == [0, 1], "9 waits for later records of b"
    bench.merge.note(1, 7, 7)
    assert [one.read_position for one in bench.inputs] == [0, 7], "only transaction markers came"
    assert [one.end for one in bench.inputs] == [2, 7]


@pytest.mark.parametrize("size_bytes", [10, 4_000])
def test_reading_of_an_input_that_is_far_ahead_is_paused(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    monkeypatch.setattr(merges, "HELD_ABOVE_RECORDS", 10 if size_bytes == 10 else 1_000_000)
    monkeypatch.setattr(merges, "HELD_ABOVE_BYTES", 10 * 4_000)
    bench = Bench()
    bench.read(0, *range(100, 120), end=99, size_bytes=size_bytes)
    assert bench.reader.held == [("a", 3)]
    assert bench.next_stamps() is None, "b may have more records"
    bench.read(1, 150, end=99)
    assert bench.next_stamps() == list(range(100, 120))
    assert bench.reader.held == [], "there is room again"


def test_handed_out_records_are_outdated_once_the_shard_is_no_longer_read() -> None:
    bench = Bench()
    bench.read(0, 1, end=1)
    bench.merge.note(1, 0, 0)
    batch = bench.merge.next_batch(0)
    assert batch is not None
    assert batch.generation >= batch.reader.newest_generation
    bench.merge.close()
    assert batch.generation < batch.reader.newest_generation
    bench.merge.done()
    assert bench.inputs[0].read_position == 0, "it isn't known which of them were processed"


def test_batch_is_split_by_partition() -> None:
    mine, others = FakeMessage("a", 1), [FakeMessage("a", 2, partition=4), FakeMessage("c", 3)]
    messages: list[Any] = [others[0], mine, others[1]]
    rest, merged = taken_out(messages, {("a", 3): Bench().merge})
    assert rest == others
    assert merged == {("a", 3): [mine]}


def test_held_shard_takes_no_records_until_it_is_released() -> None:
    bench = Bench()
    bench.read(0, 1, 4, end=2)
    bench.read(1, 2, end=1)
    bench.merge.held = True
    assert bench.next_stamps() is None
    assert bench.merge.due_ms() is None
    bench.merge.held = False
    assert bench.next_stamps() == [1, 2, 4]
