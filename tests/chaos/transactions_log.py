"""Transactional ids as the broker remembers them, read from its internal topic.

Responsible for: finding which ids a job ever used, and the state of each. The client library lacks Kafka's
admin API for this, so the records of `__transaction_state` are decoded here, as far as needed.
"""

from __future__ import annotations

import struct

from confluent_kafka import Message

from tests.checker.reading import READ_UNCOMMITTED, partitions_of, read_topic

TOPIC = "__transaction_state"
STATES = (
    "Empty",
    "Ongoing",
    "PrepareCommit",
    "PrepareAbort",
    "CompleteCommit",
    "CompleteAbort",
    "Dead",
    "PrepareEpochFence",
)
AT_REST = {"Empty", "CompleteCommit", "CompleteAbort", "Dead"}


def transactional_ids_of(brokers: str, prefix: str) -> dict[str, str]:
    """Every transactional id that begins with `prefix`, with the name of its state."""
    if not partitions_of(brokers, TOPIC):
        return {}
    # The records of an id are in one partition, the newest one last.
    states = {
        identity: state
        for records in read_topic(brokers, TOPIC, READ_UNCOMMITTED, _decode).values()
        for identity, state in records
        if identity.startswith(prefix)
    }
    return {identity: state for identity, state in states.items() if state}


def ids_with_open_transaction(brokers: str, prefix: str) -> set[str]:
    """The ids among them that have an open transaction."""
    return {name for name, state in transactional_ids_of(brokers, prefix).items() if state == "Ongoing"}


def _decode(message: Message) -> tuple[str, str]:
    """Id and state. The state is empty if the id was forgotten."""
    key, value = message.key() or b"", message.value()
    _version, length = struct.unpack_from(">hh", key)
    identity = key[4 : 4 + length].decode()
    if value is None:
        return identity, ""
    # Version, producer id, its epoch, the timeout, the state. The rest isn't needed.
    *_, state = struct.unpack_from(">hqhib", value)
    return identity, STATES[state]
