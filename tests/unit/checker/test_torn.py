"""The reader of markers in segment files, and what counts as a torn transaction."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checker.segments import (
    ABORT,
    COMMIT,
    OPEN,
    Place,
    Written,
    batches_in,
    partitions_below,
    read_partition,
    written_in,
)
from tests.checker.torn import Told, judge

OFFSETS, CHANGELOG, OUTPUT = ("__consumer_offsets", 3), ("changelog", 0), ("out", 5)
SOURCE = ("", 0)
TRANSACTIONAL, CONTROL, LZ4 = 0x10, 0x20, 3


def batch(first: int, count: int, producer: tuple[int, int], attributes: int, body: bytes = b"\x00") -> bytes:
    length = 61 - 12 + len(body)
    header = struct.pack(">qiibIhiqqqhi", first, length, 0, 2, 0, attributes, count - 1, 0, 0, *producer, 0)
    return header + struct.pack(">I", count) + body


def data(first: int, count: int, producer: tuple[int, int], *, compressed: bool = False) -> bytes:
    return batch(first, count, producer, TRANSACTIONAL | (LZ4 if compressed else 0))


def marker(at: int, producer: tuple[int, int], kind: int) -> bytes:
    key = struct.pack(">hh", 0, kind)
    # Length, attributes, both deltas, the key with its length, a value of six bytes, no headers.
    record = b"\x00\x00\x00" + bytes([2 * len(key)]) + key + bytes([2 * 6]) + b"\x00" * 6 + b"\x00"
    return batch(at, 1, producer, TRANSACTIONAL | CONTROL, bytes([2 * len(record)]) + record)


def commit(at: int, producer: tuple[int, int]) -> bytes:
    return marker(at, producer, 1)


def abort(at: int, producer: tuple[int, int]) -> bytes:
    return marker(at, producer, 0)


def parts(place: Place, *batches: bytes) -> list[Written]:
    return written_in(place, batches_in(b"".join(batches)))


def test_records_of_a_producer_end_at_its_marker() -> None:
    found = parts(
        OUTPUT,
        data(0, 3, (7, 1), compressed=True),
        data(3, 1, (8, 0)),
        data(4, 2, (7, 1)),
        batch(6, 5, (-1, -1), 0),  # from a producer without transactions
        commit(11, (7, 1)),
        abort(12, (8, 1)),  # written by the producer that fenced it
        data(13, 1, (7, 1)),
        marker(14, (7, 1), 2),  # a control record that isn't a marker
    )
    assert found == [
        Written(OUTPUT, 7, 1, 0, 5, COMMIT, 11),
        Written(OUTPUT, 8, 0, 3, 3, ABORT, 12),
        Written(OUTPUT, 7, 1, 13, 13, OPEN),
    ]


def test_marker_without_records_and_repeated_marker_end_nothing() -> None:
    found = parts(OUTPUT, abort(0, (7, 1)), data(1, 1, (7, 2)), commit(2, (7, 2)), commit(3, (7, 2)))
    assert found == [Written(OUTPUT, 7, 2, 1, 1, COMMIT, 2)]


@pytest.mark.parametrize("length", [0, 12, 60, 61, 100])
def test_incomplete_batch_ends_the_segment(length: int) -> None:
    whole = data(0, 1, (7, 1)) + commit(1, (7, 1))
    unfinished = data(2, 1, (7, 1))
    assert parts(OUTPUT, whole, unfinished[: min(length, len(unfinished) - 1)]) == parts(OUTPUT, whole)
    assert parts(OUTPUT, whole, bytes(length)) == parts(OUTPUT, whole)  # preallocated space


def test_segments_of_a_partition_are_read_one_after_the_other(tmp_path: Path) -> None:
    for node in ("node-1", "node-2"):
        directory = tmp_path / node / "logs" / "a-topic-5"
        directory.mkdir(parents=True)
        (directory / "00000000000000000000.log").write_bytes(data(0, 2, (7, 1)))
        (directory / "00000000000000000002.log").write_bytes(commit(2, (7, 1)))
        (directory / "00000000000000000002.index").write_bytes(b"")
    (tmp_path / "node-1" / "kafka-5").mkdir()
    (tmp_path / "node-1" / "kafka-5" / "server.log").write_bytes(b"no segment")
    found = partitions_below(tmp_path)
    assert {place: len(replicas) for place, replicas in found.items()} == {("a-topic", 5): 2}
    for replica in found["a-topic", 5]:
        assert read_partition(replica, OUTPUT) == [Written(OUTPUT, 7, 1, 0, 1, COMMIT, 2)]


TOLD = {
    OFFSETS: {0: Told(10, SOURCE, 100), 2: Told(11, SOURCE, 120)},
    CHANGELOG: {0: Told(10), 2: Told(11)},
    OUTPUT: {0: Told(source=SOURCE, position=99), 2: Told(source=SOURCE, position=100)},
}
EPOCH_10 = [part for at in TOLD for part in parts(at, data(0, 1, (7, 1)), commit(1, (7, 1)))]


def epoch_11(at: Place, ended: bytes) -> list[Written]:
    return parts(at, data(2, 1, (7, 1)), ended)


def test_transaction_with_one_outcome_everywhere_is_whole() -> None:
    committed = [part for at in TOLD for part in epoch_11(at, commit(3, (7, 1)))]
    found = judge(EPOCH_10 + committed, TOLD)
    assert (found.torn, found.whole, found.untold) == ([], 2, 0)


def test_producer_that_keeps_its_epoch_is_not_a_torn_transaction() -> None:
    """Epoch 10 was committed and epoch 11 aborted, by the same producer with the same producer epoch."""
    aborted = [part for at in TOLD for part in epoch_11(at, abort(3, (7, 2)))]
    found = judge(EPOCH_10 + aborted, TOLD)
    assert (found.torn, found.whole) == ([], 2)
    # The same if a partition has nothing of epoch 11, and its last marker says COMMIT.
    found = judge(EPOCH_10 + [one for one in aborted if one.place != CHANGELOG], TOLD)
    assert (found.torn, found.whole) == ([], 2)


def test_replay_of_an_epoch_by_the_next_producer_is_not_a_torn_transaction() -> None:
    aborted = [part for at in TOLD for part in epoch_11(at, abort(3, (7, 2)))]
    again = [part for at in TOLD for part in parts(at, data(4, 1, (7, 2)), commit(5, (7, 2)))]
    told = {at: {**rows, 4: rows[2]} for at, rows in TOLD.items()}
    found = judge(EPOCH_10 + aborted + again, told)
    assert (found.torn, found.whole, found.untold) == ([], 3, 0)


def replayed(aborted: set[Place]) -> tuple[list[Written], dict[Place, dict[int, Told]]]:
    """Epoch 11 is aborted, and the same producer, with the same producer epoch, replays it as epoch 13. Of
    epoch 11, only these partitions had anything.
    """
    again = {
        OFFSETS: Told(13, SOURCE, 120),
        CHANGELOG: Told(13),
        OUTPUT: Told(source=SOURCE, position=100),
    }
    told = {
        at: {0: rows[0], 4: again[at]} | ({2: rows[2]} if at in aborted else {}) for at, rows in TOLD.items()
    }
    written = list(EPOCH_10)
    for at in TOLD:
        batches = [data(2, 1, (7, 1)), abort(3, (7, 1))] if at in aborted else []
        written += parts(at, *batches, data(4, 1, (7, 1)), commit(5, (7, 1)))
    return written, told


@pytest.mark.parametrize("aborted", [{OFFSETS, CHANGELOG, OUTPUT}, {CHANGELOG, OUTPUT}, {OUTPUT}])
def test_replay_by_the_same_producer_is_not_a_torn_transaction(aborted: set[Place]) -> None:
    found = judge(*replayed(aborted))
    assert (found.torn, found.untold) == ([], 0)


@pytest.mark.parametrize("torn_off", [OFFSETS, CHANGELOG, OUTPUT], ids=["offsets", "changelog", "output"])
def test_torn_replay_by_the_same_producer_is_found(torn_off: Place) -> None:
    written, told = replayed(set(TOLD))
    newest = next(one for one in reversed(written) if one.place == torn_off)
    (torn,) = judge([one for one in written if one != newest] + [replace(newest, outcome=ABORT)], told).torn
    assert torn.epoch == 13


def test_output_committed_of_an_aborted_epoch_that_is_replayed_is_torn() -> None:
    written, told = replayed(set(TOLD))
    first = next(one for one in written if one.place == OUTPUT and one.outcome == ABORT)
    (torn,) = judge([one for one in written if one != first] + [replace(first, outcome=COMMIT)], told).torn
    assert torn.epoch == 11


@pytest.mark.parametrize("torn_off", list(TOLD), ids=["offsets", "changelog", "output"])
def test_transaction_committed_in_one_partition_and_aborted_in_another_is_torn(torn_off: Place) -> None:
    ended = {at: abort(3, (7, 2)) if at == torn_off else commit(3, (7, 1)) for at in TOLD}
    found = judge(EPOCH_10 + [part for at in TOLD for part in epoch_11(at, ended[at])], TOLD)
    assert found.whole == 1
    (torn,) = found.torn
    assert (torn.producer_id, torn.producer_epoch, torn.epoch) == (7, 1, 11)
    assert [one.place for one in torn.parts if one.outcome == ABORT] == [torn_off]
    assert f"{torn_off[0]}/{torn_off[1]} 2 to 2: ABORT at 3" in str(found)


def test_part_that_cannot_be_attributed_is_counted_and_not_judged() -> None:
    silent = {at: rows for at, rows in TOLD.items() if at != OUTPUT}
    ended = {at: abort(3, (7, 2)) if at == OUTPUT else commit(3, (7, 1)) for at in TOLD}
    found = judge(EPOCH_10 + [part for at in TOLD for part in epoch_11(at, ended[at])], silent)
    assert (found.torn, found.whole, found.untold) == ([], 2, 2)
