"""A coordinator with keys gets 100,000 hostile frames, while two workers continue to commit epochs."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import zmq
from confluent_kafka.admin import AdminClient as KafkaAdmin
from confluent_kafka.admin import NewTopic

from fcluster import __version__
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.kafka.clients import make_producer
from fcluster.storage.snapshot_store import store_identity
from fcluster.wire import messages
from fcluster.wire.admin_client import AdminClient, CoordinatorSilent, KeyRefused, RequestRefused
from fcluster.wire.discovery import Leader, find_leader
from fcluster.wire.keys import Keyring, Role, create_keys
from fcluster.wire.messages import MESSAGE_BYTES_MAX, MalformedMessageError, ShardStatus, WorkerStats
from fcluster.wire.security import ClientSecurity, client_security
from tests.harness import COORDINATOR, REPOSITORY, Cluster, memory_bytes, wait_until, wait_until_equal

FRAMES = 100_000
OVERSIZED = 50
STRANGERS = 50
GROWTH_BYTES_MAX = 64 * 1024 * 1024


class World:
    """The attacked cluster, and what its users see."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.keys = directory / "keys"
        create_keys(self.keys)
        self.settings = Settings(bootstrap_servers=brokers, security_keys_dir=str(self.keys))
        self.job, self.source = prefix + "job", prefix + "numbers"
        self.output = prefix + "totals"
        admin = KafkaAdmin({"bootstrap.servers": brokers})
        admin.create_topics([NewTopic(self.source, 4)])[self.source].result()
        self.cluster = Cluster(
            REPOSITORY / "tests/jobs/running_totals.py",
            brokers,
            directory / "data",
            env={
                "FCLUSTER_TEST_JOB": self.job,
                "FCLUSTER_TEST_SOURCE": self.source,
                "FCLUSTER_TEST_OUTPUT": self.output,
                "FCLUSTER_SECURITY_KEYS_DIR": str(self.keys),
            },
        )
        self.produced = 0
        self.producer = make_producer(self.settings)
        self.leader: Leader = None  # type: ignore[assignment]  # set by `start`

    def start(self) -> None:
        self.cluster.start()
        self.leader = wait_until(lambda: find_leader(self.settings, self.job), "a leader")
        wait_until_equal(lambda: self.status()["phase"], "running", "the first assignment")

    def security(self, role: Role) -> ClientSecurity:
        security = client_security(self.settings, role, self.leader.address)
        assert security is not None
        return security

    def status(self) -> dict[str, Any]:
        with AdminClient(self.leader.address, self.security(Role.ADMIN)) as client:
            try:
                return client.status(timeout_ms=10_000)
            except CoordinatorSilent as error:
                pytest.fail(f"{error}\n{self.cluster.logs()}")

    def produce(self, count: int) -> None:
        for number in range(self.produced, self.produced + count):
            value = {"id": number, "seq": number, "value": 1, "at": 0}
            self.producer.produce(self.source, key=str(number % 50), value=orjson.dumps(value))
            self.producer.poll(0)
        self.produced += count
        self.producer.flush(10)

    def all_is_committed(self) -> bool:
        shards = self.status()["shards"]
        committed = sum(max(0, shard["committed"]) for shard in shards)
        return committed == self.produced and not any(shard["dirty"] for shard in shards)


@pytest.fixture
def world(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[World]:
    world = World(kafka, topic_prefix, tmp_path)
    with world.cluster:
        world.start()
        yield world


class Attacker:
    """A connection with some key. `send` waits while the coordinator accepts no more."""

    def __init__(self, address: str, security: ClientSecurity | None, identity: bytes) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 30_000)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        if security is not None:
            security.apply(self.socket)
        self.socket.connect(address)

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(0)

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)
        while self.socket.poll(0):
            self.socket.recv_multipart()


class Expected:
    """How the coordinator should count what was sent."""

    def __init__(self) -> None:
        self.malformed = 0
        self.unauthorised = 0

    def count(self, frame: bytes, identity: bytes, role: Role) -> bytes:
        try:
            message = messages.decode_for_coordinator(frame)
        except MalformedMessageError:
            self.malformed += 1
            return frame
        names = {messages.Hello: "worker", messages.AgentReport: "agent"}
        name = names.get(type(message))
        if name is not None and getattr(message, name).encode() != identity:
            self.malformed += 1
        elif (role is Role.ADMIN) == isinstance(message, messages.FromWorker | messages.FromAgent):
            self.unauthorised += 1
        return frame


def hello(world: World, worker: str, **changes: Any) -> messages.Hello:
    status = world.status()
    fields: dict[str, Any] = {
        "worker": worker,
        "host": "elsewhere",
        "pid": 1,
        "slot": -1,
        "session": 0,
        "owned": [],
        "epoch": 0,
        "prepared_epoch": 0,
        "dirty": False,
        "topology": status["topology"],
        "snapshot_store": store_identity(str(world.cluster.data_dir / "snapshots"), world.job),
        "version": __version__,
    }
    return messages.Hello(**(fields | changes))


def absurd(chance: random.Random, sessions: list[int], greeting: messages.Hello) -> messages.Message:
    """Messages that decode, but that no worker would send. Many are in the name of active workers."""
    session = chance.choice([*sessions, 0, 1, 2**63 - 1])
    number = chance.choice([0, 1, 2, 5_000, 2**31, 2**53])
    offset = chance.choice([-1001, -1, 0, 2**62])
    shards = [ShardId(chance.choice([greeting.host, "", "x" * 300]), number)] * chance.choice([0, 1, 20])
    statuses = [ShardStatus(shard, offset, offset, offset, True, number) for shard in shards]
    return chance.choice(
        [
            messages.Dirty(session, True),
            messages.Prepared(session, number, number, 1e12, True),
            messages.Committed(session, number, 0.0, True, statuses),
            messages.ShardsRunning(session, statuses),
            messages.Released(session, shards, number),
            messages.Heartbeat(session, WorkerStats(records_in=number, shards=statuses), number),
            messages.Drained(session),
            messages.WorkerFailed(session, Failure.of_text("x" * chance.choice([0, 10, 10_000]))),
            messages.Goodbye(session),
            messages.Leaving(session),
            agent_report(greeting, number, len(shards)),
            msgspec.structs.replace(greeting, session=session, epoch=number, owned=shards, topology="other"),
            msgspec.structs.replace(greeting, session=chance.choice([1, 2**63 - 1]), owned=shards),
        ]
    )


def agent_report(greeting: messages.Hello, number: int, workers: int) -> messages.AgentReport:
    """A report from a process that isn't an agent."""
    return messages.AgentReport(
        greeting.worker, "job", greeting.host, number, workers, [number] * workers, number, number, True
    )


def broken(chance: random.Random, good: bytes) -> bytes:
    """A frame that is damaged, or that isn't one."""
    at = chance.randrange(len(good))
    return chance.choice(
        [
            lambda: chance.randbytes(chance.randrange(300)),
            lambda: good[:at],
            lambda: good[:at] + chance.randbytes(1) + good[at + 1 :],
            lambda: good + chance.randbytes(3),
            lambda: bytes([chance.choice([0, 2, 128, 255])]) + good[1:],
            lambda: b"\x01" + b"\x91" * chance.choice([10, 10_000]),  # lists in lists
            lambda: b"\x01\xdd\xff\xff\xff\xff",  # a list of four billion
            lambda: chance.randbytes(100_000),
        ]
    )()


@pytest.mark.timeout(300)
def test_a_hundred_thousand_hostile_frames_are_counted_and_dropped_while_epochs_continue(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    chance, expected = random.Random(20_250_102), Expected()
    world.produce(500)
    wait_until(world.all_is_committed, "the records before")
    before = world.status()
    sessions = [worker["session"] for worker in before["workers"]]
    assert len(sessions) == 2
    pid = world.cluster.child(COORDINATOR).pid
    resident, began_s = memory_bytes(pid), time.monotonic()
    address = world.leader.address
    with (
        Attacker(address, world.security(Role.WORKER), b"liar") as liar,
        Attacker(address, world.security(Role.ADMIN), b"admin") as admin,
    ):
        greeting, replayed = hello(world, "liar"), list[bytes]()
        for number in range(FRAMES):
            message = absurd(chance, sessions, greeting)
            frame = messages.encode(message)
            kind = number % 10
            if kind < 4:
                liar.send(expected.count(broken(chance, frame), b"liar", Role.WORKER))
            elif kind < 6:
                admin.send(expected.count(frame, b"admin", Role.ADMIN))
            elif kind == 6:
                admin_request = chance.choice([messages.StopRequest(), messages.StatusRequest()])
                liar.send(expected.count(messages.encode(admin_request), b"liar", Role.WORKER))
            elif kind < 9 or len(replayed) < 100:
                liar.send(expected.count(frame, b"liar", Role.WORKER))
                replayed.append(frame)
            else:
                liar.send(expected.count(chance.choice(replayed[-1000:]), b"liar", Role.WORKER))
            if number % 1000 == 0:
                world.produce(10)
        wait_until(
            lambda: (
                world.status()["counters"]["unauthorised_frames"] >= expected.unauthorised
                and world.status()["counters"]["malformed_frames"] >= expected.malformed
            ),
            "all frames are counted",
            60,
        )
    seconds = time.monotonic() - began_s
    after = world.status()
    counters = after["counters"]
    assert counters["malformed_frames"] == expected.malformed
    assert counters["unauthorised_frames"] == expected.unauthorised
    assert expected.malformed > 0.3 * FRAMES
    assert expected.unauthorised > 0.2 * FRAMES
    growth, peak = memory_bytes(pid) - resident, memory_bytes(pid, "VmHWM") - resident
    figures = {"seconds": round(seconds, 1), "growth_mb": growth / 2**20, "peak_mb": peak / 2**20, **counters}
    print(figures)
    record_property("figures", figures)
    assert growth < GROWTH_BYTES_MAX, figures
    # No active worker noticed anything, and everything that came in the meantime is committed.
    assert [worker["session"] for worker in after["workers"]] == sessions
    assert after["phase"] == "running"
    assert counters["evictions"] == before["counters"]["evictions"]
    assert counters["deaths"] == before["counters"]["deaths"]
    wait_until(world.all_is_committed, "the records meanwhile")
    world.produce(100)
    wait_until(world.all_is_committed, "the records after")
    assert world.status()["counters"]["epochs"] > before["counters"]["epochs"]
    world.cluster.assert_alive()


def test_oversized_frames_strangers_and_garbage_only_lose_their_own_connections(world: World) -> None:
    pid = world.cluster.child(COORDINATOR).pid
    host, port = world.leader.address.removeprefix("tcp://").split(":")
    server_key = Keyring(world.keys).coordinator()
    assert server_key is not None
    world.status()
    resident = memory_bytes(pid)
    for number in range(OVERSIZED):
        with Attacker(world.leader.address, world.security(Role.WORKER), b"fat%d" % number) as fat:
            fat.socket.setsockopt(zmq.LINGER, 1000)
            fat.send(bytes(MESSAGE_BYTES_MAX + 1))
    for number in range(STRANGERS):
        stranger = ClientSecurity(zmq.curve_keypair(), server_key)
        with Attacker(world.leader.address, stranger if number % 2 else None, b"w") as nobody:
            nobody.send(messages.encode(messages.StatusRequest()))
            nobody.socket.poll(20)
    rawness = random.Random(3)
    for number in range(STRANGERS):
        with socket.create_connection((host, int(port))) as raw:
            greeting = (
                b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00CURVE"
                if number % 2
                else b"GET / HTTP/1.1\r\n\r\n"
            )
            raw.sendall(greeting + rawness.randbytes(10_000))
    wait_until(
        lambda: world.status()["counters"]["failed_handshakes"] > STRANGERS, "the handshakes are counted"
    )
    assert memory_bytes(pid) - resident < GROWTH_BYTES_MAX
    counters = world.status()["counters"]
    assert counters["deaths"] == counters["evictions"] == 0
    world.produce(100)
    wait_until(world.all_is_committed, "the records after")


def test_a_member_that_lies_loses_its_shards_and_the_others_continue(world: World) -> None:
    chance = random.Random(4)
    world.produce(100)
    wait_until(world.all_is_committed, "the records before")
    sessions = {worker["session"] for worker in world.status()["workers"]}
    with Attacker(world.leader.address, world.security(Role.WORKER), b"liar") as liar:
        greeting = hello(world, "liar")
        liar.socket.send(messages.encode(greeting))
        wait_until_equal(lambda: len(world.status()["workers"]), 3, "the liar is a member")
        own = next(w["session"] for w in world.status()["workers"] if w["session"] not in sessions)
        for _ in range(2_000):
            message = absurd(chance, [own, own, own], greeting)
            if not isinstance(message, messages.WorkerFailed | messages.Hello):
                liar.send(messages.encode(message))
        world.status()
    world.produce(100)
    wait_until(world.all_is_committed, "the records after")
    assert {worker["session"] for worker in world.status()["workers"]} >= sessions


def test_each_role_is_refused_what_it_may_not_do(world: World) -> None:
    with AdminClient(world.leader.address, world.security(Role.WORKER)) as client:
        with pytest.raises(RequestRefused, match=r"StatusRequest needs admin\.key"):
            client.status()
        with pytest.raises(RequestRefused, match=r"StopRequest needs admin\.key"):
            client.stop()
    with AdminClient(world.leader.address, world.security(Role.COORDINATOR)) as client:
        with pytest.raises(RequestRefused, match="StatusRequest"):
            client.status()
        with pytest.raises(RequestRefused, match="StopRequest"):
            client.stop()
    with AdminClient(world.leader.address) as client, pytest.raises(KeyRefused, match="keys"):
        client.status()
    with Attacker(world.leader.address, world.security(Role.ADMIN), b"liar") as admin:
        admin.socket.send(messages.encode(hello(world, "liar")))
        assert admin.socket.poll(10_000)
        answer = messages.decode_from_coordinator(admin.socket.recv())
    assert isinstance(answer, messages.Refused)
    assert "worker.key" in answer.reason
    assert world.status()["phase"] == "running"
