"""The coordinator process on a real broker, with workers that only speak the protocol."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient as KafkaAdmin
from confluent_kafka.admin import NewPartitions, NewTopic

from fcluster import __version__
from fcluster.api.job import Job
from fcluster.common.errors import ClusterConflict, IncompatibleState, MissingTopic, SettingsError
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.settings import Settings
from fcluster.coordinator.server import run_coordinator
from fcluster.kafka.clients import make_admin, make_producer
from fcluster.kafka.offsets import begin_offsets
from fcluster.storage.snapshot_store import store_identity
from fcluster.wire import messages
from fcluster.wire.admin_client import AdminClient
from fcluster.wire.discovery import find_leader, read_journal
from fcluster.wire.messages import ShardStatus, WorkerStats
from fcluster.wire.transport import DealerTransport
from tests.harness import within

_M = TypeVar("_M")
DEADLINE_S = 20.0


class ProtocolWorker:
    """A worker that sends what a test tells it to, over a real socket."""

    def __init__(self, address: str, name: str, job: Job, settings: Settings) -> None:
        self.inbox: queue.Queue[messages.FromCoordinator] = queue.Queue()
        self.job, self.settings, self.name = job, settings, name
        self.session = 0
        self.transport = DealerTransport(name.encode(), self._on_frame, lambda: None, lambda: None)
        self.transport.connect(address)

    def _on_frame(self, frame: bytes) -> None:
        self.inbox.put(messages.decode_from_coordinator(frame))

    def say(self, message: messages.Message) -> None:
        assert self.transport.send(messages.encode(message))

    def hello(self, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "worker": self.name,
            "host": "host",
            "pid": os.getpid(),
            "slot": -1,
            "session": 0,
            "owned": [],
            "epoch": 0,
            "prepared_epoch": 0,
            "dirty": False,
            "topology": self.job.build(Settings()).fingerprint,
            "snapshot_store": store_identity(self.settings.snapshots, self.job.name),
            "version": __version__,
        }
        self.say(messages.Hello(**(fields | changes)))

    def expect(self, kind: type[_M]) -> _M:
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            message = self.inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
            if isinstance(message, kind):
                return message

    def join(self) -> messages.Welcome:
        self.hello()
        welcome = self.expect(messages.Welcome)
        self.session = welcome.session
        return welcome

    def heartbeat(self, *statuses: ShardStatus) -> None:
        self.say(messages.Heartbeat(self.session, WorkerStats(shards=list(statuses)), 0))


class RunningCoordinator:
    """`run_coordinator` in a thread."""

    def __init__(self, job: Job, settings: Settings, **options: Any) -> None:
        self._addresses: queue.Queue[str] = queue.Queue()
        self.exit_code: int | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(job, settings), kwargs=options)
        self._thread.start()

    def _run(self, job: Job, settings: Settings, **options: Any) -> None:
        try:
            ended = run_coordinator(job, settings, ready_callback=self._addresses.put, **options)
            self.exit_code = ended.exit_code
        except Exception as error:  # noqa: BLE001  reported by the test's thread
            self.error = error
            self._addresses.put("")

    @property
    def address(self) -> str:
        address = self._addresses.get(timeout=DEADLINE_S)
        assert self.error is None, self.error
        self._addresses.put(address)
        return address

    def wait(self) -> int | None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return self.exit_code


@pytest.fixture
def job(kafka: str, topic_prefix: str) -> Job:
    """A job with a repartition, and its source with two partitions."""
    source, name = topic_prefix + "in", topic_prefix + "job"
    admin = KafkaAdmin({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(source, 2, 1)])[source].result()
    job = Job(name)
    job.stream(job.topic(source)).key_by("field").process(second).to(job.topic(topic_prefix + "out"))
    return job


def second(ctx: Any, value: Any) -> Any:
    return value


@pytest.fixture
def brokers(kafka: str, tmp_path: Path) -> Settings:
    return Settings(bootstrap_servers=kafka, state_dir=str(tmp_path), initial_rebalance_delay_ms=500)


@pytest.fixture
def start(job: Job, brokers: Settings) -> Iterator[Callable[..., RunningCoordinator]]:
    running: list[RunningCoordinator] = []

    def begin(settings: Settings = brokers, **options: Any) -> RunningCoordinator:
        running.append(RunningCoordinator(job, settings, **({"expected_workers": 1} | options)))
        return running[-1]

    yield begin
    for coordinator in running:
        if coordinator.exit_code is None and coordinator.error is None:
            with AdminClient(coordinator.address) as client:
                client.stop()
            coordinator.wait()


@pytest.fixture
def new_worker(job: Job, brokers: Settings) -> Iterator[Callable[[str, str], ProtocolWorker]]:
    workers: list[ProtocolWorker] = []

    def connect(address: str, name: str) -> ProtocolWorker:
        workers.append(ProtocolWorker(address, name, job, brokers))
        return workers[-1]

    yield connect
    for worker in workers:
        worker.transport.close()


def test_worker_joins_commits_an_epoch_and_the_job_stops(
    job: Job,
    brokers: Settings,
    start: Callable[..., RunningCoordinator],
    new_worker: Callable[[str, str], ProtocolWorker],
    tmp_path: Path,
) -> None:
    ready_file = tmp_path / "ready"
    coordinator = start(ready_file=ready_file)
    assert json.loads(ready_file.read_text() if coordinator.address else "")["address"] == coordinator.address
    worker = new_worker(coordinator.address, "w0")
    welcome = worker.join()
    assert (welcome.term, welcome.slot, welcome.adopted) == (1, 0, False)
    assigned = worker.expect(messages.Assign).shards
    assert len(assigned) == 4
    assert read_journal(brokers, job.name)["slot/0"]["session"] == welcome.session
    worker.say(messages.Dirty(welcome.session, False))
    barrier = worker.expect(messages.Barrier)
    worker.say(messages.Prepared(welcome.session, barrier.epoch, 1, 1.0, False))
    assert worker.expect(messages.Complete).epoch == barrier.epoch
    worker.say(messages.Committed(welcome.session, barrier.epoch, 1.0, False, []))
    with AdminClient(coordinator.address) as client:
        document = client.status()
        assert (document["job"], document["epoch"], len(document["shards"])) == (job.name, barrier.epoch, 4)
        client.stop()
    worker.expect(messages.Drain)
    worker.say(messages.Drained(welcome.session))
    assert worker.expect(messages.Shutdown).failure is None
    assert coordinator.wait() == 0
    assert find_leader(brokers, job.name) is None, "a job that was stopped cleanly has no leader"


def test_epoch_takes_no_longer_than_its_messages(
    start: Callable[..., RunningCoordinator], new_worker: Callable[[str, str], ProtocolWorker]
) -> None:
    worker = new_worker(start().address, "w0")
    worker.join()
    durations_ms: list[float] = []
    for _ in range(50):
        started = time.monotonic()
        worker.say(messages.Dirty(worker.session, False))
        epoch = worker.expect(messages.Barrier).epoch
        worker.say(messages.Prepared(worker.session, epoch, 1, 1.0, False))
        worker.expect(messages.Complete)
        durations_ms.append((time.monotonic() - started) * 1000)
        worker.say(messages.Committed(worker.session, epoch, 1.0, False, []))
    # Two round trips, plus the rest of the minimal interval of 10 ms.
    assert within(sorted(durations_ms)[25] / 1000, 0.030)


def test_second_coordinator_without_standby_is_a_conflict_that_names_the_first(
    job: Job, brokers: Settings, start: Callable[..., RunningCoordinator]
) -> None:
    address = start().address
    with pytest.raises(ClusterConflict, match=address) as conflict:
        run_coordinator(job, brokers, stand_by=False)
    assert str(os.getpid()) in conflict.value.message
    assert "another name" in conflict.value.remedy


COORDINATOR_PROCESS = """
import sys
from pathlib import Path
from fcluster.common.settings import resolve
from fcluster.coordinator.server import run_coordinator
from tests.integration.test_coordinator_server import Job, second
name, source, out, ready = sys.argv[1:5]
job = Job(name)
job.stream(job.topic(source)).key_by("field").process(second).to(job.topic(out))
flags = dict(argument.split("=", 1) for argument in sys.argv[5:])
ended = run_coordinator(job, resolve({}, None, {}, flags), expected_workers=1, ready_file=Path(ready))
sys.exit(ended.exit_code)
"""


@pytest.fixture
def spawn(
    job: Job, brokers: Settings, topic_prefix: str, tmp_path: Path
) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], str]]]:
    """Starts a coordinator in its own process. Returns the process and its address."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin() -> tuple[subprocess.Popen[bytes], str]:
        ready = tmp_path / f"ready-{len(processes)}"
        flags = [f"{name}={value}" for name, value in brokers.as_mapping().items()]
        names = [job.name, topic_prefix + "in", topic_prefix + "out", str(ready)]
        processes.append(subprocess.Popen([sys.executable, "-c", COORDINATOR_PROCESS, *names, *flags]))
        deadline_s = time.monotonic() + DEADLINE_S
        while not ready.exists():
            assert processes[-1].poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        return processes[-1], json.loads(ready.read_text())["address"]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def test_killed_coordinators_successor_adopts_its_workers(
    spawn: Callable[[], tuple[subprocess.Popen[bytes], str]],
    new_worker: Callable[[str, str], ProtocolWorker],
    job: Job,
    brokers: Settings,
) -> None:
    process, address = spawn()
    worker = new_worker(address, "w0")
    worker.join()
    shards = worker.expect(messages.Assign).shards
    worker.say(messages.Dirty(worker.session, False))
    epoch = worker.expect(messages.Barrier).epoch
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, address = spawn()
    leader = find_leader(brokers, job.name)
    assert leader is not None
    assert (leader.address, leader.term) == (address, 2)
    worker.transport.connect(address)
    worker.hello(slot=0, session=worker.session, owned=shards, epoch=epoch, prepared_epoch=epoch, dirty=True)
    welcome = worker.expect(messages.Welcome)
    assert (welcome.adopted, welcome.session, welcome.term) == (True, worker.session, 2)
    assert worker.expect(messages.Complete).epoch == epoch
    worker.say(messages.Committed(worker.session, epoch, 1.0, True, []))
    assert worker.expect(messages.Barrier).epoch > epoch


def test_terminated_coordinator_drains_and_a_second_signal_ends_it_at_once(
    spawn: Callable[[], tuple[subprocess.Popen[bytes], str]],
    new_worker: Callable[[str, str], ProtocolWorker],
) -> None:
    process, address = spawn()
    worker = new_worker(address, "w0")
    worker.join()
    process.terminate()
    worker.expect(messages.Drain)
    assert process.poll() is None
    process.terminate()
    assert process.wait(DEADLINE_S) == 130


def test_suspended_coordinator_that_was_deposed_stands_by_when_it_continues(
    spawn: Callable[[], tuple[subprocess.Popen[bytes], str]],
    new_worker: Callable[[str, str], ProtocolWorker],
) -> None:
    process, address = spawn()
    os.kill(process.pid, signal.SIGSTOP)
    _, new_address = spawn()
    os.kill(process.pid, signal.SIGCONT)
    worker = new_worker(address, "w0")
    worker.hello()  # from now on, its writes to the journal are refused
    with AdminClient(new_address) as client:
        deadline_s = time.monotonic() + DEADLINE_S
        while not any(name.endswith(f"-{process.pid}") for name in client.status()["standbys"]):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    assert process.poll() is None
    assert worker.inbox.empty(), "the deposed leader let a worker in"
    process.terminate()
    assert process.wait(DEADLINE_S) == 0, "a standby ends by itself"


def test_standby_ends_when_the_job_is_stopped(
    job: Job, brokers: Settings, start: Callable[..., RunningCoordinator]
) -> None:
    leader = start()
    with AdminClient(leader.address) as client:
        standby = start()
        deadline_s = time.monotonic() + DEADLINE_S
        while not client.status()["standbys"]:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        client.stop()
    assert (leader.wait(), standby.wait()) == (0, 0)
    assert find_leader(brokers, job.name) is None


def test_standby_with_another_topology_is_refused(
    job: Job, brokers: Settings, topic_prefix: str, start: Callable[..., RunningCoordinator]
) -> None:
    assert start().address
    changed = Job(job.name)
    changed.stream(changed.topic(topic_prefix + "in")).to(changed.topic(topic_prefix + "out"))
    with pytest.raises(IncompatibleState, match="another topology"):
        run_coordinator(changed, brokers)


def test_job_without_work_is_caught_up_at_once(
    start: Callable[..., RunningCoordinator], new_worker: Callable[[str, str], ProtocolWorker]
) -> None:
    coordinator = start(until_caught_up=True)
    worker = new_worker(coordinator.address, "w0")
    worker.join()
    shards = worker.expect(messages.Assign).shards
    worker.heartbeat(*(ShardStatus(shard, 0, 0, 0, False, 0) for shard in shards))
    # The stage behind the repartition gets its target only now.
    deadline_s = time.monotonic() + DEADLINE_S
    while worker.inbox.empty() or not isinstance(worker.inbox.get_nowait(), messages.Drain):
        assert time.monotonic() < deadline_s
        worker.heartbeat(*(ShardStatus(shard, 0, 0, 0, False, 0) for shard in shards))
        time.sleep(0.05)
    worker.say(messages.Drained(worker.session))
    assert coordinator.wait() == 0


def test_repartition_topic_is_deleted_up_to_what_its_reader_has_committed(
    job: Job,
    brokers: Settings,
    topic_prefix: str,
    start: Callable[..., RunningCoordinator],
    new_worker: Callable[[str, str], ProtocolWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fcluster.coordinator.truncation.TRUNCATION_INTERVAL_S", 0.1)
    monkeypatch.setattr("fcluster.coordinator.truncation.TRUNCATION_RECORDS_MIN", 30)
    worker = new_worker(start().address, "w0")
    worker.join()
    worker.expect(messages.Assign)
    topics = (repartition_topic(job.name, "second"), topic_prefix + "in")
    producer = make_producer(brokers)
    for topic in topics:
        for _ in range(50):
            producer.produce(topic, value=b"{}", partition=0)
    producer.flush(10)
    worker.heartbeat(
        *(ShardStatus(ShardId(stage, 0), 50, 40, 50, True, 1) for stage in ("second", topics[1]))
    )
    admin = make_admin(brokers)
    repartition, source = (TopicPartition(topic, 0) for topic in topics)
    deadline_s = time.monotonic() + DEADLINE_S
    while begin_offsets(admin, [repartition])[repartition] == 0:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert begin_offsets(admin, [repartition, source]) == {repartition: 40, source: 0}


def test_worker_whose_connection_closes_loses_its_shards_within_a_second(
    start: Callable[..., RunningCoordinator], new_worker: Callable[[str, str], ProtocolWorker]
) -> None:
    address = start(expected_workers=2).address
    first, second = new_worker(address, "w0"), new_worker(address, "w1")
    first.join()
    second.join()
    kept = set(second.expect(messages.Assign).shards)
    first.expect(messages.Assign)
    started = time.monotonic()
    first.transport.close()
    kept |= set(second.expect(messages.Assign).shards)
    assert len(kept) == 4
    # 150 ms of grace, a journal write, a fence, and another journal write.
    assert within(time.monotonic() - started, 1.5)


def test_noise_on_the_socket_is_dropped(
    start: Callable[..., RunningCoordinator], new_worker: Callable[[str, str], ProtocolWorker]
) -> None:
    worker = new_worker(start().address, "w0")
    for frame in (b"", b"\x01", b"\x02abc", b"\x01\x80", os.urandom(1000)):
        assert worker.transport.send(frame)
    worker.join()


def test_partitions_added_to_a_source_without_state_are_shards_at_the_next_start(
    kafka: str, topic_prefix: str, start: Callable[..., RunningCoordinator]
) -> None:
    coordinator = start()
    with AdminClient(coordinator.address) as client:
        client.stop()
    coordinator.wait()
    admin = KafkaAdmin({"bootstrap.servers": kafka})
    admin.create_partitions([NewPartitions(topic_prefix + "in", 3)])[topic_prefix + "in"].result()
    deadline_s = time.monotonic() + DEADLINE_S
    while len(admin.list_topics(topic_prefix + "in").topics[topic_prefix + "in"].partitions) != 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    again = start()
    with AdminClient(again.address) as client:
        shards = client.status()["shards"]
    assert [shard["partition"] for shard in shards if shard["stage"] == topic_prefix + "in"] == [0, 1, 2]


def test_topology_that_lost_its_state_is_an_error_with_a_remedy(
    job: Job, brokers: Settings, topic_prefix: str, start: Callable[..., RunningCoordinator]
) -> None:
    coordinator = start()
    with AdminClient(coordinator.address) as client:
        client.stop()
    coordinator.wait()
    changed = Job(job.name)
    changed.stream(changed.topic(topic_prefix + "in")).to(changed.topic(topic_prefix + "out"))
    with pytest.raises(IncompatibleState, match="second"):
        run_coordinator(changed, brokers)


def test_missing_source_is_named(brokers: Settings, topic_prefix: str) -> None:
    job = Job(topic_prefix + "job")
    job.stream(job.topic(topic_prefix + "nowhere")).to(job.topic(topic_prefix + "out"))
    with pytest.raises(MissingTopic, match="nowhere"):
        run_coordinator(job, brokers)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "*", "10.1.2.3", "localhost.example.com", "127.0.0.1.example.com"]
)
def test_address_beyond_loopback_is_refused_without_insecure(job: Job, brokers: Settings, host: str) -> None:
    with pytest.raises(SettingsError, match="beyond this host"):
        run_coordinator(job, replace(brokers, coordinator_bind=f"tcp://{host}:0"))


def test_address_in_use_is_an_error(
    job: Job, brokers: Settings, start: Callable[..., RunningCoordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    import zmq

    monkeypatch.setattr("fcluster.coordinator.server.BIND_RETRY_S", 0.3)
    context = zmq.Context()
    try:
        socket = context.socket(zmq.ROUTER)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(SettingsError, match="can't listen"):
            run_coordinator(job, replace(brokers, coordinator_bind=f"tcp://127.0.0.1:{port}"))
    finally:
        context.destroy(0)
