"""The flights job on three hosts: one host is cut off in the middle and comes back, another gets more
workers.

Kafka, a bucket and the coordinator are on host-a, the workers on host-b and host-c. Each host has its own
network, name, directory and keys. Everything is done as the documentation tells a user to do it.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient as KafkaAdmin
from confluent_kafka.admin import NewTopic

from examples.flights.data import FLIGHTS, read_flights
from examples.flights.demo import JOB_FILE, read_results
from examples.flights.recount import differences, recount_csv
from fcluster.common.ids import repartition_topic, transactional_ids
from fcluster.common.processes import ChildProcess, describe_exit
from tests.chaos.transactions_log import AT_REST, ids_with_open_transaction, transactional_ids_of
from tests.checker.check import wait_until_committed
from tests.checker.reading import READ_COMMITTED, committed_offsets, end_offsets
from tests.harness import held_back, wait_until
from tests.hosts import Host, bootstrap_servers, lan, start_kafka
from tests.s3.server import S3Server

pytestmark = pytest.mark.timeout(300)

JOB = "flights-job"
OUTPUTS = ("carrier-totals", "aircraft-totals")
PARTITIONS = 8
FED_PER_SECOND, FED_SLOWLY_PER_SECOND = 10_000, 500
WORKERS_A_HOST = 2
SETTINGS = """\
num.standby.replicas = 1
snapshots = "s3://flights/snapshots"
snapshot.interval.ms = "3s"
security.keys.dir = "keys"
"""
HELD_S = 1.2
"""Longer than `commit.interval.max.ms`, shorter than `session.timeout.ms`."""


class Feeder:
    """Sends all flights from one host, in a thread: the first `share` of them at full speed, the rest slowly.

    That keeps the job busy whenever the test disturbs it, even on a slow machine.
    """

    def __init__(self, host: Host, brokers: str) -> None:
        self._host = host
        self._brokers = brokers
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self.sent = 0
        self.share = 0.4

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def runs(self) -> bool:
        """Whether it is still sending."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait until all flights are in the topic."""
        self._thread.join(timeout_s)
        assert not self.runs(), f"{self.sent} flights sent in time"
        assert self._failure is None, self._failure
        assert self.sent == FLIGHTS

    def _run(self) -> None:
        try:
            with self._host.entered():
                self._feed()
        except BaseException as error:  # noqa: BLE001  told by `join`
            self._failure = error

    def _feed(self) -> None:
        config = {"bootstrap.servers": self._brokers, "enable.idempotence": True, "linger.ms": 20}
        producer = Producer({**config, "partitioner": "murmur2_random", "log_level": 3})
        due_s = time.monotonic()
        for flight in read_flights():
            if self._ended.is_set():
                return
            producer.produce("flights", orjson.dumps(flight), flight["carrier"].encode())
            self.sent += 1
            if self.sent % 100 == 0:
                producer.poll(0)
                rate = FED_PER_SECOND if self.sent < self.share * FLIGHTS else FED_SLOWLY_PER_SECOND
                due_s = max(due_s + 100 / rate, time.monotonic() - 1)
                self._ended.wait(max(0.0, due_s - time.monotonic()))
        assert producer.flush(60) == 0


class FlightsOnHosts:
    """The cluster on its hosts."""

    def __init__(self, a: Host, b: Host, c: Host) -> None:
        self.a, self.b, self.c = a, b, c
        self.brokers = bootstrap_servers(a)
        self._servers: dict[str, ChildProcess] = {}

    def prepare(self, environment: dict[str, str]) -> None:
        """Create the keys on one host and copy them to the others. All hosts get the same settings and
        credentials."""
        self.a.fcluster("keys", "new", "keys")
        self.a.fcluster("keys", "add", "keys", "worker", "host-c")
        made = self.a.directory / "keys"
        for host, worker_key in ((self.b, "worker.key"), (self.c, "worker-host-c.key")):
            keys = host.directory / "keys"
            keys.mkdir(mode=0o700)
            shutil.copy(made / worker_key, keys / "worker.key")
            shutil.copy(made / "coordinator.pub", keys)
        for name in ("worker.key", "worker-host-c.key"):
            (made / name).unlink()
        for host in (self.a, self.b, self.c):
            (host.directory / "fcluster.toml").write_text(SETTINGS)
            host.env |= environment
        with self.a.entered():
            admin = KafkaAdmin({"bootstrap.servers": self.brokers})
            admin.create_topics([NewTopic("flights", PARTITIONS)])["flights"].result(30)

    def start_coordinator(self) -> None:
        workers = str(2 * WORKERS_A_HOST)
        self._start(self.a, "coordinator", "--bind", "tcp://0.0.0.0:7070", "--workers", workers)

    def start_workers(self, host: Host) -> None:
        """One command on each host. It restarts the workers that end."""
        self._start(host, "worker", "--workers", str(WORKERS_A_HOST))

    def scale(self, host: Host, workers: int) -> None:
        self.a.fcluster(
            "scale", f"{host.name}={workers}", "--no-wait", "--brokers", self.brokers, "--job", JOB
        )

    def status(self) -> dict[str, Any]:
        """The coordinator's status document. Empty if it doesn't answer."""
        asked = ("status", "--json", "--brokers", self.brokers, "--job", JOB)
        done = self.a.fcluster(*asked, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def settled(self, **workers: int) -> dict[str, Any]:
        """The status, if all shards run on this many workers of each host and each worker has some.
        Otherwise empty."""
        self.assert_alive()
        status = self.status()
        if not status or any(shard["phase"] != "running" for shard in status["shards"]):
            return {}
        hosts = [worker["host"] for worker in status["workers"] if worker["shards"]]
        wanted = {name.replace("_", "-"): count for name, count in workers.items() if count}
        return status if {name: hosts.count(name) for name in set(hosts)} == wanted else {}

    def assert_alive(self) -> None:
        for name, server in self._servers.items():
            code = server.poll()
            assert code is None, f"{name}: {describe_exit(code)}\n{self.logs()}"

    def drain(self) -> None:
        """End the job cleanly, and check that all processes end cleanly."""
        self._servers["coordinator on host-a"].send_signal(signal.SIGINT)
        for name, server in self._servers.items():
            assert server.wait(30) == 0, f"{name}: {server.poll()}\n{self.logs()}"

    def committed(self) -> int:
        """The number of flights in committed epochs."""
        return sum(
            offset
            for (topic, _), offset in committed_offsets(self.brokers, JOB).items()
            if topic == "flights"
        )

    def logs(self) -> str:
        """The last lines of all logs."""
        said: list[str] = []
        for host in (self.a, self.b, self.c):
            for path in sorted(host.directory.glob("*.log")):
                lines = path.read_text(errors="replace").splitlines()
                said += [f"--- {host.name}: {path.name} ({len(lines)} lines)", *lines[-30:]]
        return "\n".join(said)

    def _start(self, host: Host, command: str, *more: str) -> None:
        server = host.start(command, command, str(JOB_FILE), "--brokers", self.brokers, *more)
        self._servers[f"{command} on {host.name}"] = server


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FlightsOnHosts]:
    with ExitStack() as stack:
        a, b, c = stack.enter_context(lan(tmp_path / "hosts", "host-a", "host-b", "host-c"))
        kafka = start_kafka(a)
        bucket = stack.enter_context(S3Server(a.directory, a.address, a.prefix))
        bucket.make_bucket("flights")
        wait_until(lambda: bootstrap_servers(a) or kafka.poll() is not None, "Kafka on host-a", 90)
        assert kafka.poll() is None, a.log_path("kafka").read_text()
        made = FlightsOnHosts(a, b, c)
        made.prepare(bucket.environment())
        # The test's own requests to Kafka come from host-a.
        stack.enter_context(a.entered())
        failed_before = request.session.testsfailed
        yield made
        if request.session.testsfailed > failed_before:
            print(made.logs())


def shards_of(status: dict[str, Any], host: str) -> list[tuple[str, int]]:
    slots = {worker["slot"] for worker in status["workers"] if worker["host"] == host}
    return [(shard["stage"], shard["partition"]) for shard in status["shards"] if shard["slot"] in slots]


def copies_beside_their_shards(status: dict[str, Any]) -> list[str]:
    """Standbys on the same host as their shard, and shards without a standby."""
    host_of = {worker["slot"]: worker["host"] for worker in status["workers"]}
    return [
        f"{shard['stage']}/{shard['partition']}"
        for shard in status["shards"]
        if not shard["standbys"]
        or any(host_of[copy["slot"]] == host_of[shard["slot"]] for copy in shard["standbys"])
    ]


def sessions_on(status: dict[str, Any], host: str) -> set[int]:
    return {worker["session"] for worker in status["workers"] if worker["host"] == host}


def slots_on(status: dict[str, Any], host: str) -> set[int]:
    return {worker["slot"] for worker in status["workers"] if worker["host"] == host}


def ongoing(brokers: str) -> set[str]:
    """Transactional ids with an open transaction."""
    return ids_with_open_transaction(brokers, JOB)


def held_open(brokers: str, slots: set[int]) -> set[str]:
    """The ids of these slots whose transaction stays open for longer than an epoch lasts."""
    ids = {name for slot in slots for name in transactional_ids(JOB, slot)}
    before = ongoing(brokers)
    time.sleep(HELD_S)
    return ids & before & ongoing(brokers)


def test_flights_on_three_hosts_survive_the_loss_of_one_its_return_and_more_workers(
    cluster: FlightsOnHosts, record_property: Callable[[str, object], None]
) -> None:
    began_s = time.monotonic()
    took: dict[str, float] = {}

    def note(what: str) -> None:
        took[what] = round(time.monotonic() - began_s, 1)

    cluster.start_coordinator()
    cluster.start_workers(cluster.b)
    cluster.start_workers(cluster.c)
    wait_until(lambda: cluster.settled(host_b=2, host_c=2), "all four workers have shards", 60)
    note("four workers run")
    with Feeder(cluster.a, cluster.brokers) as feeder:
        settled = wait_until(
            lambda: (
                cluster.committed() > FLIGHTS // 20
                and (status := cluster.settled(host_b=2, host_c=2))
                and not copies_beside_their_shards(status)
                and status
            ),
            "each shard has a copy on the other host",
        )
        lost_sessions, lost_shards = sessions_on(settled, "host-c"), shards_of(settled, "host-c")
        assert lost_shards
        note("cut off")
        with cluster.c.cut_off():
            held = held_open(cluster.brokers, slots_on(settled, "host-c"))
            assert held, "the host that was cut off had no open epoch"
            committed = cluster.committed()
            alone = wait_until(lambda: cluster.settled(host_b=2), "host-b has all shards", 30)
            note("host-b has all shards")
            assert set(shards_of(alone, "host-b")) >= set(lost_shards)
            assert not held & ongoing(cluster.brokers), (
                "open transactions weren't aborted before others took over"
            )
            wait_until(lambda: cluster.committed() > committed + 2000, "host-b continues alone")
            assert feeder.runs(), "all flights were processed before the host was back"
        note("healed")
        feeder.share = 0.8

        returned = wait_until(lambda: cluster.settled(host_b=2, host_c=2), "host-c has shards again", 60)
        note("host-c has shards again")
        assert not sessions_on(returned, "host-c") & lost_sessions, (
            "fenced workers continued as if nothing had happened"
        )
        cluster.scale(cluster.b, 2 * WORKERS_A_HOST)
        wait_until(lambda: cluster.settled(host_b=4, host_c=2), "the new workers have shards", 60)
        note("scaled")
        assert feeder.runs(), "all flights were processed before there were more workers"
        feeder.share = 1.0
        feeder.join(150)
    # Both topics: a drain ends with the epoch under way. What the last flights became may still be in the
    # repartition topic then, where it waits for the job's next start.
    wait_until_committed(cluster.brokers, JOB, ["flights", repartition_topic(JOB, "aircraft")], 60)
    assert cluster.committed() == FLIGHTS
    note("all committed")
    cluster.drain()
    note("drained")
    check_results(cluster)
    note("checked")
    print(took, settled["counters"])
    record_property("figures", {**took, "held": sorted(held)})


def check_results(cluster: FlightsOnHosts) -> None:
    """Each flight was counted exactly once and in order, and no transaction is open."""
    by_carrier, by_aircraft = recount_csv(FLIGHTS)
    carriers = read_results(cluster.brokers, "carrier-totals", "carrier")
    aircraft = read_results(cluster.brokers, "aircraft-totals", "tailnum")
    found = differences("carrier", by_carrier, carriers) + differences("aircraft", by_aircraft, aircraft)
    assert not found, found[:20]
    topics = sorted(KafkaAdmin({"bootstrap.servers": cluster.brokers}).list_topics(timeout=15).topics)
    assert held_back(cluster.brokers, [topic for topic in topics if not topic.startswith("__")]) == {}
    states = transactional_ids_of(cluster.brokers, JOB)
    assert len(states) >= 2 * 2 * WORKERS_A_HOST
    assert set(states.values()) <= AT_REST, states
    assert sum(end_offsets(cluster.brokers, ["flights"], READ_COMMITTED).values()) == FLIGHTS
