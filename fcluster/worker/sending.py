"""When a producer sends its records: when it is told to, and not while its thread would only spin.

A broker thread of librdkafka may not send more records of a partition while five or more requests are in
flight. If `linger.ms` of the next record has passed, the thread polls without a pause until an answer arrives
(decision 0084). That takes a third of the CPU of a job with little to do, and whole cores for seconds while a
broker is down. So the epochs' producers linger for longer than any answer takes, and are flushed explicitly:
at once at each barrier, and in short pulses if that takes long.

Responsible for: the settings of those producers, and flushing them. Must not: know epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import Producer

from fcluster.common.settings import Settings
from fcluster.kafka.clients import LASTING

LINGER_MS_MAX: Final = 30_000
STICKY_MS: Final = 2
"""How long outputs without a key go to the same partition. By default it is twice the linger."""
AT_ONCE_S: Final = 0.25
"""Healthy brokers answer within milliseconds. On a busy machine they answer within this time."""
PAUSE_S: Final = 0.1
PULSE_S: Final = 0.01
NUDGE_S: Final = 0.001
"""The time that the broker threads need to notice that they should send."""
STEP_S: Final = 0.002
"""The client can only wait for all records at once. Whoever waits for some of them looks this often."""


def sending_config(settings: Settings) -> dict[str, Any]:
    """librdkafka's settings for a producer that is flushed by these functions."""
    return {
        # Records time out with their transaction, and must not linger for longer.
        "linger.ms": min(LINGER_MS_MAX, settings.transaction_timeout_ms // 4),
        "sticky.partitioning.linger.ms": STICKY_MS,
        **LASTING,
    }


def nudge(producer: Producer) -> int:
    """Let the producer send its records as far as it can. Returns how many aren't acknowledged yet.

    Takes up to 1 ms.
    """
    return producer.flush(NUDGE_S) if len(producer) else 0


def flush(
    producer: Producer,
    timeout_s: float,
    look: Callable[[Producer], None] = lambda _producer: None,
    unacknowledged: Callable[[], int] | None = None,
) -> int:
    """Let the producer send all its records, and wait until they are acknowledged. Returns how many aren't.

    Args:
        producer: the producer.
        timeout_s: how long to wait.
        look: called from time to time if it takes long. It raises errors that make waiting useless.
        unacknowledged: how many records there are still to wait for, if not for all.

    Raises:
        KafkaException: it can no longer send anything.
    """
    begun_s = time.monotonic()
    deadline_s = begun_s + timeout_s
    if unacknowledged is None:
        waiting = producer.flush(min(AT_ONCE_S, timeout_s))
    else:
        at_once_s = begun_s + min(AT_ONCE_S, timeout_s)
        while (waiting := unacknowledged()) and time.monotonic() < at_once_s:
            producer.flush(STEP_S)
    while waiting and (left_s := deadline_s - time.monotonic()) > 0:
        look(producer)
        producer.poll(min(PAUSE_S, left_s))  # an answer ends the wait
        waiting = producer.flush(PULSE_S)
        if unacknowledged is not None:
            waiting = unacknowledged()
    return waiting
