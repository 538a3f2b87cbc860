"""The members of the job's consumer group are reported, or it is reported that they are unknown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.common.settings import resolve
from fcluster.coordinator.topic_watch import GroupMembers, look_at_group
from fcluster.kafka.clients import make_admin


class Admin:
    """Gives the answer that it was created with."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def list_groups(self, group: str, timeout: float) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def group(error: KafkaError | None = None, *members: tuple[str, str]) -> Any:
    named = [SimpleNamespace(client_id=client, client_host=host) for client, host in members]
    return SimpleNamespace(error=error, members=named)


@pytest.mark.parametrize(
    ("answer", "members"),
    [
        ([], []),
        ([group()], []),
        ([group(None, ("rdkafka", "/10.0.0.1"))], ["rdkafka at 10.0.0.1"]),
        ([group(KafkaError(KafkaError.COORDINATOR_NOT_AVAILABLE))], None),
        (KafkaException(KafkaError(KafkaError._PARTIAL)), None),
        (KafkaException(KafkaError(KafkaError._TIMED_OUT)), None),
    ],
    ids=["no group", "empty", "a member", "coordinator on the move", "a broker away", "nobody answers"],
)
def test_members_are_reported_or_unknown(answer: Any, members: list[str] | None) -> None:
    admin: Any = Admin(answer)
    assert GroupMembers(admin, "job").now() == members


def test_unknown_offset_makes_the_whole_answer_unknown() -> None:
    class Consumer:
        def committed(self, partitions: Any, timeout: float) -> Any:
            broken = SimpleNamespace(error=KafkaError(KafkaError._TIMED_OUT), offset=-1001)
            return [SimpleNamespace(error=None, offset=-1001), broken]

    admin: Any = Admin([])
    consumer: Any = Consumer()
    assert look_at_group(GroupMembers(admin, "job"), consumer, [("in", 0), ("in", 1)]) is None


@pytest.mark.parametrize(
    "request_of_a_group",
    [
        "alter_consumer_group_offsets",
        "delete_consumer_groups",
        "describe_consumer_groups",
        "list_consumer_group_offsets",
    ],
)
def test_admin_client_refuses_what_aborts_the_process(request_of_a_group: str) -> None:
    admin = make_admin(resolve({}, None, {}, {"brokers": "127.0.0.1:1"}))
    with pytest.raises(TypeError, match="must not ask a group's coordinator"):
        getattr(admin, request_of_a_group)(["job"])
