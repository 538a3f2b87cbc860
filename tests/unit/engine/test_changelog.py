from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.errors import StateDamaged
from fcluster.engine.changelog import Delta, DeltaReader, encode_delta, parse_record

OVERHEAD_BYTES = 40

changes_strategy = st.dictionaries(st.binary(max_size=12), st.binary(max_size=40), max_size=12)
delta_strategy = st.builds(
    lambda previous, step, changes: Delta(previous + step, previous, changes),
    st.integers(0, 2**40),
    st.integers(1, 2**40),
    changes_strategy,
)


def read_all(records: list[bytes], state_epoch: int, *, exactly_once: bool = True) -> list[Delta]:
    reader = DeltaReader("t-0", state_epoch, exactly_once=exactly_once)
    deltas = [reader.feed(offset, record) for offset, record in enumerate(records)]
    reader.finish()
    return [delta for delta in deltas if delta is not None]


def chain(*epochs: int, record_bytes_max: int = 900_000) -> list[list[bytes]]:
    """The records of the deltas of `epochs`, each of which follows the one before."""
    previous, result = 0, []
    for epoch in epochs:
        changes = {b"k": b'{"epoch":%d}' % epoch, b"long": b"x" * 40}
        result.append(encode_delta(Delta(epoch, previous, changes), record_bytes_max))
        previous = epoch
    return result


@given(delta_strategy, st.integers(OVERHEAD_BYTES + 1, OVERHEAD_BYTES + 200))
def test_any_delta_split_into_any_parts_is_read_back(delta: Delta, record_bytes_max: int) -> None:
    records = encode_delta(delta, record_bytes_max)
    assert all(len(record) <= record_bytes_max for record in records)
    assert read_all(records, delta.previous_epoch) == [delta]


def test_delta_larger_than_a_record_is_split_and_needs_every_part() -> None:
    delta = Delta(7, 3, {b"key": b"v" * 1000})
    records = encode_delta(delta, 200)
    assert len(records) == 7
    for missing in range(len(records)):
        with pytest.raises(StateDamaged):
            read_all(records[:missing] + records[missing + 1 :], 3)


@given(delta_strategy, st.data())
def test_any_damaged_byte_is_noticed(delta: Delta, data: st.DataObject) -> None:
    records = encode_delta(delta, 100)
    which = data.draw(st.integers(0, len(records) - 1))
    position = data.draw(st.integers(0, len(records[which]) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = bytearray(records[which])
    damaged[position] ^= flip
    records[which] = bytes(damaged)
    with pytest.raises(StateDamaged):
        read_all(records, delta.previous_epoch)


def test_every_single_byte_and_every_truncation_of_one_record_is_noticed() -> None:
    [record] = encode_delta(Delta(2, 1, {b"a": b"{}", b"b": b""}))
    for position in range(len(record)):
        damaged = record[:position] + bytes([record[position] ^ 0x40]) + record[position + 1 :]
        for bad in (damaged, record[:position]):
            with pytest.raises(StateDamaged):
                read_all([bad], 1)


def test_missing_epoch_is_noticed_in_both_modes() -> None:
    first, _, third = chain(4, 9, 12)
    for exactly_once in (True, False):
        with pytest.raises(StateDamaged, match="epoch 12 follows epoch 9, but the state is at epoch 4"):
            read_all(first + third, 0, exactly_once=exactly_once)


def test_tombstone_or_foreign_record_is_damage_named_with_its_offset() -> None:
    for record in (None, b"", b"hello, I am not a delta at all, really not"):
        with pytest.raises(StateDamaged, match=r"t-0 at offset 5") as raised:
            DeltaReader("t-0", 0).feed(5, record)
        assert raised.value.remedy


def test_repeated_epoch_is_damage_in_exactly_once_mode_and_returned_again_in_at_least_once_mode() -> None:
    first, second = chain(4, 9)
    with pytest.raises(StateDamaged):
        read_all(first + second + second, 0)
    deltas = read_all(first + second + first + second, 0, exactly_once=False)
    assert [delta.epoch for delta in deltas] == [4, 9, 4, 9]


def test_state_epoch_never_decreases_when_an_older_epoch_is_written_again() -> None:
    reader = DeltaReader("t-0", 0, exactly_once=False)
    first, second = chain(4, 9)
    for offset, record in enumerate(first + second + first):
        reader.feed(offset, record)
    assert reader.state_epoch == 9


def test_delta_left_incomplete_by_a_crash_is_skipped_in_at_least_once_mode_only() -> None:
    first, second = chain(4, 9, record_bytes_max=60)
    assert len(first) > 1
    cut_short = first[:-1] + first + second
    assert [delta.epoch for delta in read_all(cut_short, 0, exactly_once=False)] == [4, 9]
    with pytest.raises(StateDamaged, match="epoch 4 ends after"):
        read_all(cut_short, 0)


def test_partition_that_ends_within_a_delta_is_noticed() -> None:
    [records] = chain(4, record_bytes_max=60)
    with pytest.raises(StateDamaged, match="it ends after 1 of"):
        read_all(records[:1], 0)
    assert read_all(records[:1], 0, exactly_once=False) == []


def test_parts_of_two_deltas_are_never_joined() -> None:
    first = encode_delta(Delta(4, 0, {b"k": b"x" * 50}), 80)
    other = encode_delta(Delta(5, 0, {b"k": b"y" * 50}), 80)
    assert len(first) == len(other) == 2
    with pytest.raises(StateDamaged):
        read_all([first[0], other[1]], 0, exactly_once=False)


def test_epochs_that_do_not_increase_or_a_limit_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="can't follow"):
        encode_delta(Delta(3, 3, {}))
    with pytest.raises(ValueError, match="no room"):
        encode_delta(Delta(3, 2, {}), OVERHEAD_BYTES)


def test_offsets_of_several_inputs_are_read_back_and_damage_to_them_is_noticed() -> None:
    further = {"payments": 2**40, "zahlungen-\u00fc": 0}
    delta = Delta(5, 4, {b"k": b"v" * 200}, source_offset=17, further_offsets=further)
    records = encode_delta(delta, 150)
    assert len(records) > 1
    assert all(len(record) <= 150 for record in records)
    assert read_all(records, 4) == [delta]
    last = parse_record(records[-1])
    assert (last.source_offset, last.further_offsets) == (17, further)
    for position in range(len(records[0])):
        damaged = bytearray(records[0])
        damaged[position] ^= 0x40
        for bad in (bytes(damaged), records[0][:position]):
            with pytest.raises(StateDamaged):
                read_all([bad, *records[1:]], 4)


def test_delta_of_a_shard_with_one_input_is_written_as_before() -> None:
    [record] = encode_delta(Delta(2, 1, {b"a": b"{}"}, source_offset=7))
    header = "6663440202000000000000000100000000000000000000000100000007000000000000009b60c4d2"
    assert record.hex() == header + "010000000100000002000000617b7d"
