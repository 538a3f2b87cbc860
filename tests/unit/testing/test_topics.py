"""Topics in memory: what readers see before and after a transaction ends."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster.common.isolation import Isolation
from fcluster.testing.driver import _size_bytes  # pyright: ignore[reportPrivateUsage]
from fcluster.testing.topics import Topics, Visibility

ISOLATIONS: tuple[Isolation, ...] = ("read-committed", "read-uncommitted")


def add(topics: Topics, value: bytes, visibility: Visibility, partition: int = 0) -> None:
    topics.add("t", partition, b"k", value, 1, None, visibility)


def seen(topics: Topics, isolation: Isolation, offset: int = 0) -> list[bytes | None]:
    return [record.value() for record in topics.partitions("t")[0].read(offset, isolation)]


def test_open_records_are_visible_to_read_uncommitted_only() -> None:
    topics = Topics({"t": 1})
    add(topics, b"1", Visibility.COMMITTED)
    add(topics, b"2", Visibility.OPEN)
    assert seen(topics, "read-committed") == [b"1"]
    assert seen(topics, "read-uncommitted") == [b"1", b"2"]


def test_read_committed_stops_before_an_open_record() -> None:
    topics = Topics({"t": 1})
    add(topics, b"1", Visibility.OPEN)
    add(topics, b"2", Visibility.COMMITTED)
    assert seen(topics, "read-committed") == []
    topics.commit()
    assert seen(topics, "read-committed") == [b"1", b"2"]


def test_aborted_records_keep_their_offsets_and_are_skipped() -> None:
    topics = Topics({"t": 1})
    add(topics, b"1", Visibility.OPEN)
    topics.abort()
    add(topics, b"2", Visibility.OPEN)
    topics.commit()
    first = topics.partitions("t")[0].first_from(0, "read-committed")
    assert first is not None
    assert (first.offset(), first.value()) == (1, b"2")
    assert seen(topics, "read-uncommitted") == [b"1", b"2"]


@given(st.lists(st.sampled_from(["send", "write", "commit", "abort"]), max_size=30))
def test_read_committed_never_retracts_records(steps: list[str]) -> None:
    topics = Topics({"t": 1})
    given_before: list[bytes | None] = []
    for number, step in enumerate(steps):
        if step in ("send", "write"):
            add(topics, b"%d" % number, Visibility.COMMITTED if step == "send" else Visibility.OPEN)
        else:
            topics.commit() if step == "commit" else topics.abort()
        now = seen(topics, "read-committed")
        assert now[: len(given_before)] == given_before
        given_before = now


def test_value_decides_the_partition_without_a_key() -> None:
    topics = Topics({"t": 8})
    chosen = {topics.partition_for("t", None, b"%d" % number) for number in range(50)}
    assert len(chosen) > 4
    assert topics.partition_for("t", None, None) == topics.partition_for("t", None, None)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=100)


@settings(max_examples=60)
@given(
    st.none() | st.binary(max_size=80),
    st.lists(st.tuples(texts, st.none() | st.binary(max_size=150)), max_size=3),
)
def test_size_equals_the_real_clients(key: bytes | None, headers: list[tuple[str, Any]]) -> None:
    bound = 4_000
    producer = Producer({"bootstrap.servers": "127.0.0.1:1", "message.max.bytes": bound, "log_level": 0})
    room = bound - _size_bytes(b"", key, headers)
    producer.produce("t", b"x" * room, key, headers=headers)
    with pytest.raises(KafkaException, match="MSG_SIZE_TOO_LARGE"):
        producer.produce("t", b"x" * (room + 1), key, headers=headers)
    producer.purge()
    producer.flush(1)
