"""How many records are processed at a time: as many as take a few milliseconds."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster.worker.chunks import AIM_S, CHUNK_RECORDS_MAX, Chunks
from fcluster.worker.consuming import Batch, ReadUpTo


class Reader:
    """Counts the batches that are processed."""

    batches_done = 0

    def done(self) -> None:
        self.batches_done += 1


def chunks_of(*sizes: int) -> tuple[Chunks, Reader]:
    chunks, reader, number = Chunks(), Reader(), 0
    for size in sizes:
        records: Any = list(range(number, number + size))
        number += size
        chunks.add(Batch(reader, 0, records, False))  # type: ignore[arg-type]
    return chunks, reader


def process(chunks: Chunks, record_s: float, left: int = 0) -> list[Any]:
    _batch, records = chunks.take()
    left = min(left, len(records))
    processed = records[: len(records) - left]
    chunks.done(left, record_s * len(processed))
    return processed


def test_every_record_comes_once_and_in_order_whatever_is_returned_unprocessed() -> None:
    chunks, reader = chunks_of(3, 1200, 1, 700)
    seen: list[Any] = []
    turn = 0
    while chunks:
        turn += 1
        seen += process(chunks, 1e-6, left=turn % 3)
    assert seen == list(range(1904))
    assert reader.batches_done == 4


def test_fast_records_are_processed_many_at_a_time() -> None:
    chunks, _ = chunks_of(20_000)
    sizes = [len(process(chunks, 5e-6)) for _ in range(20)]
    assert max(sizes) == CHUNK_RECORDS_MAX
    assert sizes[0] == 1  # nothing is known about the handler yet


def test_slow_records_are_processed_one_by_one() -> None:
    chunks, _ = chunks_of(20_000)
    for _ in range(20):
        process(chunks, 5e-6)
    process(chunks, 0.15)  # a whole chunk of them, which is ended from outside
    assert [len(process(chunks, 0.15)) for _ in range(5)] == [1, 1, 1, 1, 1]


def test_chunk_takes_about_its_target_time() -> None:
    chunks, _ = chunks_of(50_000)
    sizes = [len(process(chunks, 100e-6)) for _ in range(30)]
    assert sizes[-1] == int(AIM_S / 100e-6)


def test_position_counts_once_the_batches_before_it_are_processed_even_if_others_wait() -> None:
    chunks, reader = chunks_of(1)
    before: Any = ReadUpTo(reader, 1, {("in", 0): 1}, {})  # type: ignore[arg-type]
    newer: Any = ReadUpTo(reader, 1, {("in", 0): 2}, {})  # type: ignore[arg-type]
    last: Any = ReadUpTo(reader, 1, {("in", 0): 9}, {})  # type: ignore[arg-type]
    assert chunks.hold(before)
    assert chunks.hold(newer)
    chunks.add(Batch(reader, 0, [7, 8], False))  # type: ignore[arg-type,list-item]
    assert chunks.hold(last)
    assert list(chunks.reached()) == []
    process(chunks, 1e-6)
    assert list(chunks.reached()) == [newer]
    while chunks:
        assert list(chunks.reached()) == []
        process(chunks, 1e-6)
    assert list(chunks.reached()) == [last]
    assert not chunks.hold(before), "nothing waits, so it counts at once"


def test_records_of_all_batches_wait_for_about_the_time_that_they_take() -> None:
    chunks, _ = chunks_of(5, 2, 3)
    process(chunks, 0.01)
    assert chunks.waiting_s == pytest.approx(9 * 0.01)
    chunks.take(1)
    assert chunks.waiting_s == pytest.approx(8 * 0.01)


def test_records_that_take_longer_than_a_moment_count_as_backlog() -> None:
    chunks, _ = chunks_of(200)
    for _ in range(7):
        process(chunks, 5e-6)
    chunks.take()
    assert not chunks.backlog
    chunks, _ = chunks_of(100)
    process(chunks, 0.15)
    chunks.take()
    assert chunks.backlog
    chunks, _ = chunks_of(1, 1)
    chunks.take()
    assert chunks.backlog
