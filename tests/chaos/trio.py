"""Three brokers under a running job. They are disturbed where it matters.

Responsible for: the cluster, one of whose brokers is on an island where there can be one; finding the broker
that leads or coordinates something for a job; disturbing it at a step of an epoch of the worker that it
affects; and checking what is expected then: no process ends, and output flows again in all partitions within
a bound, while the broker is still down. The bounds are for a quiet machine. On a busy one they are longer, by
as much as the machine was slower in that time.

Two brokers are never killed (-9) at once: Kafka 4.3.1 may tear a transaction then (docs/kafka.md).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from confluent_kafka import ElectionType, KafkaException
from confluent_kafka.admin import AdminClient

from fcluster.common.failpoints import Arm
from fcluster.common.ids import changelog_topic, coordinator_id, journal_topic, transactional_ids
from fcluster.common.processes import ChildProcess
from fcluster.kafka.embedded_cluster import EmbeddedCluster
from fcluster.kafka.ports import reserve_for_process
from tests import brokers
from tests.chaos.cluster import ChaosCluster
from tests.chaos.network import NoIslandError, retire, run, standing
from tests.chaos.plan import FROM_BROKERS, FROM_CLIENTS, LEADERS
from tests.chaos.runner import Chaos, workers_of
from tests.chaos.tally import (
    BROKER_CUT,
    BROKER_HUNG,
    BROKER_KILLED,
    BROKER_STOPPED,
    BROKERS_AWAY,
    LEADERS_MOVED,
)
from tests.checker.reading import forget_admins
from tests.harness import COORDINATOR, Slowness, wait_until

SOURCE, OUTPUT, CHANGELOG = "leader of a source", "leader of an output", "leader of a changelog"
GROUP, TRANSACTIONS = "coordinator of the group", "coordinator of a transactional id"
CONTROLLER = "controller"
ROLES = (SOURCE, OUTPUT, CHANGELOG, GROUP, TRANSACTIONS, CONTROLLER)
JOURNAL, JOURNAL_WRITER = "leader of the journal", "coordinator of the journal's transactional id"
STANDBY = "standby-coordinator"

SESSION_S = 6.0
"""`broker.session.timeout.ms` of these brokers: no other broker takes over from a dead one before this
time.
"""
HOLD_MS = 300
"""How long a worker stays at its step while its broker is disturbed."""
KILLED_BOUND_S = 30.0
"""The time from a death to output in all partitions. The floor, a plain producer and consumer, is 6 to 11 s
on an idle machine.
"""
STOPPED_BOUND_S = 20.0
BACK_BOUND_S = 30.0
"""The same from the moment when two of three brokers are back, or a cut is healed."""
CUT_BOUND_S = 45.0
"""The same from the moment when a broker is cut off from the others. It still says that it leads, and takes
records that it can't commit. A producer waits 12 s for that, and each new client that asks it has to ask
again.
"""
ISLANDER = 3


class NotWholeError(Exception):
    """No broker may be disturbed at present, or not in this way. The message says why."""


class BrokerIsland:
    """A network namespace for one broker, with one connection for clients and one for the other brokers.

    The others' address is one of the loopback device, which remains when the connection to it is cut.
    """

    def __init__(self) -> None:
        number = os.getpid() % 4096
        self.name = f"fclusterbroker-{number:x}"
        third = number % 200
        self._ways = [(f"fcp{number:x}{way}", f"fcq{number:x}{way}") for way in (0, 1)]
        self._nets = [f"10.{215 + way}.{third}" for way in (0, 1)]
        self.address = f"{self._nets[0]}.6"
        """The address for clients."""
        self.among_brokers = f"{self._nets[1]}.6"
        self.others = f"{self._nets[1]}.1"
        """The address at which it finds the other brokers."""

    @property
    def prefix(self) -> Sequence[str]:
        return ("ip", "netns", "exec", self.name)

    def make(self) -> None:
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        run("ip", "address", "add", f"{self.others}/32", "dev", "lo")
        for (outside, inside), net in zip(self._ways, self._nets, strict=True):
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            run("ip", "link", "set", inside, "netns", self.name)
            run("ip", "address", "add", f"{net}.5/30", "dev", outside)
            run("ip", "link", "set", outside, "up")
            run("ip", "-n", self.name, "address", "add", f"{net}.6/30", "dev", inside)
            run("ip", "-n", self.name, "link", "set", inside, "up")
        run("ip", "-n", self.name, "route", "add", self.others, "via", f"{self._nets[1]}.5")

    def remove(self) -> None:
        """Remove whatever exists of it."""
        for outside, _ in self._ways:
            run("ip", "link", "del", outside, check=False)
        for address in (self.address, self.among_brokers, self.others):
            retire(address)
        run("ip", "netns", "del", self.name, check=False)

    def switch(self, way: int, state: str) -> None:
        """Take the connection of clients (0) or of brokers (1) `down` or `up`. While it is down, sent packets
        vanish silently.
        """
        # It is done at its far end. With the near end down, packets would take another way. If something
        # answers there with HTTP, the other brokers interpret that as a length, and end with
        # OutOfMemoryError.
        run("ip", "-n", self.name, "link", "set", self._ways[way][1], state)
        if way and state == "up":  # the route was removed with the link
            run("ip", "-n", self.name, "route", "replace", self.others, "via", f"{self._nets[1]}.5")


class Trio:
    """Three brokers. `island` is None where there can be none."""

    def __init__(self, directory: Path) -> None:
        self._closing = ExitStack()
        self.island: BrokerIsland | None = None
        self.why_no_island = ""
        try:
            self.island = self._closing.enter_context(standing(BrokerIsland))
        except NoIslandError as error:
            self.why_no_island = str(error)
        island = self.island
        self._inner_ports = [reserve_for_process() for _ in range(3)]
        self.cluster = EmbeddedCluster(
            directory,
            3,
            settings={"broker.session.timeout.ms": str(int(SESSION_S * 1000))},
            adapt=None if island is None else self._adapt,
            places={} if island is None else {ISLANDER: (island.address, island.prefix)},
        )

    def __enter__(self) -> Trio:
        try:
            patched = self._closing.enter_context(pytest.MonkeyPatch.context())
            # Three JVMs that live for minutes: optimising compilation and parallel garbage collection took
            # half of the CPU that they used, which the job under test then lacked.
            patched.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
            self.cluster.start(print)
            self._closing.callback(self.cluster.kill)
        except BaseException:
            self.cluster.kill()
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # A client that outlives the island would ask whatever answers at that address then.
        forget_admins()
        self._closing.close()

    @property
    def servers(self) -> str:
        """The bootstrap servers. Brings back whatever is down."""
        self.cluster.start()
        brokers.wait_whole(self.cluster.bootstrap_servers)
        return self.cluster.bootstrap_servers

    alone = False
    """While one of them is down, the others answer."""

    def take_away(self, how: str, draw: random.Random) -> tuple[str, Callable[[], object]]:
        """Disturb one of them. Returns what was disturbed, and a function that heals it.

        Args:
            how: `clean` and `hard` end it, it `stands still`, is cut off `from clients` or `from brokers`, or
                `leaders` of all partitions move.
            draw: chooses the broker.

        Raises:
            NotWholeError: it isn't possible at present, because one of them is already disturbed, or not
                possible at all.
        """
        cluster, island = self.cluster, self.island
        if wrong := brokers.behind(cluster.bootstrap_servers, len(cluster.nodes)):
            raise NotWholeError(f"{len(wrong)} partitions or brokers aren't whole yet")
        if how in (FROM_CLIENTS, FROM_BROKERS):
            if island is None:
                raise NotWholeError(self.why_no_island)
            way = (FROM_CLIENTS, FROM_BROKERS).index(how)
            island.switch(way, "down")
            return f"broker {ISLANDER}", partial(island.switch, way, "up")
        if how == LEADERS:
            count = move_leaders(cluster.bootstrap_servers, "")
            return f"{count} partitions", lambda: None
        node = draw.choice(cluster.nodes)
        if how == "stands still":
            cluster.pause_node(node)
            return f"broker {node}", partial(cluster.resume_node, node)
        (cluster.kill_node if how == "hard" else cluster.stop_node)(node)
        return f"broker {node}", partial(cluster.start_node, node)

    def wait_whole(self) -> None:
        """Wait until all brokers run and all replicas are in sync."""
        brokers.wait_whole(self.cluster.bootstrap_servers)

    def _adapt(self, node: int, ours: dict[str, str]) -> dict[str, str]:
        """Brokers communicate with each other over another connection than with clients."""
        island = self.island
        assert island is not None
        inner = island.among_brokers if node == ISLANDER else island.others
        between = f"BROKERS://{inner}:{self._inner_ports[node - 1]}"
        voters = [
            voter.replace("127.0.0.1", island.among_brokers if voter[0] == str(ISLANDER) else island.others)
            for voter in ours["controller.quorum.voters"].split(",")
        ]
        return {
            **ours,
            "listeners": f"{ours['listeners'].replace('CONTROLLER://127.0.0.1', f'CONTROLLER://{inner}')},{between}",
            "advertised.listeners": f"{ours['advertised.listeners']},{between}",
            "controller.quorum.voters": ",".join(voters),
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,BROKERS:PLAINTEXT",
            "inter.broker.listener.name": "BROKERS",
        }


class TwoCoordinators(ChaosCluster):
    """A cluster in which a second coordinator can stand by."""

    def start_coordinator(self, name: str = COORDINATOR) -> ChildProcess:
        """Start it. If another one leads, it stands by."""
        return self._spawn(name, ["coordinator", self._job_file, "--workers", str(self.workers)])

    def start_standby(self) -> None:
        """Start a second one, and wait until the first one knows it."""
        self.start_coordinator(STANDBY if COORDINATOR in self.pids() else COORDINATOR)

        def stands_by() -> bool:
            status = self.status()
            return status is not None and len(status["standbys"]) == 1

        wait_until(stands_by, "a coordinator stands by", 30, 0.1)

    def leading(self) -> str:
        """The name of the coordinator that leads. Waits until there is one."""

        def look() -> str:
            leader = self.leader()
            return names.get(leader.pid, "") if leader is not None else ""

        names = {self.child(name).pid: name for name in (COORDINATOR, STANDBY) if name in self.pids()}
        return wait_until(look, "a coordinator leads", 30, 0.1)


@dataclass(frozen=True)
class Aim:
    """What a fault has to hit: the broker, and the worker whose epoch it affects."""

    role: str
    node: int
    worker: str
    what: str


class BrokerFaults:
    """Faults on the brokers of one run.

    Args:
        run: a job on the brokers of `trio`.
        trio: all whole.
        seed: the seed that chooses among partitions and workers.
    """

    def __init__(self, run: Chaos, trio: Trio, seed: int = 0) -> None:
        self.run = run
        self.trio = trio
        self.pauses_s: list[tuple[str, float]] = []
        self._draw = random.Random(seed)
        self._pids = run.cluster.pids()
        self._resets = self._resets_so_far()
        self._killed: dict[int, int] = dict.fromkeys(trio.cluster.nodes, 0)

    # --- aiming ------------------------------------------------------------------------------------------

    def aim(self, role: str) -> Aim:
        """A broker in that role. If there are several, the one that was disturbed least often."""
        choices = list(self._choices(role))
        self._draw.shuffle(choices)
        return min(choices, key=lambda aim: self._killed[aim.node])

    def _choices(self, role: str) -> Iterator[Aim]:
        servers, job = self.run.brokers, self.run.job
        if role == CONTROLLER:
            yield Aim(role, brokers.controller_of(servers), workers_of(self.run)[0], "the controller")
            return
        if role in (JOURNAL, JOURNAL_WRITER):
            if role == JOURNAL:
                node = brokers.leader_of(servers, journal_topic(job), 0)
            else:
                node = brokers.coordinator_of_transactions(servers, coordinator_id(job))
            yield Aim(role, node, workers_of(self.run)[0], f"the {role}")
            return
        if role == GROUP:
            node = brokers.coordinator_of_group(servers, job)
            for worker in workers_of(self.run):
                yield Aim(role, node, worker, f"the coordinator of the group {job}")
            return
        if role == TRANSACTIONS:
            for worker in workers_of(self.run):
                session = self.run.cluster.session(worker)
                assert session is not None, f"{worker} has no session"
                for identity in transactional_ids(job, session["slot"]):
                    node = brokers.coordinator_of_transactions(servers, identity)
                    yield Aim(role, node, worker, f"the coordinator of {identity}")
            return
        topic = {
            SOURCE: self.run.source,
            OUTPUT: self.run.output,
            CHANGELOG: changelog_topic(job, self.run.stage),
        }[role]
        status = self.run.cluster.status()
        assert status is not None
        slots = {
            session["slot"]: worker
            for worker in workers_of(self.run)
            if (session := self.run.cluster.session(worker)) is not None
        }
        partitions = brokers.metadata(servers).topics[topic].partitions
        stage = self.run.stage if role == CHANGELOG else self.run.source
        for shard in status["shards"]:
            number = shard["partition"]
            if shard["stage"] == stage and shard["slot"] in slots and partitions[number].leader > 0:
                yield Aim(
                    role, partitions[number].leader, slots[shard["slot"]], f"the leader of {topic}/{number}"
                )

    # --- one broker --------------------------------------------------------------------------------------

    def kill(self, role: str, step: str) -> None:
        """`kill -9` a broker in that role while the worker is at that step."""
        self._take_away(role, step, hard=True)

    def stop(self, role: str, step: str) -> None:
        """The same with a clean stop."""
        self._take_away(role, step, hard=False)

    def _take_away(self, role: str, step: str, *, hard: bool) -> None:
        aim = self.aim(role)
        self.run.cluster.arm(aim.worker, step, Arm("hold", after_ms=HOLD_MS))
        mark = self.run.cluster.await_mark(aim.worker, step)
        cluster = self.trio.cluster
        self._killed[aim.node] += 1
        began_s = time.monotonic()
        (cluster.kill_node if hard else cluster.stop_node)(aim.node)
        what = f"{'kill -9' if hard else 'stop'} broker {aim.node}, {aim.what}, {aim.worker} at {step}"
        shown = f"at the step, epoch {mark.detail}"
        self.run.note(BROKER_KILLED if hard else BROKER_STOPPED, what, mark.time_ns, shown=shown)
        bound_s = KILLED_BOUND_S if hard else STOPPED_BOUND_S
        self._flows_again(what, began_s, bound_s)
        resets = self._resets_so_far()
        assert resets == self._resets, f"{what}: {resets - self._resets} sessions of workers ended"
        cluster.start_node(aim.node)
        self._whole()

    def hang(self, role: str) -> None:
        """SIGSTOP a broker for longer than its session. Its connections stay open, and it learns late that it
        no longer leads anything.
        """
        aim = self.aim(role)
        shown = self.run.open_epoch()
        self.trio.cluster.pause_node(aim.node)
        began_s = time.monotonic()
        what = f"SIGSTOP broker {aim.node}, {aim.what}, past its session"
        self.run.note(BROKER_HUNG, what, shown=shown)
        try:
            self._flows_again(what, began_s, KILLED_BOUND_S)
            time.sleep(max(0.0, began_s + SESSION_S + 2 - time.monotonic()))  # the fault itself
        finally:
            self.trio.cluster.resume_node(aim.node)
        self._flows_again(f"{what}, after SIGCONT", time.monotonic(), STOPPED_BOUND_S)
        self._whole()

    def cut(self, way: int, lasts_s: float) -> bool:
        """Cut one broker off from the clients only (0), or from the other brokers only (1). Returns whether
        that is possible here. If it is cut off only from the clients, it continues to lead, so one can only
        wait.
        """
        island = self.trio.island
        if island is None:
            print(f"a broker cut off: not tested, {self.trio.why_no_island}")
            return False
        shown = self.run.open_epoch()
        began_s = time.monotonic()
        island.switch(way, "down")
        what = f"broker {ISLANDER} cut off from {'the other brokers' if way else 'all clients'} only"
        self.run.note(BROKER_CUT, what, shown=shown)
        try:
            if way:
                self._flows_again(what, began_s, CUT_BOUND_S)
            time.sleep(max(0.0, began_s + lasts_s - time.monotonic()))  # the fault itself
        finally:
            island.switch(way, "up")
        self._flows_again(f"{what}, healed", time.monotonic(), BACK_BOUND_S)
        self._whole()
        return True

    # --- with the coordinator ------------------------------------------------------------------------------

    def kill_with_leader(self, role: str) -> None:
        """`kill -9` a broker that the journal needs, and the leading coordinator. Another coordinator takes
        over while that broker's session still lasts.
        """
        cluster = self.run.cluster
        assert isinstance(cluster, TwoCoordinators)
        cluster.start_standby()
        self._pids = cluster.pids()
        aim = self.aim(role)
        leader = cluster.leading()
        shown = self.run.open_epoch()
        began_s = time.monotonic()
        self._killed[aim.node] += 1
        self.trio.cluster.kill_node(aim.node)
        cluster.kill(leader)
        what = f"kill -9 broker {aim.node}, {aim.what}, and {leader}, which led"
        self.run.note(BROKER_KILLED, what, shown=shown)
        self._pids.pop(leader)
        self._flows_again(what, began_s, KILLED_BOUND_S)
        assert cluster.leading() != leader
        self.trio.cluster.start_node(aim.node)
        self._whole()

    # --- several -----------------------------------------------------------------------------------------

    def take_two_away(self, lasts_s: float, *, clean: bool) -> None:
        """Take two of three brokers away, by SIGSTOP or by clean stops, one after another. Nothing can be
        committed. When they are back, everything continues.
        """
        cluster = self.trio.cluster
        away = self._draw.sample(cluster.nodes, 2)
        shown = self.run.open_epoch()
        for node in away:
            (cluster.stop_node if clean else cluster.pause_node)(node)
        began_s = time.monotonic()
        what = f"brokers {away} {'stopped one after the other' if clean else 'SIGSTOP'} for {lasts_s:.0f} s"
        self.run.note(BROKERS_AWAY, what, shown=shown)
        try:
            time.sleep(3.0)  # what was in flight arrives
            before = self.run.newest_ns()
            time.sleep(max(0.0, began_s + lasts_s - time.monotonic()))  # the fault itself
            assert self.run.newest_ns() == before, (
                "something was committed though two of three brokers are away"
            )
        finally:
            if clean:
                cluster.start_nodes(away)
            else:
                for node in away:
                    cluster.resume_node(node)
        self._flows_again(what, time.monotonic(), BACK_BOUND_S)
        self._whole()

    def move_leaders(self) -> None:
        """Move the leaders of all topics to the next broker, and with them the coordinators. No broker
        dies.
        """
        shown = self.run.open_epoch()
        began_s = time.monotonic()
        count = move_leaders(self.run.brokers, self.run.name)
        what = f"{count} partitions got other leaders, nobody died"
        self.run.note(LEADERS_MOVED, what, shown=shown)
        self._flows_again(what, began_s, STOPPED_BOUND_S)
        self._whole()

    # --- what is expected ----------------------------------------------------------------------------------

    def _flows_again(self, what: str, began_s: float, bound_s: float) -> None:
        """Wait for committed output in all partitions within the bound, of records that were written after
        the fault, and by the same processes.
        """
        with Slowness() as machine:
            try:
                self.run.await_flow(max(1.0, began_s + Slowness.MOST * bound_s - time.monotonic()))
            except TimeoutError as error:
                print(f"status: {self.run.cluster.status()}")
                pids = {node: self.trio.cluster.pid_of(node) for node in self.trio.cluster.nodes}
                raise TimeoutError(
                    f"{what}: {error}; newest {self.run.newest_ns()}; brokers by process {pids}"
                ) from None
            took_s = time.monotonic() - began_s
            slower = machine.leeway
        self.pauses_s.append((what, took_s))
        told = f"{what}: output in all partitions after {took_s:.1f} s, {slower:.1f} times slower than alone"
        print(told, flush=True)
        assert took_s < bound_s * slower, f"{told}; the bound for a quiet machine is {bound_s:.0f} s"
        assert self.run.cluster.pids() == self._pids, f"{what}: processes ended"

    def _resets_so_far(self) -> int:
        """How many sessions workers have ended by themselves, to begin again."""
        status = self.run.cluster.status()
        assert status is not None
        return status["counters"]["resets"]

    def _whole(self) -> None:
        brokers.wait_whole(self.run.brokers)


def leaders(servers: str) -> dict[tuple[str, int], tuple[int, list[int]]]:
    """Leader and replicas by topic and partition."""
    return {
        (name, number): (partition.leader, list(partition.replicas))
        for name, topic in brokers.metadata(servers).topics.items()
        for number, partition in topic.partitions.items()
    }


def move_leaders(servers: str, prefix: str) -> int:
    """Give the partitions of topics whose names begin with this, and of Kafka's own topics, another preferred
    leader, and elect it. Returns how many have got another leader.
    """
    before = leaders(servers)
    brokers.reassign(
        servers,
        {
            at: [*replicas[1:], replicas[0]]
            for at, (_, replicas) in before.items()
            if at[0].startswith(("__", prefix)) and len(replicas) > 1
        },
    )

    def moved() -> int:
        # The broker that is asked may be away, or about to be. Each client chooses anew.
        with suppress(KafkaException, TimeoutError):
            client = AdminClient({"bootstrap.servers": servers, "log_level": 0, "socket.timeout.ms": 5_000})
            client.elect_leaders(ElectionType.PREFERRED, None).result(10)
        after = leaders(servers)
        return sum(after[at][0] != leader for at, (leader, _) in before.items() if at in after)

    return wait_until(moved, "leaders move", 60, 0.5)
