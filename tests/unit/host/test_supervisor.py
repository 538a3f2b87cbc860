from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Ended, Failure, FailureKind
from fcluster.host.supervisor import (
    FAILURES_IN_A_ROW_MAX,
    Crew,
    Keeper,
    ProcessSpec,
    Supervisor,
    death_of,
    worker_name,
)
from tests.harness import within

DEADLINE_S = 10.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


class FakeChild:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.terminated = False
        self.killed = False
        self.ends_when_terminated = True
        self._ended = threading.Event()
        self._code = 0
        self._failure: Failure | None = None

    def failure(self) -> Failure | None:
        return self._failure

    def wait(self) -> int:
        assert self._ended.wait(DEADLINE_S * 2), "a test left a child running"
        return self._code

    def end(self, code: int, told: Failure | None = None) -> None:
        self._code, self._failure = code, told
        self._ended.set()

    def terminate(self) -> None:
        self.terminated = True
        if self.ends_when_terminated:
            self.end(-signal.SIGTERM)

    def kill(self) -> None:
        self.killed = True
        if not self._ended.is_set():
            self.end(-signal.SIGKILL)

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()


class Cluster:
    """A supervisor in a thread. The test decides what its children do."""

    def __init__(self, drain_timeout_s: float = DEADLINE_S, leave_timeout_s: float = DEADLINE_S) -> None:
        self.leave_timeout_s = leave_timeout_s
        self.slots: list[tuple[str, int]] = []
        self.children: dict[str, list[FakeChild]] = {}
        self.lines: list[tuple[str, str]] = []
        self.pids: dict[str, int] = {}
        self.drain_answers = True
        self.drains = 0
        self._next_pid = 1000
        self.supervisor = self._keeper(drain_timeout_s)
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self.supervisor.run)

    def _keeper(self, drain_timeout_s: float) -> Keeper:
        return Supervisor(
            [ProcessSpec(name, (name,)) for name in ("coordinator", "worker-0", "worker-1")],
            spawn=self._spawn,
            view=self,
            ask_drain=self._ask_drain,
            make_worker=self.make_worker,
            on_change=lambda pids: self.pids.update(pids),
            drain_timeout_s=drain_timeout_s,
            exit_grace_s=0.3,
            leave_timeout_s=self.leave_timeout_s,
        )

    def make_worker(self, number: int, slot: int) -> ProcessSpec:
        self.slots.append((worker_name(number), slot))
        return ProcessSpec(worker_name(number), (worker_name(number),))

    def _spawn(self, spec: ProcessSpec, _on_line: Callable[[str], None]) -> FakeChild:
        self._next_pid += 1
        child = FakeChild(self._next_pid)
        self.children.setdefault(spec.name, []).append(child)
        return child

    def _ask_drain(self) -> None:
        self.drains += 1
        if not self.drain_answers:
            raise FclusterError("no answer")

    def line(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def said(self, part: str) -> bool:
        return any(part in text for name, text in self.lines if name == "cluster")

    def child(self, name: str, start: int = 1) -> FakeChild:
        """The child of the `start`-th start of the process."""
        eventually(lambda: len(self.children.get(name, [])) >= start, f"start {start} of {name}")
        return self.children[name][start - 1]

    def end_everything(self, coordinator_code: int) -> None:
        for name in ("worker-0", "worker-1"):
            self.children[name][-1].end(ExitCode.DONE)
        self.children["coordinator"][-1].end(coordinator_code)

    def outcome(self) -> Ended:
        outcome = self._future.result(DEADLINE_S)
        assert not any(child.alive for started in self.children.values() for child in started)
        return outcome

    def close(self) -> None:
        self.supervisor.signal(signal.SIGINT)
        self.supervisor.signal(signal.SIGINT)
        self._future.result(DEADLINE_S)
        self._pool.shutdown()


class Agents(Cluster):
    """An agent: the same, with workers only."""

    supervisor: Crew

    def _keeper(self, drain_timeout_s: float) -> Keeper:
        return Crew(
            2,
            self.make_worker,
            spawn=self._spawn,
            view=self,
            on_change=self._note,
            exit_grace_s=0.3,
            leave_timeout_s=self.leave_timeout_s,
        )

    def _note(self, pids: dict[str, int]) -> None:
        self.pids = pids


@pytest.fixture
def agent() -> Iterator[Agents]:
    agent = Agents()
    agent.child("worker-1")
    yield agent
    agent.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.child("worker-1")
    yield cluster
    cluster.close()


def test_killed_worker_is_restarted_and_reported(cluster: Cluster) -> None:
    cluster.child("worker-0").end(-signal.SIGKILL)
    cluster.child("worker-0", 2)
    assert cluster.said("worker-0 was killed by SIGKILL; restart in 0.1 s")
    assert cluster.supervisor.restarts == 1
    assert len(cluster.children["worker-1"]) == 1


def test_killed_coordinator_is_restarted(cluster: Cluster) -> None:
    cluster.child("coordinator").end(-signal.SIGKILL)
    cluster.child("coordinator", 2)
    assert all(cluster.child(name).alive for name in ("worker-0", "worker-1"))


def test_restart_is_noted_with_the_new_process_id(cluster: Cluster) -> None:
    cluster.child("worker-0").end(-signal.SIGKILL)
    second = cluster.child("worker-0", 2)
    eventually(lambda: cluster.pids["worker-0"] == second.pid, "the new pid is noted")


def test_restart_delay_grows_with_each_death_in_a_row(cluster: Cluster) -> None:
    for start in (1, 2, 3):
        cluster.child("worker-0", start).end(-signal.SIGKILL)
    cluster.child("worker-0", 4)
    for delay in ("0.1 s", "0.2 s", "0.4 s"):
        assert cluster.said(f"restart in {delay}")


def test_success_of_the_coordinator_ends_all_processes_with_success(cluster: Cluster) -> None:
    cluster.end_everything(ExitCode.DONE)
    assert cluster.outcome() == Ended(ExitCode.DONE)


def test_hanging_worker_is_terminated_and_then_killed_when_the_coordinator_succeeds(cluster: Cluster) -> None:
    hanging = cluster.child("worker-0")
    hanging.ends_when_terminated = False
    cluster.child("worker-1").end(ExitCode.DONE)
    cluster.child("coordinator").end(ExitCode.DONE)
    assert cluster.outcome().exit_code == ExitCode.DONE
    assert hanging.terminated
    assert hanging.killed
    assert cluster.said("killed, because they didn't exit: worker-0")


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.JOB_FAILED])
def test_worker_that_leaves_just_before_the_coordinator_ends_is_not_reported(
    cluster: Cluster, code: int
) -> None:
    cluster.child("worker-0").end(code)
    cluster.child("worker-1").end(code)
    cluster.child("coordinator").end(ExitCode.DONE)
    assert cluster.outcome().exit_code == ExitCode.DONE
    assert not any("worker" in text for _, text in cluster.lines)


def test_worker_that_left_while_the_coordinator_stays_is_restarted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcluster.host.supervisor.LEFT_GRACE_S", 0.05)
    cluster.child("worker-0").end(ExitCode.DONE)
    cluster.child("worker-0", 2)
    assert cluster.said("restarting worker-0")


def test_job_failure_is_not_restarted_and_the_coordinators_reason_is_shown(cluster: Cluster) -> None:
    coordinator = cluster.child("coordinator")
    told = Failure.of_record("record 7 of flights/3 isn't JSON", "Correct it.")
    coordinator.end(ExitCode.JOB_FAILED, told)
    assert cluster.outcome() == Ended(ExitCode.MISTAKE, "record 7 of flights/3 isn't JSON", told)
    assert len(cluster.children["coordinator"]) == 1


def test_configuration_error_at_the_first_start_ends_everything_at_once(cluster: Cluster) -> None:
    worker = cluster.child("worker-0")
    worker.end(ExitCode.MISTAKE, Failure(FailureKind.HOST, "the directory is in use"))
    assert cluster.outcome().reason == "the directory is in use"
    assert cluster.child("coordinator").terminated


def test_repeated_crash_ends_everything_and_names_the_process(cluster: Cluster) -> None:
    for start in range(1, FAILURES_IN_A_ROW_MAX + 1):
        cluster.child("worker-1", start).end(ExitCode.CRASHED)
    outcome = cluster.outcome()
    assert outcome.exit_code == ExitCode.MISTAKE
    assert outcome.reason == "worker-1 crashed (exit code 70)"
    assert outcome.failure is not None
    assert "worker-1" in outcome.failure.remedy


def test_worker_may_exit_because_of_slow_records_any_number_of_times(cluster: Cluster) -> None:
    for start in range(1, FAILURES_IN_A_ROW_MAX + 2):
        cluster.child("worker-1", start).end(ExitCode.RECORD_OVERDUE)
    cluster.child("worker-1", FAILURES_IN_A_ROW_MAX + 2)
    assert cluster.said("worker-1 gave up a record that took too long")


def test_temporary_failures_are_restarted_more_often_than_crashes(cluster: Cluster) -> None:
    for start in range(1, FAILURES_IN_A_ROW_MAX + 1):
        cluster.child("worker-1", start).end(ExitCode.TEMPORARY)
    cluster.child("worker-1", FAILURES_IN_A_ROW_MAX + 1)


def test_first_signal_drains_and_ends_with_success_when_the_coordinator_does(cluster: Cluster) -> None:
    cluster.supervisor.signal(signal.SIGINT)
    eventually(lambda: cluster.drains == 1, "the coordinator is asked to drain")
    assert not any(cluster.child(name).terminated for name in cluster.children)
    cluster.end_everything(ExitCode.DONE)
    assert cluster.outcome() == Ended(ExitCode.DONE)


def test_second_signal_kills_everything(cluster: Cluster) -> None:
    cluster.supervisor.signal(signal.SIGINT)
    cluster.supervisor.signal(signal.SIGINT)
    assert cluster.outcome().exit_code == ExitCode.INTERRUPTED
    assert all(cluster.child(name).killed for name in ("coordinator", "worker-0", "worker-1"))


def test_drained_worker_is_not_restarted(cluster: Cluster) -> None:
    cluster.supervisor.signal(signal.SIGTERM)
    cluster.child("worker-0").end(ExitCode.DONE)
    cluster.child("worker-1").end(-signal.SIGKILL)
    eventually(lambda: cluster.said("worker-1 was killed by SIGKILL while draining"), "the death is logged")
    cluster.child("coordinator").end(ExitCode.DONE)
    assert cluster.outcome().exit_code == ExitCode.DONE
    assert cluster.supervisor.restarts == 0


def test_coordinator_that_dies_while_draining_is_restarted_and_asked_again(cluster: Cluster) -> None:
    cluster.supervisor.signal(signal.SIGINT)
    eventually(lambda: cluster.drains == 1, "the first coordinator is asked")
    cluster.child("coordinator").end(-signal.SIGKILL)
    cluster.child("coordinator", 2)
    eventually(lambda: cluster.drains == 2, "the second coordinator is asked")
    cluster.end_everything(ExitCode.DONE)
    assert cluster.outcome().exit_code == ExitCode.DONE


def test_drain_asks_until_the_coordinator_answers(cluster: Cluster) -> None:
    cluster.drain_answers = False
    cluster.supervisor.signal(signal.SIGINT)
    eventually(lambda: cluster.drains >= 2, "asked again")
    cluster.drain_answers = True
    cluster.end_everything(ExitCode.DONE)
    assert cluster.outcome().exit_code == ExitCode.DONE


def test_drain_that_takes_too_long_kills_and_says_that_nothing_is_lost() -> None:
    cluster = Cluster(drain_timeout_s=0.1)
    cluster.child("worker-1")
    for started in cluster.children.values():
        started[0].ends_when_terminated = False
    cluster.supervisor.signal(signal.SIGINT)
    outcome = cluster.outcome()
    assert outcome.exit_code == ExitCode.MISTAKE
    assert "drain didn't finish" in outcome.reason
    assert outcome.failure is not None
    assert "Nothing is lost" in outcome.failure.remedy
    cluster.close()


def test_drain_of_a_coordinator_that_waits_for_its_restart_starts_it_at_once(cluster: Cluster) -> None:
    for start in (1, 2, 3, 4, 5):
        cluster.child("coordinator", start).end(-signal.SIGKILL)
    eventually(lambda: cluster.said("restart in 1.6 s"), "a long back-off")
    cluster.supervisor.signal(signal.SIGINT)
    started = time.monotonic()
    cluster.child("coordinator", 6)
    assert within(time.monotonic() - started, 1.0)
    cluster.end_everything(ExitCode.DONE)
    assert cluster.outcome().exit_code == ExitCode.DONE


# --- as many workers as are wanted ------------------------------------------------------------------


def test_more_workers_are_started_and_the_newest_leave_first(cluster: Cluster) -> None:
    cluster.supervisor.resize(4)
    added = cluster.child("worker-3")
    eventually(lambda: cluster.supervisor.target == 4, "the target is 4")
    cluster.supervisor.resize(3)
    eventually(lambda: added.terminated, "the last one is asked to leave")
    eventually(lambda: cluster.said("worker-3 was killed by SIGTERM while leaving"), "it has left")
    assert cluster.supervisor.target == 3
    assert not cluster.child("worker-2").terminated
    assert cluster.supervisor.restarts == 0


def test_workers_with_the_highest_slots_leave_first(cluster: Cluster) -> None:
    pids = {"worker-0": 7, "worker-1": 3}
    cluster.supervisor.learn_slots({cluster.child(name).pid: slot for name, slot in pids.items()})
    cluster.supervisor.resize(1)
    eventually(lambda: cluster.child("worker-0").terminated, "the one with slot 7 leaves")
    assert not cluster.child("worker-1").terminated


def test_worker_that_waits_for_its_restart_leaves_before_one_that_runs(cluster: Cluster) -> None:
    for start in (1, 2, 3, 4):
        cluster.child("worker-0", start).end(-signal.SIGKILL)
    eventually(lambda: cluster.said("restart in 0.8 s"), "a long back-off")
    cluster.supervisor.resize(1)
    eventually(lambda: cluster.supervisor.target == 1, "it is removed from the list")
    assert not cluster.child("worker-1").terminated
    assert len(cluster.children["worker-0"]) == 4


def test_leaving_worker_is_replaced_when_more_are_wanted_again(cluster: Cluster) -> None:
    leaving = cluster.child("worker-1")
    leaving.ends_when_terminated = False
    cluster.supervisor.resize(1)
    eventually(lambda: leaving.terminated, "it is asked to leave")
    cluster.supervisor.resize(2)
    cluster.child("worker-2")
    leaving.end(ExitCode.DONE)
    eventually(lambda: cluster.said("worker-1 has left"), "it is gone")
    assert cluster.supervisor.target == 2
    assert len(cluster.children["worker-1"]) == 1


def test_worker_that_does_not_leave_in_time_is_killed() -> None:
    cluster = Cluster(leave_timeout_s=0.1)
    hanging = cluster.child("worker-1")
    hanging.ends_when_terminated = False
    cluster.supervisor.resize(1)
    eventually(lambda: hanging.killed, "it is killed")
    assert cluster.said("killing worker-1, which didn't leave within 0 s")
    cluster.close()


@pytest.mark.parametrize("kind", ["cluster", "agent"])
def test_drained_worker_is_not_restarted_and_the_target_shrinks(
    kind: str, request: pytest.FixtureRequest
) -> None:
    cluster: Cluster = request.getfixturevalue(kind)
    cluster.child("worker-0").end(ExitCode.DRAINED)
    eventually(lambda: cluster.supervisor.target == 1, "the target is one less")
    assert cluster.said("worker-0 was drained and isn't restarted; the target is now 1 workers")
    cluster.child("worker-1").end(-signal.SIGKILL)
    cluster.child("worker-1", 2)
    assert len(cluster.children["worker-0"]) == 1


def test_dead_worker_is_restarted_with_its_slot(agent: Agents) -> None:
    agent.supervisor.learn_slots({agent.child("worker-1").pid: 5})
    agent.child("worker-1").end(-signal.SIGKILL)
    agent.child("worker-1", 2)
    assert agent.slots[-1] == ("worker-1", 5)


# --- workers whose coordinator is elsewhere ---------------------------------------------------------


@pytest.mark.parametrize(("failed", "code"), [(False, ExitCode.DONE), (True, ExitCode.JOB_FAILED)])
def test_agent_ends_with_its_job(agent: Agents, failed: bool, code: int) -> None:
    agent.child("worker-0").end(code)
    agent.supervisor.end(Ended(int(failed), "so it is", Failure.of_record("so it is") if failed else None))
    agent.child("worker-1").end(code)
    assert agent.outcome().exit_code == code
    assert agent.supervisor.restarts == 0


def test_agent_learns_of_a_failed_job_from_a_worker(agent: Agents) -> None:
    agent.child("worker-0").end(ExitCode.JOB_FAILED)
    assert agent.outcome().exit_code == ExitCode.JOB_FAILED


def test_agent_that_was_not_told_of_the_end_learns_it_from_its_workers(agent: Agents) -> None:
    agent.child("worker-0").end(ExitCode.JOB_ENDED)
    eventually(lambda: "worker-0" not in agent.pids, "the exit is noted")
    agent.supervisor.resize(5)  # an order that comes too late
    # The other worker commits its last epoch in the meantime.
    assert not agent.child("worker-1").terminated
    agent.child("worker-1").end(ExitCode.JOB_ENDED)
    assert agent.outcome() == Ended(ExitCode.DONE)
    assert agent.supervisor.restarts == 0
    assert sorted(agent.children) == ["worker-0", "worker-1"]


def test_dead_worker_is_not_restarted_when_another_one_reports_the_end_of_the_job(
    agent: Agents,
) -> None:
    agent.child("worker-0").end(ExitCode.DONE)  # it was asked to leave, and would be started again
    agent.child("worker-1").end(ExitCode.JOB_ENDED)
    assert agent.outcome() == Ended(ExitCode.DONE)
    assert agent.supervisor.restarts == 0


def test_agent_ends_after_its_workers_have_left_on_the_first_signal(agent: Agents) -> None:
    for name in ("worker-0", "worker-1"):
        agent.child(name).ends_when_terminated = False
    agent.supervisor.signal(signal.SIGTERM)
    eventually(lambda: all(agent.child(f"worker-{n}").terminated for n in (0, 1)), "all are asked")
    agent.child("worker-0").end(ExitCode.DONE)
    agent.child("worker-1").end(ExitCode.DONE)
    assert agent.outcome() == Ended(ExitCode.DONE)
    assert not any(agent.child(f"worker-{n}").killed for n in (0, 1))


def test_second_signal_to_an_agent_kills(agent: Agents) -> None:
    agent.child("worker-0").ends_when_terminated = False
    agent.supervisor.signal(signal.SIGTERM)
    agent.supervisor.signal(signal.SIGTERM)
    assert agent.outcome().exit_code == ExitCode.INTERRUPTED
    assert agent.child("worker-0").killed


def test_agent_whose_workers_were_all_drained_waits_for_orders(agent: Agents) -> None:
    for name in ("worker-0", "worker-1"):
        agent.child(name).end(ExitCode.DRAINED)
    eventually(lambda: agent.supervisor.target == 0, "the target is 0")
    agent.supervisor.resize(1)
    agent.child("worker-0", 2)


def test_agent_continues_while_one_of_its_workers_does(agent: Agents) -> None:
    for start in range(1, FAILURES_IN_A_ROW_MAX + 1):
        agent.child("worker-0", start).end(ExitCode.CRASHED)
    agent.child("worker-0", FAILURES_IN_A_ROW_MAX + 1)
    assert not agent.child("worker-1").terminated


def test_agent_fails_when_all_workers_fail_even_at_different_times(agent: Agents) -> None:
    agent.child("worker-0").end(ExitCode.MISTAKE)
    agent.child("worker-0", 2)
    agent.child("worker-1").end(ExitCode.MISTAKE)
    assert agent.outcome().reason == "worker-1 exited with an error (exit code 1)"


def test_agent_fails_when_no_worker_can_be_started(agent: Agents) -> None:
    for name in ("worker-0", "worker-1"):
        agent.child(name).end(ExitCode.MISTAKE, Failure(FailureKind.JOB, "the job can't be loaded"))
    assert agent.outcome().reason == "the job can't be loaded"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by SIGKILL"),
        (-27, "gave up a handler that held the interpreter's lock (see the stacks above)"),
        (0, "ended"),
        (1, "exited with an error (exit code 1)"),
        (70, "crashed (exit code 70)"),
    ],
)
def test_death_in_words(code: int, words: str) -> None:
    assert death_of(code) == words
