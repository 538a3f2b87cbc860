"""Agents, and the commands that scale, with real processes, as on several hosts.

Which process finds the coordinator first depends on chance. So tests delay connections: those that are about
the order, and all of them with `FCLUSTER_TEST_LATE=agent:3000` or `worker:3000` (each agent, or its first
worker, waits so many milliseconds before it looks for the coordinator), or `coordinator:3000`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fcluster.common.errors import FclusterError
from fcluster.common.failpoints import ENVIRONMENT_VARIABLE, Arm
from fcluster.common.settings import resolve
from fcluster.wire.admin_client import AdminClient
from fcluster.wire.discovery import find_leader
from tests.harness import process_state, wait_until
from tests.integration.test_up import User, assert_counted

pytestmark = pytest.mark.timeout(240)
HOST = socket.gethostname()
QUICK = ("--set", "initial.rebalance.delay.ms=300", "--set", "session.timeout.ms=2000")
RECORDS = 400
LATE, _, LATE_MS = os.environ.get("FCLUSTER_TEST_LATE", "").partition(":")
NEVER_MS = 600_000
"""Longer than any test, so that it never ends."""


class Site(User):
    """A job whose processes are started separately, as on several hosts."""

    def __init__(self, directory: Path, prefix: str, brokers: str) -> None:
        super().__init__(directory, prefix)
        self.brokers = brokers
        self.job = f"{prefix}job"
        self.records = 0
        self.common: tuple[str, ...] = ("--brokers", brokers, "--snapshots", "snapshots", *QUICK)
        self.put_in("--partitions", "6")

    def put_in(self, *more: str) -> None:
        self.produce(RECORDS, "--brokers", self.brokers, *more)
        self.records += RECORDS

    def coordinator(self, name: str = "coordinator", workers: int = 2) -> subprocess.Popen[bytes]:
        if LATE == "coordinator":
            time.sleep(int(LATE_MS) / 1000)  # the fault: all other processes start first
        return self.popen(
            "coordinator", "job.py", "--workers", str(workers), *self.common, output=f"{name}.log"
        )

    def agent(
        self, name: str, workers: int, late: str = "", late_ms: int = NEVER_MS
    ) -> subprocess.Popen[bytes]:
        """Start an agent.

        Args:
            late: "agent" or "worker": the agent, or its first worker, looks for the coordinator late.
            late_ms: how late.
        """
        if LATE and not late:
            late, late_ms = LATE, int(LATE_MS)
        points = self.directory / f"{name}-failpoints"
        points.mkdir()
        if late in ("agent", "worker"):
            arm = Arm("hold", after_ms=late_ms)
            (points / f"{late}.seeks-leader").write_bytes(msgspec.json.encode(arm))
        arguments = ("worker", "job.py", "--workers", str(workers), "--data-dir", name, *self.common)
        return self.popen(*arguments, output=f"{name}.log", env={ENVIRONMENT_VARIABLE: str(points)})

    def command(self, *command: str, code: int = 0) -> str:
        return self.run(*command, "--brokers", self.brokers, "--job", self.job, code=code)

    def status(self) -> dict[str, Any]:
        try:
            with self.admin() as client:
                return client.status(1000)
        except FclusterError:
            return {}

    def admin(self) -> AdminClient:
        leader = find_leader(resolve({}, None, {}, {"brokers": self.brokers}), self.job)
        if leader is None:
            raise FclusterError("nobody leads")
        return AdminClient(leader.address)

    def wait_for(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        def so() -> dict[str, Any]:
            status = self.status()
            return status if status and condition(status) else {}

        return wait_until(so, what, 60, 0.1)

    def wait_settled(self, workers: int) -> dict[str, Any]:
        """Wait until this many workers run all shards, and their agents have confirmed that they run them.

        An agent has a connection of its own, so the coordinator may know the workers before the agent, or the
        other
        way round.
        """
        return self.wait_for(
            lambda status: (
                len(status["workers"]) == workers == sum(running(status).values())
                and all(worker["agent"] for worker in status["workers"])
                and all(part["phase"] == "running" for part in (*status["workers"], *status["shards"]))
            ),
            f"{workers} workers run all shards",
        )

    def assert_exact(self) -> None:
        """Check that each record was processed exactly once."""
        text = self.run(
            "consume", f"{self.prefix}out", "--from-beginning", "--max", str(self.records),
            "--brokers", self.brokers,
        )  # fmt: skip
        assert_counted([json.loads(line) for line in text.splitlines()], self.records)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()


@pytest.fixture
def site(kafka: str, tmp_path: Path, topic_prefix: str) -> Iterator[Site]:
    site = Site(tmp_path, topic_prefix, kafka)
    yield site
    for log in sorted(tmp_path.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text()[-3000:]}")
    site.close()


def running(status: dict[str, Any]) -> dict[int, int]:
    """The number of workers of each agent, by the agent's process id."""
    return {agent["pid"]: agent["running"] for agent in status["agents"]}


def pids(status: dict[str, Any]) -> dict[int, int]:
    """The process id of each slot."""
    return {worker["slot"]: worker["pid"] for worker in status["workers"]}


def has_another(slot: int, pid: int, status: dict[str, Any]) -> bool:
    """Whether the slot has a worker other than this process."""
    return pids(status).get(slot, pid) != pid


def test_scaling_up_and_down_over_agents_loses_nothing(site: Site) -> None:
    site.coordinator()
    first, second = site.agent("a", 1), site.agent("b", 1)
    site.wait_settled(2)

    said = site.command("scale", "5")
    assert said.endswith("done\n")
    assert sorted(running(site.wait_settled(5)).values()) == [2, 3]
    site.put_in()

    site.command("scale", f"{HOST}:{first.pid}=0", f"{HOST}:{second.pid}=1")
    status = site.wait_settled(1)
    assert running(status) == {first.pid: 0, second.pid: 1}
    # All workers that left did so cleanly, after their shards had moved.
    assert status["counters"]["leaves"] == 4
    assert status["counters"]["deaths"] == status["counters"]["fences"] == 0
    site.put_in()
    site.assert_exact()


def test_scale_reports_what_it_cannot_do(site: Site) -> None:
    # More than the commands take on a busy machine, so that the agent that is stopped below stays connected.
    site.common += ("--set", "session.timeout.ms=60000")
    site.coordinator()
    site.wait_for(bool, "a coordinator")
    assert "there is no agent that could start or stop workers" in site.command("scale", "3", code=1)
    first, _second = site.agent("a", 1), site.agent("b", 1)
    site.wait_settled(2)
    said = site.command("scale", "elsewhere=2", code=1)
    assert f"there is no agent 'elsewhere'. Connected are: {HOST}:" in said
    assert f"{HOST}:{first.pid} (1 workers)" in said
    assert f"there are several agents on '{HOST}'" in site.command("scale", f"{HOST}=2", code=1)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        said = site.command("scale", f"{HOST}:{first.pid}=2", "--timeout", "5", code=1)
        assert f"not complete after 5 s: agent {HOST}:{first.pid} hasn't confirmed" in said
    finally:
        os.kill(first.pid, signal.SIGCONT)
    site.wait_settled(3)


def test_drained_worker_is_not_restarted_and_its_agent_has_one_less(site: Site) -> None:
    site.coordinator()
    agent = site.agent("a", 3)
    before = pids(site.wait_settled(3))
    said = site.command("drain", "9", code=1)
    assert "there is no worker '9'. Running, by slot: 0 (" in said

    said = site.command("drain", f"{HOST}:{before[1]}")
    assert "is leaving" in said
    assert "has left" in said
    wait_until(
        lambda: "was drained and isn't restarted; the target is now 2 workers" in site.log("a"),
        "it is logged",
    )
    status = site.wait_settled(2)
    assert running(status) == {agent.pid: 2}
    assert status["agents"][0]["target"] == 2
    assert pids(status) == {slot: pid for slot, pid in before.items() if slot != 1}
    site.put_in()
    site.assert_exact()


def test_worker_of_an_agent_that_dies_or_leaves_comes_back_with_its_slot(site: Site) -> None:
    site.coordinator()
    agent = site.agent("a", 2)
    former = pids(site.wait_settled(2))
    for number in (signal.SIGKILL, signal.SIGTERM):
        for slot in former:
            os.kill(former[slot], number)
            gone = former[slot]
            site.wait_for(partial(has_another, slot, gone), f"slot {slot} is back")
            former = pids(site.wait_settled(2))
    assert set(pids(site.status())) == {0, 1}
    assert agent.poll() is None
    site.assert_exact()


def test_workers_of_a_killed_agent_end_and_others_take_over(site: Site) -> None:
    site.coordinator(workers=4)
    doomed, staying = site.agent("a", 2), site.agent("b", 2)
    status = site.wait_settled(4)
    mine = [worker["pid"] for worker in status["workers"] if f"-{doomed.pid}-" in worker["agent"]]
    assert len(mine) == 2
    doomed.kill()
    wait_until(lambda: all(process_state(pid) == "X" for pid in mine), "its workers die with it", 10)
    status = site.wait_settled(2)
    assert running(status) == {staying.pid: 2}
    site.put_in()
    site.assert_exact()


def test_agent_that_is_asked_to_leave_ends_when_its_workers_have_left(site: Site) -> None:
    site.coordinator()
    leaving, staying = site.agent("a", 1), site.agent("b", 1)
    site.wait_settled(2)
    leaving.terminate()
    assert leaving.wait(60) == 0
    status = site.wait_settled(1)
    assert running(status) == {staying.pid: 1}
    assert status["counters"]["leaves"] == 1
    assert status["counters"]["deaths"] == 0
    site.assert_exact()


def test_agents_stay_when_the_leader_changes(site: Site) -> None:
    leader = site.coordinator()
    agent = site.agent("a", 2)
    before = pids(site.wait_settled(2))
    site.coordinator("standby")
    site.wait_for(lambda status: status["standbys"], "a coordinator stands by")
    leader.kill()
    status = site.wait_for(lambda status: status["term"] == 2 and status["agents"], "the agent is back")
    assert running(status) == {agent.pid: 2}
    assert pids(site.wait_settled(2)) == before
    site.command("scale", "3")
    assert running(site.wait_settled(3)) == {agent.pid: 3}
    site.put_in()
    site.assert_exact()


def test_agent_ends_with_its_job(site: Site) -> None:
    coordinator = site.coordinator()
    agent = site.agent("a", 2)
    site.wait_settled(2)
    site.assert_exact()
    with site.admin() as client:
        client.stop()
    assert coordinator.wait(60) == 0
    assert agent.wait(60) == 0, site.log("a")
    assert " ERROR " not in site.log("a")


def test_agent_that_never_connected_to_the_coordinator_ends_with_its_workers_when_the_job_is_stopped(
    site: Site,
) -> None:
    coordinator = site.coordinator()
    agent = site.agent("a", 2, late="agent")
    site.wait_for(lambda status: len(status["workers"]) == 2, "both workers have joined")
    site.assert_exact()  # so the workers are at work
    assert site.status()["agents"] == []
    with site.admin() as client:
        client.stop()
    assert coordinator.wait(60) == 0
    assert agent.wait(60) == 0, site.log("a")
    assert "restarting worker" not in site.log("a")


def test_agent_that_started_before_the_coordinator_ends_with_the_job_though_none_of_its_workers_joined(
    site: Site,
) -> None:
    # The journal contains the end of a former run, which isn't the end of this agent's run.
    first = site.coordinator("first")
    site.wait_for(bool, "a coordinator")
    with site.admin() as client:
        client.stop()
    assert first.wait(60) == 0
    agent = site.agent("a", 1, late="worker")
    wait_until(lambda: "no coordinator of job" in site.log("a"), "it waits for the next run")
    coordinator = site.coordinator(workers=1)
    status = site.wait_for(lambda status: status["agents"], "the agent is known")
    assert status["workers"] == []
    assert agent.poll() is None
    with site.admin() as client:
        client.stop()
    assert coordinator.wait(60) == 0
    assert agent.wait(60) == 0, site.log("a")


def test_agent_fails_with_its_job(site: Site) -> None:
    job = (site.directory / "job.py").read_text()
    (site.directory / "job.py").write_text(job.replace("n = ctx.state", "record[3]; n = ctx.state"))
    coordinator = site.coordinator()
    agent = site.agent("a", 2)
    assert coordinator.wait(60) == 3
    assert agent.wait(60) == 3, site.log("a")


def test_agent_whose_workers_are_all_refused_says_why(site: Site) -> None:
    site.coordinator()
    site.wait_for(bool, "a coordinator")
    agent = site.popen(
        "worker",
        "job.py",
        "--workers",
        "2",
        "--brokers",
        site.brokers,
        "--snapshots",
        "others",
        output="a.log",
    )
    assert agent.wait(60) == 1
    assert "error: refused by the coordinator: the worker's snapshot store" in site.log("a").splitlines()[-2]


def test_up_is_an_agent(site: Site) -> None:
    up = site.popen("up", "job.py", "--workers", "1", *site.common, output="up.log")
    site.wait_settled(1)
    site.run("scale", "3")
    status = site.wait_settled(3)
    assert sorted(pids(status)) == [0, 1, 2]
    assert running(status) == {up.pid: 3}
    assert f"{HOST}:{up.pid}" in site.run("status")
    site.run("drain", "0")
    assert running(site.wait_settled(2)) == {up.pid: 2}
    os.killpg(up.pid, signal.SIGINT)
    assert up.wait(60) == 0, site.log("up")
    site.assert_exact()
