"""The benchmarks' records: their keys and sizes."""

from __future__ import annotations

from collections import Counter

import orjson

from benchmarks.records import Input, encode, key_numbers


def test_new_keys_come_first() -> None:
    numbers = list(key_numbers(Input(250, 100)))
    assert len(numbers) == 250
    assert set(numbers[:100]) == set(range(100))
    assert numbers[100:200] == numbers[:100]


def test_zipf_has_a_few_busy_keys_and_is_the_same_each_time() -> None:
    made = Input(25_000, 1_000, zipf=1.0)
    numbers = list(key_numbers(made))
    assert numbers == list(key_numbers(made))
    assert len(numbers) == 25_000
    assert set(numbers) <= set(range(1_000))
    counts = [count for _, count in Counter(numbers).most_common()]
    # The weights of 1,000 ranks add up to 7.49: the share of the first is 0.134, that of the second half of
    # it.
    assert 0.12 < counts[0] / 25_000 < 0.15
    assert 0.055 < counts[1] / 25_000 < 0.08


def test_values_are_filled_up_to_their_size() -> None:
    for size_bytes in (100, 1_000, 10_000):
        value = encode(12, "k7", 0, size_bytes)
        assert len(value) == size_bytes
        assert orjson.loads(value) | {"pad": ""} == {"id": 12, "key": "k7", "value": 12, "at": 0, "pad": ""}


def test_values_are_not_cut() -> None:
    assert orjson.loads(encode(1234, "k7", 99, 10)) == {"id": 1234, "key": "k7", "value": 234, "at": 99}
