"""Fences transactional ids: aborts their open transactions, and makes Kafka refuse their earlier owners.

Responsible for: fencing one id, as fast as Kafka allows. Invariant: when a fence is confirmed, no transaction
of an earlier producer with that id can commit any more. Must not know who owns the id.
"""

from __future__ import annotations

import time
from typing import Final

from confluent_kafka import KafkaException, Producer

from fcluster.common.settings import Settings
from fcluster.kafka.asking import (
    ATTEMPT_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
    asking,
    cause_of,
    remaining_s,
    unavailable,
)
from fcluster.kafka.clients import make_producer

FENCE_FIRST_WAIT_S: Final = 0.03
"""How long to wait for the first of two fencing producers. It takes 5 ms for an idle id. The broker needs
about 20 ms to abort an open transaction, which is then complete when the second one asks."""
FENCE_RESTING_WAIT_S: Final = 1.0
"""How long a fencing producer that was connected before may take to confirm that it still is."""


def fencing_producers(settings: Settings, transactional_id: str) -> list[Producer]:
    """Two connected producers, for `fence_transactional_id`. They have no effect until they are used.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """
    producers = [make_producer(settings, transactional_id) for _ in range(2)]
    with asking(settings, f"connecting to fence {transactional_id!r}"):
        for producer in producers:
            producer.list_topics(timeout=REQUEST_TIMEOUT_S)
    return producers


def fence_transactional_id(
    settings: Settings,
    transactional_id: str,
    timeout_s: float = REQUEST_TIMEOUT_S,
    ready: list[Producer] | None = None,
) -> None:
    """Abort open transactions of the id, and make the next call of its previous owner fail.

    When this returns, no transaction of any earlier producer with this id can commit any more. It takes about
    60 ms for an idle id, and 90 ms with an open transaction. Calling it again does no harm.

    Args:
        settings: the cluster's settings.
        transactional_id: the id to fence.
        timeout_s: the time limit for the whole call.
        ready: from `fencing_producers`, to save time. It is emptied.

    Raises:
        KafkaUnavailable: the broker didn't confirm it in time; the id may or may not be fenced.
    """
    deadline = time.monotonic() + timeout_s
    wait_s = FENCE_FIRST_WAIT_S
    # If a producer meets the open transaction during its initialisation, it sleeps for a fixed 500 ms before
    # it asks again. Another producer with the same id that asks a moment later finds the transaction aborted.
    # The sleeping producer is destroyed here, before anyone else uses the id: if it asked again, it would
    # fence the next owner.
    connected = [] if ready is None else ready
    resting = len(connected)
    producer = connected.pop() if connected else make_producer(settings, transactional_id)
    while True:
        # If it is created only now, it connects while the first one asks.
        spare = connected.pop() if connected else make_producer(settings, transactional_id)
        try:
            # A producer that was connected long ago may ask a broker that hangs. Then it is the next one's
            # turn.
            connects_s = FENCE_RESTING_WAIT_S if resting > 0 else ATTEMPT_TIMEOUT_S
            resting -= 1
            producer.list_topics(timeout=min(connects_s, remaining_s(deadline)))
            producer.init_transactions(min(wait_s, remaining_s(deadline)))
            return
        except KafkaException as error:
            cause = cause_of(error)
            hopeless = cause.fatal() or not (cause.retriable() or cause.name() in _FENCE_AGAIN)
            if hopeless or time.monotonic() >= deadline:
                raise unavailable(settings, f"fencing {transactional_id!r}", cause) from error
        producer = spare
        wait_s = min(wait_s * 4, 2.0)


_FENCE_AGAIN: Final = frozenset(
    {"_TIMED_OUT", "_TRANSPORT", "_ALL_BROKERS_DOWN", "_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH"}
    | {"CONCURRENT_TRANSACTIONS", "COORDINATOR_NOT_AVAILABLE", "NOT_COORDINATOR"}
)
