"""How large the producers' batches may be, so that no topic refuses together records that it would accept one
by one.

Responsible for: learning from a refusal. A broker compares a topic's `max.message.bytes` with a whole batch,
and refuses all its records. librdkafka doesn't split the batch and retry, as Kafka's own client does. So once
a topic has refused something because of its size, the next producers make no batch larger than that topic
accepts. A record that is refused after that is itself too large.

Must not: know which record was refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from confluent_kafka import KafkaError

from fcluster.common.settings import Settings

BATCH_BYTES = 1_000_000
"""librdkafka's default of `batch.size`."""
SHRINKING = 8
"""The factor by which batches become smaller if a topic's limit can't be seen."""
_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})


class Batches:
    """The limit on the batches of a worker's producers. It lasts as long as the worker.

    Args:
        settings: the worker's settings.
    """

    def __init__(self, settings: Settings, limit_of: Callable[[str], int | None]) -> None:
        kafka = settings.kafka
        wanted = kafka.get("producer.batch.size", kafka.get("batch.size", ""))
        self._bytes_max = int(wanted) if wanted.isdigit() else BATCH_BYTES
        self._limit_of = limit_of
        self._learned = False
        self._refused: set[str] = set()

    def refused(self, topic: str, code: int | None) -> None:
        """`topic` has refused what was written to it, with Kafka's error `code`. May be called from any
        thread.
        """
        if code in _TOO_LARGE and topic:
            self._refused.add(topic)

    def producer_config(self) -> Mapping[str, int]:
        """The configuration for the next producers. It asks Kafka if a topic has refused something, which may
        take some seconds.
        """
        while self._refused:
            self._learn(self._refused.pop())
        return {"batch.size": self._bytes_max} if self._learned else {}

    def _learn(self, topic: str) -> None:
        limit = self._limit_of(topic)
        if limit is None:
            limit = self._bytes_max // SHRINKING
        self._bytes_max = max(1, min(self._bytes_max, limit))
        self._learned = True
