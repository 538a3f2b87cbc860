"""The reader of source topics, over a consumer that plays a script."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from fcluster.worker import consuming
from fcluster.worker.consuming import Idle, ReaderEvent, SourceReader

UNKNOWN = -1001
"""librdkafka's word for an offset that it doesn't know (yet)."""


class MarkersOnly:
    """A partition in which nothing stands behind the committed offset but a commit marker.

    The first answer of the broker comes late: until then neither position nor end is known.
    """

    def __init__(self, end: int, polls_before_answer: int) -> None:
        self._end = end
        self._polls_left = polls_before_answer

    def append_marker(self) -> None:
        """An aborted transaction: its records are never seen, but the position moves behind its marker."""
        self._end += 2

    def poll(self, _timeout_s: float) -> None:
        self._polls_left -= 1

    @property
    def _answered(self) -> bool:
        return self._polls_left <= 0

    def position(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        offset = self._end if self._answered else UNKNOWN
        return [TopicPartition(at.topic, at.partition, offset) for at in partitions]

    def get_watermark_offsets(self, _at: TopicPartition, *, cached: bool) -> tuple[int, int]:
        assert cached
        return (0, self._end) if self._answered else (UNKNOWN, UNKNOWN)

    def incremental_assign(self, _partitions: list[TopicPartition]) -> None: ...

    def incremental_unassign(self, _partitions: list[TopicPartition]) -> None: ...

    def close(self) -> None: ...


def test_partition_with_nothing_left_but_a_marker_is_reported_as_read_to_its_end() -> None:
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()

    def make(_fetching: Mapping[str, int]) -> Any:
        return MarkersOnly(end=8, polls_before_answer=3)

    reader = SourceReader(make, events.put, "reader")
    try:
        reader.start({("in", 0): 7})
        assert next_known(events) == Idle(reader, 1, {("in", 0): 8}, {("in", 0): 8})
    finally:
        reader.close(timeout_s=5)


def test_marker_that_comes_later_moves_the_position_of_an_idle_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consuming, "IDLE_LOOK_INTERVAL_S", 0.01)
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    consumer: Any = MarkersOnly(end=8, polls_before_answer=1)
    reader = SourceReader(lambda _fetching: consumer, events.put, "reader")
    try:
        reader.start({("in", 0): 7})
        next_known(events)
        consumer.append_marker()
        assert next_known(events) == Idle(reader, 1, {("in", 0): 10}, {("in", 0): 10})
    finally:
        reader.close(timeout_s=5)


def next_known(events: queue.SimpleQueue[ReaderEvent]) -> ReaderEvent:
    """The next event that tells an end."""
    while True:
        event = events.get(timeout=10)
        if not isinstance(event, Idle) or min(event.ends.values()) >= 0:
            return event
