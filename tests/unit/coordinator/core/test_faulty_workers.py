"""Workers with valid keys that send messages with the right types and absurd contents.

Messages take the same way as in the coordinator's process: encoded, through the gate, into the core. Such a
worker may only harm its own session. An honest worker's session continues, and nothing ever raises.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.failures import Failure, FailureKind
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import Phase, Terms
from fcluster.coordinator.gate import Gate
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus, WorkerStats
from fcluster.wire.transport import FrameReceived
from tests.unit.coordinator.coordinator_harness import STORE, VERSION, one_stage

HONEST, LIARS = b"honest", (b"liar-1", b"liar-2", b"stranger")
TOPOLOGY = one_stage()
SETTINGS = Settings()
FIRST_SESSION = 1_000_000_001


class Cluster:
    """The core, with a journal and fences that work at once, one honest worker, and all other senders."""

    def __init__(self) -> None:
        terms = Terms(
            term=1,
            topology=TOPOLOGY,
            partitions={"in": 4},
            settings=SETTINGS,
            expected_workers=1,
            version=VERSION,
        )
        self.now_ms = 1_000.0
        self.gate = Gate(1, secured=True)
        self.core = Coordinator.recover({}, terms, self.now_ms)
        self.session = 0
        self.completed: list[int] = []
        self.journal: dict[str, Any] = {}
        self.sessions_of: dict[bytes, int] = {}
        self.orders_heard = 0
        self.sent: dict[bytes, list[messages.FromCoordinator]] = {}
        self.feed(events.Started())

    def say(self, peer: bytes, message: messages.ToCoordinator, role: str = "worker") -> None:
        admitted = self.gate.admit(FrameReceived(peer, messages.encode(message), role))
        if admitted is not None and not isinstance(admitted, messages.Refused):
            self.feed(events.MessageReceived(peer, admitted))

    def feed(self, event: events.Event) -> None:
        waiting = [event]
        while waiting:
            effects = self.core.handle(waiting.pop(0), self.now_ms)
            self.core.invariants()
            deadline_ms = self.core.next_deadline_ms()
            assert deadline_ms is None or deadline_ms > self.now_ms, "the shell would loop without end"
            for effect in effects:
                waiting += self.carry_out(effect)

    def carry_out(self, effect: events.Effect) -> list[events.Event]:
        match effect:
            case events.WriteJournal(sequence, entries):
                # What a later coordinator reads.
                self.journal |= msgspec.json.decode(msgspec.json.encode(entries))
                return [events.JournalWritten(sequence)]
            case events.FenceSlot(slot):
                return [events.SlotFenced(slot)]
            case events.SendMessage(peer, message):
                # Workers must be able to decode what is sent.
                received = messages.decode_from_coordinator(messages.encode(message))
                self.sent.setdefault(peer, []).append(received)
                if isinstance(received, messages.Welcome):
                    self.sessions_of[peer] = received.session
                if peer == HONEST:
                    return [events.MessageReceived(peer, answer) for answer in self.answers(received)]
            case _:
                pass
        return []

    def answers(self, message: messages.FromCoordinator) -> list[messages.FromWorker]:
        """The answers to the honest worker."""
        match message:
            case messages.Welcome(session=session):
                self.session = session
            case messages.Assign(session=session, shards=shards, number=number):
                self.orders_heard = number
                return [messages.ShardsRunning(session, [status(shard) for shard in shards])]
            case messages.Revoke(session=session, shards=shards, number=number):
                self.orders_heard = number
                return [messages.Released(session, shards, number)]
            case messages.Barrier(session=session, epoch=epoch):
                return [messages.Prepared(session, epoch, 1, 1.0, False)]
            case messages.Complete(session=session, epoch=epoch):
                self.completed.append(epoch)
                return [messages.Committed(session, epoch, 1.0, False, [])]
            case messages.Evicted() | messages.Refused() | messages.Shutdown():
                raise AssertionError(f"the honest worker was told {message}")
            case _:
                pass
        return []

    def pass_ms(self, duration_ms: float) -> None:
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            self.now_ms = min(end_ms, self.now_ms + 400)
            if self.session:
                self.feed(
                    events.MessageReceived(
                        HONEST, messages.Heartbeat(self.session, WorkerStats(), self.orders_heard)
                    )
                )
            self.feed(events.Tick())


def status(shard: ShardId) -> ShardStatus:
    return ShardStatus(shard, 0, 0, -1, False, 0)


def hello(worker: str, **changes: Any) -> messages.Hello:
    fields: dict[str, Any] = {
        "worker": worker,
        "host": "host",
        "pid": 1,
        "slot": -1,
        "session": 0,
        "owned": [],
        "epoch": 0,
        "prepared_epoch": 0,
        "dirty": False,
        "topology": TOPOLOGY.fingerprint,
        "snapshot_store": STORE,
        "version": VERSION,
    }
    return messages.Hello(**(fields | changes))


def _many(shard: ShardId) -> list[ShardId]:
    return [shard] * 300


# Small numbers meet what exists, large ones reach the limits of a type, and a few are beyond what the wire
# allows.
EPOCHS = st.sampled_from([0, 1, 2, 3, 9_999, 10_000, 10_001, 2**31, 2**53, -1, 2**53 + 1, 2**63 - 1])
SESSIONS = st.sampled_from([0, 1, *(FIRST_SESSION + n for n in range(6)), 2 * 10**9 + 1, 2**63 - 1, -1])
OFFSETS = st.sampled_from([0, 1, -1, -1001, 2**62, 2**63 - 1, -(2**63)])
TIMES = st.sampled_from([0.0, 1.0, 1e12, 1e300, -1.0, float("nan"), float("inf")])
SHARDS = st.builds(
    ShardId, st.sampled_from(["in", "", "elsewhere", "x" * 1000]), st.sampled_from([0, 1, 2, 3, 4, -1])
)
LISTS = st.lists(SHARDS, max_size=6) | SHARDS.map(_many)
STATUSES = st.lists(
    st.builds(ShardStatus, SHARDS, OFFSETS, OFFSETS, OFFSETS, st.booleans(), EPOCHS), max_size=5
)
STATS = st.builds(
    WorkerStats,
    records_in=EPOCHS,
    records_out=EPOCHS,
    commit_latency_ms_p50=TIMES,
    resident_bytes=OFFSETS,
    shards=STATUSES,
)
BOOLEANS = st.booleans()
HELLOS = st.builds(
    hello,
    st.sampled_from([*(peer.decode() for peer in LIARS), HONEST.decode(), ""]),
    slot=st.sampled_from([-1, 0, 1, 2, 9_999, 10_000, 2**31 - 1, -2]),
    session=st.just(0) | SESSIONS,
    owned=LISTS,
    epoch=st.just(0) | EPOCHS,
    prepared_epoch=st.just(0) | EPOCHS,
    in_flight_epoch=st.just(0) | EPOCHS,
    dirty=BOOLEANS,
    term=st.just(0) | EPOCHS,
    draining=BOOLEANS,
    host=st.sampled_from(["host", "", "x" * 255]),
    pid=st.sampled_from([1, 0, 2**40]),
    topology=st.sampled_from([TOPOLOGY.fingerprint] * 5 + ["other"]),
    version=st.sampled_from([VERSION] * 5 + ["0"]),
)
LIES = st.one_of(
    HELLOS,
    HELLOS,
    st.builds(messages.Heartbeat, SESSIONS, STATS, EPOCHS),
    st.builds(messages.Dirty, SESSIONS, BOOLEANS),
    st.builds(messages.Prepared, SESSIONS, EPOCHS, EPOCHS, TIMES, BOOLEANS),
    st.builds(messages.Committed, SESSIONS, EPOCHS, TIMES, BOOLEANS, STATUSES),
    st.builds(messages.ShardsRunning, SESSIONS, STATUSES),
    st.builds(messages.Released, SESSIONS, LISTS, EPOCHS),
    st.builds(messages.Drained, SESSIONS),
    st.builds(messages.Goodbye, SESSIONS),
    st.builds(messages.Leaving, SESSIONS),
    st.builds(
        messages.AgentReport,
        st.sampled_from([*(peer.decode() for peer in LIARS), HONEST.decode(), ""]),
        st.sampled_from([TOPOLOGY.job, "another"]),
        st.sampled_from(["host", "", "x" * 255]),
        EPOCHS,
        st.sampled_from([0, 1, 1000, 1001, -1]),
        st.lists(EPOCHS, max_size=5),
        EPOCHS,
        EPOCHS,
        BOOLEANS,
    ),
    st.builds(messages.DrainRequest, st.sampled_from(["0", "1", HONEST.decode(), ""])),
    st.builds(messages.ScaleRequest, EPOCHS, st.just({})),
    st.just(messages.StatusRequest()),
    st.just(messages.StopRequest()),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(LIARS), LIES)
    | st.tuples(st.just("own session"), st.sampled_from(LIARS), LIES)
    | st.tuples(st.just("gone"), st.sampled_from(LIARS))
    | st.tuples(st.just("wait"), st.sampled_from([1, 100, 4_000])),
    max_size=40,
)


def live(cluster: Cluster, steps: list[Any]) -> None:
    for step in steps:
        match step:
            case ("wait", int(duration_ms)):
                cluster.pass_ms(duration_ms)
            case ("gone", bytes(peer)):
                cluster.feed(events.PeerDisconnected(peer))
            case ("own session", bytes(peer), message):
                # A faulty worker that is a member lies in its own name.
                session = cluster.sessions_of.get(peer, 0)
                changes: dict[str, Any] = (
                    {"worker": peer.decode()} if isinstance(message, messages.Hello) else {}
                )
                if isinstance(message, messages.AgentReport):
                    changes["agent"] = peer.decode()
                if hasattr(message, "session"):
                    changes["session"] = session
                cluster.say(peer, msgspec.structs.replace(message, **changes))
            case (bytes(peer), message):
                cluster.say(peer, message)
            case _:
                raise AssertionError(step)


@given(STEPS)
def test_faulty_workers_only_harm_their_own_sessions(steps: list[Any]) -> None:
    cluster = Cluster()
    cluster.say(HONEST, hello("honest"))
    cluster.pass_ms(10)
    session = cluster.session
    assert session
    live(cluster, steps)
    assert cluster.session == session, "the honest worker lost its session"
    assert cluster.core.phase is Phase.RUNNING
    # The honest worker still does what it is told, and its next epoch is committed in time.
    committed = len(cluster.completed)
    cluster.say(HONEST, messages.Dirty(session, False))
    cluster.pass_ms(2_000)
    assert len(cluster.completed) == committed + 1
    # Epoch numbers stay in a range that all other parts can hold.
    assert cluster.core.epochs.highest < 2**31
    # When the faulty workers are gone, the honest one gets their shards back.
    for peer in LIARS:
        cluster.feed(events.PeerDisconnected(peer))
    cluster.pass_ms(2 * SETTINGS.session_timeout_ms + SETTINGS.checkpoint_timeout_ms)
    assert {shard.session for shard in cluster.core.shards.values()} == {session}
    assert len(msgspec.json.encode(cluster.core.status())) < 100_000
    recovered = Coordinator.recover(cluster.journal, cluster.core.terms, cluster.now_ms)
    recovered.handle(events.Started(), cluster.now_ms)
    recovered.invariants()


@given(STEPS, st.sampled_from([0, 1, 1_000_000]), STEPS)
def test_faulty_workers_may_fail_the_job_but_nothing_raises(
    before: list[Any], length: int, after: list[Any]
) -> None:
    cluster = Cluster()
    live(cluster, before)
    for peer in LIARS:
        cluster.say(peer, hello(peer.decode()))
        cluster.pass_ms(1_000)
        cluster.say(
            peer,
            messages.WorkerFailed(
                cluster.sessions_of.get(peer, 0),
                Failure(FailureKind.OTHER, length * "x", length * "x", length * "x"),
            ),
        )
    live(cluster, after)
    cluster.pass_ms(200_000)
    assert cluster.core.phase in (Phase.RUNNING, Phase.STOPPED)
    assert len(msgspec.json.encode(cluster.core.status())) < 200_000


@pytest.mark.parametrize("field", ["epoch", "prepared_epoch", "in_flight_epoch"])
@pytest.mark.parametrize("session", [0, FIRST_SESSION])
def test_worker_that_claims_impossible_epochs_is_refused(field: str, session: int) -> None:
    cluster = Cluster()
    cluster.say(b"liar-1", hello("liar-1"))
    cluster.say(b"liar-1", hello("liar-1", session=session, **{field: 2**53}))
    assert cluster.core.epochs.highest < 2**31
    refused = [message for message in cluster.sent[b"liar-1"] if isinstance(message, messages.Refused)]
    assert "epoch" in refused[0].reason


def test_memory_kept_for_each_worker_is_bounded() -> None:
    cluster = Cluster()
    many = [ShardId("in", number) for number in range(10_000)]
    for peer in LIARS:
        cluster.say(peer, hello(peer.decode(), owned=many))
        statuses = [status(shard) for shard in many]
        cluster.say(
            peer, messages.Heartbeat(cluster.sessions_of.get(peer, 0), WorkerStats(shards=statuses), 0)
        )
        cluster.say(peer, messages.Heartbeat(FIRST_SESSION, WorkerStats(shards=statuses), 0))
    assert cluster.sessions_of
    assert len(repr(cluster.core.sessions)) < 20_000
    assert len(repr(cluster.core.joiners)) < 20_000
    assert set(cluster.core.progress.standings) <= set(cluster.core.shards)


def test_text_of_a_failure_is_bounded() -> None:
    cluster = Cluster()
    cluster.say(b"liar-1", hello("liar-1"))
    cluster.say(
        b"liar-1",
        messages.WorkerFailed(
            FIRST_SESSION, Failure(FailureKind.OTHER, 3_000_000 * "x", 3_000_000 * "x", 3_000_000 * "x")
        ),
    )
    assert cluster.core.failure
    assert len(str(cluster.core.failure)) < 20_000
