"""Who may send what to the coordinator: each kind of message, with each role."""

from __future__ import annotations

import logging
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.coordinator.gate import Gate
from fcluster.wire import messages
from fcluster.wire.keys import Role
from fcluster.wire.messages import Message
from fcluster.wire.transport import FrameReceived

FAILURE = Failure.of_text("reason")
HELLO = messages.Hello(
    worker="w1",
    host="h",
    pid=1,
    slot=-1,
    session=0,
    owned=[],
    epoch=0,
    prepared_epoch=0,
    dirty=False,
    topology="t",
    snapshot_store="s",
    version="v",
)
FROM_WORKER: list[Message] = [
    HELLO,
    messages.Heartbeat(1, messages.WorkerStats(), 0),
    messages.Dirty(1, backlog=False),
    messages.Prepared(1, 1, 1, 1.0, backlog=False),
    messages.Committed(1, 1, 1.0, dirty=False, shards=[]),
    messages.ShardsRunning(1, []),
    messages.TornTransaction(1, ShardId("flights", 0), True, FAILURE),
    messages.Released(1, [], 1),
    messages.Drained(1),
    messages.WorkerFailed(1, FAILURE),
    messages.RecordOverdue(1, ShardId("in", 0), 1, "reason"),
    messages.RecordBegun(1, ShardId("in", 0), 1, "step", "record"),
    messages.RecordEnded(1),
    messages.Leaving(1),
    messages.Goodbye(1),
]
REPORT = messages.AgentReport("w1", "j", "h", 1, 1, [2], 0, 0)
FROM_ADMIN: list[Message] = [
    messages.StatusRequest(),
    messages.StopRequest(),
    messages.DrainRequest("0"),
    messages.ScaleRequest(1),
]
LEADER_CHECK = messages.LeaderCheck("standby")
ALL = [*FROM_WORKER, REPORT, *FROM_ADMIN, LEADER_CHECK]


def received(message: Message, role: str = "", peer: bytes = b"w1") -> FrameReceived:
    return FrameReceived(peer, messages.encode(message), role)


def test_the_lists_are_complete() -> None:
    assert [type(message) for message in FROM_WORKER] == list(get_args(messages.FromWorker))
    assert [type(message) for message in FROM_ADMIN] == list(get_args(messages.FromAdmin))


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("role", [*Role, "", "None", "owner"])
def test_each_role_may_send_only_its_own_messages(message: Message, role: str) -> None:
    gate = Gate(term=7, secured=True)
    allowed = {
        "worker": [*FROM_WORKER, REPORT],
        "admin": FROM_ADMIN,
        "coordinator": [LEADER_CHECK],
    }.get(role, [])
    admitted = gate.admit(received(message, role))
    if message in allowed:
        assert admitted == message
        assert gate.unauthorised_frames == 0
        return
    assert gate.unauthorised_frames == 1
    if message in (HELLO, *FROM_ADMIN):
        assert isinstance(admitted, messages.Refused)
        assert admitted.term == 7
        assert not admitted.retry
        assert ("worker.key" if message == HELLO else "admin.key") in admitted.reason
    else:
        assert admitted is None


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_without_security_everybody_may_send_everything(message: Message) -> None:
    assert Gate(term=1, secured=False).admit(received(message)) == message


@pytest.mark.parametrize("secured", [True, False])
def test_nobody_can_send_in_the_name_of_another_worker_or_agent(secured: bool) -> None:
    gate = Gate(term=1, secured=secured)
    assert gate.admit(received(HELLO, "worker", peer=b"w2")) is None
    assert gate.admit(received(REPORT, "worker", peer=b"w2")) is None
    assert gate.malformed_frames == 2


@given(st.binary(max_size=200), st.sampled_from([*Role, ""]))
def test_no_frame_raises(frame: bytes, role: str) -> None:
    gate = Gate(term=1, secured=True)
    for start in (b"", b"\x01"):
        gate.admit(FrameReceived(b"w1", start + frame, role))
    assert gate.malformed_frames >= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", -1), ("epoch", 2**60), ("session", -1), ("slot", 2**40), ("worker", "w" * 256), ("pid", "1")]
    + [("host", f"h{character}") for character in "\x1b\n\r\0\x7f\x9b\u2028"],
)
def test_frame_with_a_field_out_of_range_is_malformed(field: str, value: object) -> None:
    fields = msgspec.structs.asdict(HELLO) | {field: value, "type": "Hello"}
    gate = Gate(term=1, secured=False)
    assert gate.admit(FrameReceived(b"w1", b"\x01" + msgspec.msgpack.encode(fields))) is None
    assert gate.malformed_frames == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_times_are_finite(value: float) -> None:
    gate = Gate(term=1, secured=False)
    assert gate.admit(received(messages.Committed(1, 1, value, dirty=False, shards=[]))) is None


def test_a_flood_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(term=1, secured=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            gate.admit(FrameReceived(b"w1", b"\xff" * 1000, "worker"))
            gate.admit(received(HELLO, "admin"))
            gate.note_handshake("reason")
    assert (gate.malformed_frames, gate.unauthorised_frames) == (1000, 1000)
    assert len(caplog.records) == 3 * 10
