"""Keeps repartition topics from growing: deletes records that their readers have committed.

Responsible for: deciding when to delete, and up to which offset. Invariant: a record is deleted only when it
is before the committed offset of its only reader (invariant 19). Must not run in the coordinator's loop:
`run` waits for Kafka.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from confluent_kafka import TopicPartition

from fcluster.common.errors import FclusterError
from fcluster.common.ids import ShardId
from fcluster.graph.topology import Topology
from fcluster.kafka.clients import Admin
from fcluster.kafka.offsets import delete_records_before

_log = logging.getLogger("fcluster.coordinator")

TRUNCATION_INTERVAL_S = 5.0
TRUNCATION_RECORDS_MIN = 10_000
"""If fewer records of a partition have been processed, a request isn't worth it."""


class Truncation:
    """From time to time, deletes the records of repartition topics that all readers have committed."""

    def __init__(self, topology: Topology, admin: Admin) -> None:
        self._sources = {
            (stage.name, number): source.topic.name
            for stage in topology.stages
            for number, source in enumerate(stage.inputs)
            if source.internal
        }
        self._admin = admin
        self._deleted_before: dict[TopicPartition, int] = {}
        self._failing_since_s: float | None = None
        self._due_s = time.monotonic() + TRUNCATION_INTERVAL_S

    def cap(self, timeout_ms: float | None) -> float | None:
        """The loop's timeout, short enough for this task."""
        if not self._sources:
            return timeout_ms
        mine_ms = max(0.0, (self._due_s - time.monotonic()) * 1000)
        return mine_ms if timeout_ms is None else min(timeout_ms, mine_ms)

    def is_due(self) -> bool:
        """Whether it is time. If so, the next time is one interval later."""
        if not self._sources or time.monotonic() < self._due_s:
            return False
        self._due_s = time.monotonic() + TRUNCATION_INTERVAL_S
        return True

    def run(self, committed: Mapping[tuple[ShardId, int], int]) -> None:
        """Delete records before the committed offsets, where it is worth it. Runs in the background
        thread.

        Args:
            committed: committed offsets, by shard and number of the input.
        """
        offsets: dict[TopicPartition, int] = {}
        for (shard, number), offset in committed.items():
            topic = self._sources.get((shard.stage, number))
            if topic is None:
                continue
            at = TopicPartition(topic, shard.partition)
            if offset - self._deleted_before.get(at, 0) >= TRUNCATION_RECORDS_MIN:
                offsets[at] = offset
        try:
            delete_records_before(self._admin, offsets)
        except FclusterError as error:
            # A failure is logged once, and again when it is over, because retries come every few seconds.
            # While leaders move, they fail.
            if self._failing_since_s is None:
                self._failing_since_s = time.monotonic()
                _log.warning("repartition topics aren't truncated, retrying: %s", error.message)
            return
        self._deleted_before.update(offsets)
        if offsets and self._failing_since_s is not None:
            failed_s = time.monotonic() - self._failing_since_s
            self._failing_since_s = None
            _log.info("repartition topics are truncated again, after %.0f s", failed_s)
