"""Several brokers for tests: which of them leads what, and when all are whole again.

Responsible for: finding the broker that a fault has to hit (the leader of a partition, the coordinator of a
group or of a transactional id, the active controller), and waiting until every replica is in sync. It asks
the brokers themselves, with clients created for the question, so no cached metadata is used.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.harness import wait_until

OFFSETS, TRANSACTIONS = "__consumer_offsets", "__transaction_state"
ASK_S = 5.0
_DESCRIBE_QUORUM, _ALTER_REASSIGNMENTS = 55, 45


def metadata(brokers: str, timeout_s: float = 30.0) -> Any:
    """What a broker that answers reports about all topics and brokers."""

    def ask() -> Any:
        client = AdminClient({"bootstrap.servers": brokers, "log_level": 0})
        try:
            return client.list_topics(timeout=ASK_S)
        except KafkaException:
            return None

    return wait_until(ask, f"metadata of {brokers}", timeout_s, 0.1)


def leader_of(brokers: str, topic: str, partition: int) -> int:
    """The node id of the partition's leader. Waits until there is one."""

    def look() -> int | None:
        found = metadata(brokers).topics.get(topic)
        leader = found.partitions[partition].leader if found and partition in found.partitions else -1
        return leader if leader > 0 else None

    return wait_until(look, f"a leader of {topic}/{partition}", 60, 0.1)


def coordinator_of_group(brokers: str, group: str) -> int:
    """The node id of the broker that keeps the group's offsets."""
    return leader_of(brokers, OFFSETS, home_of(brokers, OFFSETS, group))


def coordinator_of_transactions(brokers: str, transactional_id: str) -> int:
    """The node id of the broker that coordinates the id's transactions."""
    return leader_of(brokers, TRANSACTIONS, home_of(brokers, TRANSACTIONS, transactional_id))


def home_of(brokers: str, topic: str, name: str) -> int:
    """The partition of an internal topic in which a group or an id is kept."""
    count = len(metadata(brokers).topics[topic].partitions)
    return (java_hash(name) & 0x7FFF_FFFF) % count


def java_hash(text: str) -> int:
    """The result of Java's `String.hashCode`, as an unsigned number."""
    found = 0
    for (unit,) in struct.iter_unpack(">H", text.encode("utf-16-be")):
        found = (31 * found + unit) & 0xFFFF_FFFF
    return found


def controller_of(brokers: str) -> int:
    """The node id of the active controller. Metadata doesn't tell (in KRaft it names any broker)."""

    def ask() -> int | None:
        for server in brokers.split(","):
            try:
                leader = _quorum_leader(server)
            except (OSError, struct.error, AssertionError):
                continue
            if leader > 0:
                return leader
        return None

    return wait_until(ask, "an active controller", 60, 0.1)


def _quorum_leader(server: str) -> int:
    """The leader according to a DescribeQuorum request of version 0, which the broker forwards to the
    controller.
    """
    topic = _compact(b"__cluster_metadata")
    # A compact array of one topic with a compact array of one partition; each ends with no tagged fields.
    answer = _ask(
        server, _DESCRIBE_QUORUM, b"\x02" + topic + b"\x02" + struct.pack(">i", 0) + b"\x00\x00\x00"
    )
    # Error; topics; name, partitions; index, error, leader.
    (error,) = struct.unpack_from(">h", answer)
    assert error == 0, f"DescribeQuorum: error {error}"
    at = 3 + answer[3]
    _index, failed, leader = struct.unpack_from(">ihi", answer, at + 1)
    assert failed == 0, f"DescribeQuorum: error {failed}"
    return leader


def reassign(brokers: str, replicas: Mapping[tuple[str, int], Sequence[int]]) -> None:
    """Give partitions other replicas, or the same ones in another order: the first is the preferred leader.

    The client library has no call for it.
    """
    topics = sorted({topic for topic, _ in replicas})
    body = struct.pack(">i", 30_000) + bytes([len(topics) + 1])
    for topic in topics:
        mine = {number: nodes for (name, number), nodes in replicas.items() if name == topic}
        body += _compact(topic.encode()) + bytes([len(mine) + 1])
        for number, nodes in mine.items():
            body += struct.pack(f">iB{len(nodes)}iB", number, len(nodes) + 1, *nodes, 0)
        body += b"\x00"
    answer = _ask(brokers.split(",")[0], _ALTER_REASSIGNMENTS, body + b"\x00")
    _throttle, error = struct.unpack_from(">ih", answer)
    assert error == 0, f"AlterPartitionReassignments: error {error}"


def _compact(text: bytes) -> bytes:
    assert len(text) < 127, text
    return bytes([len(text) + 1]) + text


def _ask(server: str, key: int, body: bytes) -> bytes:
    """The body of a broker's answer to a request of version 0 of an API with tagged fields."""
    host, _, port = server.rpartition(":")
    request = struct.pack(">hhih", key, 0, 1, -1) + b"\x00" + body
    with socket.create_connection((host, int(port)), timeout=ASK_S) as connection:
        connection.sendall(struct.pack(">i", len(request)) + request)
        (length,) = struct.unpack(">i", _receive(connection, 4))
        return _receive(connection, length)[5:]  # after correlation id and tags


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise OSError("connection closed")
        data += part
    return data


def behind(brokers: str, nodes: int) -> Mapping[str, str]:
    """What is wrong: brokers that are missing, and partitions without a leader or with a replica that isn't
    in sync.
    """
    found = metadata(brokers)
    wrong = dict[str, str]()
    if len(found.brokers) < nodes:
        wrong["brokers"] = f"{sorted(found.brokers)} of {nodes}"
    for name, topic in found.topics.items():
        for number, partition in topic.partitions.items():
            if partition.leader < 0 or len(partition.isrs) < len(partition.replicas):
                in_sync, replicas = sorted(partition.isrs), sorted(partition.replicas)
                wrong[f"{name}/{number}"] = f"leader {partition.leader}, in sync {in_sync} of {replicas}"
    return wrong


def wait_whole(brokers: str, nodes: int = 3, timeout_s: float = 90.0) -> None:
    """Wait until all brokers run and every replica of every topic is in sync."""
    last: list[Mapping[str, str]] = [{}]

    def whole() -> bool:
        last[0] = behind(brokers, nodes)
        return not last[0]

    try:
        wait_until(whole, "all replicas in sync", timeout_s, 0.25)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {dict(list(last[0].items())[:5])}") from None
