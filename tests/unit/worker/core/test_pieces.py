"""Epochs shrink until one record is alone, and grow again. Repeated replays for one reason are delayed."""

from __future__ import annotations

import pytest

from fcluster.worker.core.pieces import FACTOR, LARGE_RECORDS, WAIT_MS_MAX, Pieces, Replays


def shrunk(*failures: int) -> Pieces:
    pieces = Pieces()
    for records in failures:
        pieces.failed(records)
    return pieces


@pytest.mark.parametrize(
    ("failures", "records_max"),
    [
        ((500,), 62),
        ((500, 62), 7),
        ((500, 62, 7), 1),
        ((500, 62, 7, 1), 1),
        ((3,), 1),
        ((0,), 1),
        ((500, 9), 1),
    ],
)
def test_each_failure_divides_the_piece(failures: tuple[int, ...], records_max: int) -> None:
    assert shrunk(*failures).records_max == records_max


def test_commits_keep_the_size_while_the_record_may_still_be_ahead() -> None:
    pieces = shrunk(500)
    for _ in range(FACTOR):
        pieces.committed(62)
        assert pieces.records_max == 62
    pieces.committed(62)
    assert pieces.records_max == 62 * FACTOR


def test_commits_grow_it_at_once_when_the_record_is_condemned() -> None:
    pieces = shrunk(8)
    pieces.condemned()
    sizes: list[int | None] = []
    while pieces.records_max is not None:
        pieces.committed(1)
        sizes.append(pieces.records_max)
    assert sizes == [8, 64, 512, LARGE_RECORDS, None]


def test_commit_of_nothing_changes_nothing() -> None:
    pieces = shrunk(8)
    pieces.condemned()
    pieces.committed(0)
    assert pieces.records_max == 1


@pytest.mark.parametrize("records", [1, 7, 500, 100_000])
def test_any_bad_record_is_alone_after_few_epochs(records: int) -> None:
    for bad in {0, records // 3, records // 2, records - 1}:
        pieces, at, epochs = Pieces(), 0, 0
        while True:
            epochs += 1
            size = min(pieces.records_max or records, records - at)
            if not at <= bad < at + size:
                at += size
                pieces.committed(size)
            elif size == 1 and pieces.records_max is not None:
                break
            else:
                pieces.failed(size)
        assert epochs <= 60


def test_replays_for_one_reason_wait_longer_and_longer_until_a_commit() -> None:
    replays = Replays()
    assert [(replays.failed(f"epoch {number}: no", 1000), replays.due_ms) for number in range(4)] == [
        (1, 1000),
        (2, 1100),
        (3, 1200),
        (4, 1300),
    ]
    for _ in range(100):
        replays.failed("epoch 9: no", 1000)
    assert replays.due_ms == 1000 + WAIT_MS_MAX
    assert replays.failed("something else", 1000) == 1
    replays.failed("something else", 1000)
    replays.committed()
    assert (replays.failed("something else", 1000), replays.due_ms) == (1, 1000)
