"""When a producer sends its records: when it is told to, and not while its thread would only spin.

A broker thread of librdkafka sends no more records of a partition while five or more records of it are
unacknowledged. If `linger.ms` of the next record has passed, or if the producer is being flushed, the thread
polls without a pause until the answer arrives (decision 0084). That takes a core, which the broker may need
to answer: while very many windows closed, outputs came 0.15 s later for that. So the epochs' producers linger
for longer than any answer takes, and are flushed explicitly, in short pulses.

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
PULSE_S: Final = 0.002
"""The time that the broker threads need to notice that they should send, on a busy machine."""
PAUSE_S: Final = 0.005
"""Between two pulses. An answer ends it. Short, since a busy machine's threads may not notice a pulse."""
HEALTHY_S: Final = 0.25
"""Healthy brokers answer within milliseconds. On a busy machine they answer within this time."""
LONG_PULSE_S: Final = 0.01
LONG_PAUSE_S: Final = 0.1
"""If brokers don't answer for some time, they are asked less often."""
NUDGE_S: Final = 0.001
"""The time that the broker threads need to notice that they should send."""


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
    if unacknowledged is not None and not unacknowledged():
        return 0  # others may still be on their way
    begun_s = time.monotonic()
    deadline_s = begun_s + timeout_s
    pulse_s, pause_s = PULSE_S, PAUSE_S
    while True:
        waiting = producer.flush(min(pulse_s, timeout_s))
        if unacknowledged is not None:
            waiting = unacknowledged()
        now_s = time.monotonic()
        if not waiting or now_s >= deadline_s:
            return waiting
        if now_s - begun_s >= HEALTHY_S:
            pulse_s, pause_s = LONG_PULSE_S, LONG_PAUSE_S
            look(producer)
        producer.poll(min(pause_s, deadline_s - now_s))
