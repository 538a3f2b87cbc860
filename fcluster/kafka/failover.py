"""Whether Kafka has finished its failover after the death of a broker.

Responsible for: answering that question. It is asked with a new client, which remembers no old leader or
coordinator. Must not decide what to do about the answer.
"""

from __future__ import annotations

import socket
from typing import Any, Final

from confluent_kafka import KafkaException, TopicPartition

from fcluster.common.ids import journal_topic
from fcluster.common.settings import Settings
from fcluster.kafka.clients import ErrorLog, make_consumer

ANSWER_S_MAX: Final = 2.0
CONNECT_TIMEOUT_S: Final = 1.0
UNREACHABLE_S_MAX: Final = 30.0
"""A broker that can't be connected to may count as a dead one for this long. A controller takes 9 s to notice
a death (`broker.session.timeout.ms`).
"""


def failover_is_over(
    settings: Settings, group: str, *, waited_s: float, timeout_s: float = ANSWER_S_MAX
) -> bool:
    """Whether new producers could commit: the group has a coordinator that answers, and every broker that
    Kafka lists accepts connections.

    A dead broker is listed until its session with the controller ends. Until then it may be a transaction
    coordinator, and no other broker can replace it. The question is asked with a new client, which remembers
    no old coordinator, and takes about `timeout_s` seconds.

    Args:
        settings: the caller's settings.
        group: the consumer group.
        waited_s: how long the caller has waited. After `UNREACHABLE_S_MAX`, an answer from the group's
            coordinator is enough, because this process may be the only one that can't connect to some broker.
        timeout_s: the time limit for each of the two questions.
    """
    # No offsets of the journal are ever committed, so the answer doesn't wait for a transaction.
    nowhere = TopicPartition(journal_topic(group), 0)
    consumer = make_consumer(
        settings, "read-uncommitted", **{"group.id": group, "error_cb": ErrorLog("", quiet=True)}
    )
    try:
        answer = consumer.committed([nowhere], timeout=timeout_s)
        if any(at.error is not None for at in answer):
            return False
        if waited_s >= UNREACHABLE_S_MAX:
            return True
        metadata: Any = consumer.list_topics(nowhere.topic, timeout=timeout_s)
        return all(accepts_connections(broker.host, broker.port) for broker in metadata.brokers.values())
    except KafkaException:
        return False
    finally:
        consumer.close()


def accepts_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
