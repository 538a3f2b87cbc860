"""The text of a shard's dead letters."""

from __future__ import annotations

import pytest

from fcluster.common.letter_counts import LETTER_COUNTS_CHARACTERS_MAX, decode_counts, encode_counts

TOPICS = ("dead", "other")


def test_counts_come_back() -> None:
    text = encode_counts(7, TOPICS, {"other": 3})
    assert decode_counts(text, 7, TOPICS) == {"dead": 0, "other": 3}
    assert encode_counts(7, TOPICS, {}) == encode_counts(7, (), {}) == ""
    assert decode_counts("", 7, TOPICS) == {}


@pytest.mark.parametrize(("start", "topics"), [(8, TOPICS), (7, ("dead",)), (7, ("dead", "third"))])
def test_counts_of_another_start_or_of_other_topics_do_not_count(start: int, topics: tuple[str, ...]) -> None:
    assert decode_counts(encode_counts(7, TOPICS, {"dead": 3}), start, topics) == {}


def test_many_topics_with_large_counts_fit() -> None:
    topics = tuple(f"dead-{number}" for number in range(20))
    assert len(encode_counts(2**31, topics, dict.fromkeys(topics, 2**31))) <= LETTER_COUNTS_CHARACTERS_MAX
