"""What this Kafka user may do with topics, as the brokers say.

Responsible for: asking for it (`rights_on`). Rule: a missing answer proves nothing. Brokers without ACLs
allow everything. Must not decide which rights a job needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from fcluster.kafka.asking import REQUEST_TIMEOUT_S, cause_of, untyped

_HIDDEN: Final = "TOPIC_AUTHORIZATION_FAILED"


def rights_on(admin: AdminClient, topics: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """The operations that are allowed on each topic, such as "READ". None at all if the user may not even see
    the topic. Topics that don't exist, or about which the brokers say nothing, have no entry.
    """
    wanted = sorted(set(topics))
    if not wanted:
        return {}
    try:
        futures: dict[str, Future[Any]] = untyped(admin).describe_topics(
            TopicCollection(wanted), include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S
        )
    except KafkaException:
        return {}
    found = dict[str, frozenset[str]]()
    for topic, future in futures.items():
        try:
            operations = future.result(REQUEST_TIMEOUT_S + 1).authorized_operations
        except TimeoutError:
            continue
        except KafkaException as error:
            if cause_of(error).name() == _HIDDEN:
                found[topic] = frozenset()
            continue
        if operations:
            found[topic] = frozenset(operation.name for operation in operations)
    return found
