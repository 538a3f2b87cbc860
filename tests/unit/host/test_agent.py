"""An agent's connection to a coordinator that is scripted by the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from fcluster.common.failures import Ended, Failure
from fcluster.common.settings import resolve
from fcluster.host.agent import AgentLink, Staff
from fcluster.wire import leader_search, messages
from fcluster.wire.discovery import Leader
from tests.harness import wait_until, wait_until_equal
from tests.unit.wire.test_admin_client import FakeCoordinator

WHY = Failure.of_text("so it is")


@dataclass
class Agent:
    """What a link reported. A coordinator answers each report with `answer`."""

    target: int = 2
    running: list[int] = field(default_factory=lambda: [11, 12])
    resized: list[int] = field(default_factory=list[int])
    slots: dict[int, int] = field(default_factory=dict[int, int])
    ends: list[Ended] = field(default_factory=list[Ended])
    said: list[str] = field(default_factory=list[str])
    answer: messages.FromCoordinator = field(default_factory=lambda: messages.AgentOrder(1, 0, 2))

    def start(self) -> Agent:
        self.coordinator = FakeCoordinator(lambda _request: messages.encode(self.answer))
        self.link = self.make_link(self.coordinator.address)
        self.link.start()
        return self

    def make_link(self, address: str) -> AgentLink:
        return AgentLink(
            resolve({}, None, {}, {"brokers": "127.0.0.1:1", "heartbeat.interval.ms": 20}),
            "job",
            address=address,
            staff=lambda: Staff(self.target, self.running),
            resize=self.resize,
            learn_slots=self.slots.update,
            on_end=self.ends.append,
            say=self.said.append,
        )

    def resize(self, target: int) -> None:
        self.resized.append(target)
        self.target = target

    @property
    def reports(self) -> list[messages.AgentReport]:
        return [r for r in self.coordinator.requests if isinstance(r, messages.AgentReport)]

    def wait_for(self, condition: Callable[[messages.AgentReport], bool]) -> messages.AgentReport:
        """Wait until the newest report fulfils the condition."""
        wait_until(lambda: self.reports and condition(self.reports[-1]), "a report", 10, 0.005)
        return self.reports[-1]

    def close(self) -> None:
        self.link.close()
        if not self.coordinator._closing:
            self.coordinator.close()


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent().start()
    yield agent
    agent.close()


def test_agent_reports_its_state_and_each_change(agent: Agent) -> None:
    report = agent.wait_for(lambda report: report.target == 2)
    assert (report.job, report.running, report.taken_order) == ("job", [11, 12], 0)
    agent.running = [11, 12, 13]
    agent.link.tell()
    agent.wait_for(lambda report: report.running == [11, 12, 13])


def test_repeated_order_is_carried_out_once_and_confirmed(agent: Agent) -> None:
    agent.answer = messages.AgentOrder(3, 7, 5)
    agent.wait_for(lambda report: (report.taken_term, report.taken_order, report.target) == (3, 7, 5))
    agent.target = 4  # one worker was drained
    count = len(agent.reports)
    wait_until(lambda: len(agent.reports) > count + 3, "more reports")
    assert agent.resized == [5]
    agent.answer = messages.AgentOrder(2, 9, 1)  # from a leader that was deposed
    count = len(agent.reports)
    wait_until(lambda: len(agent.reports) > count + 3, "more reports")
    assert agent.resized == [5]


def test_agent_asks_for_slots_until_it_knows_them(agent: Agent) -> None:
    assert agent.wait_for(lambda report: report.slots_wanted)
    agent.answer = messages.AgentOrder(1, 0, 2, {11: 0, 12: 4})
    agent.wait_for(lambda report: not report.slots_wanted)
    assert agent.slots == {11: 0, 12: 4}
    agent.running = [11, 99]
    agent.wait_for(lambda report: report.slots_wanted)


@pytest.mark.parametrize("failed", [False, True])
def test_agent_is_told_that_the_job_has_ended(agent: Agent, failed: bool) -> None:
    agent.answer = messages.Shutdown(1, 0, "so it is", WHY if failed else None)
    wait_until(lambda: agent.ends, "the end arrives", 10, 0.005)
    assert agent.ends[0].exit_code == (3 if failed else 0)
    assert agent.ends[0].failure == (WHY if failed else None)
    assert agent.ends[0].reason == "so it is"


def test_refusal_is_logged_once(agent: Agent) -> None:
    agent.answer = messages.Refused(1, "another job", retry=False)
    wait_until(lambda: agent.said, "it is logged", 10, 0.005)
    count = len(agent.reports)
    wait_until(lambda: len(agent.reports) > count + 3, "more reports")
    assert agent.said == ["refused by the coordinator: another job"]


# --- what the journal says ------------------------------------------------------------------------------


class FakeJournal:
    """Takes the place of `LeaderFollower`. The test decides what the journal says."""

    def __init__(self) -> None:
        self.leader: Leader | None = None
        self.ended: tuple[int, Ended] | None = None
        self.is_open = True
        self.looks = 0

    def poll(self, timeout_s: float) -> bool:
        time.sleep(0.001)
        self.looks += 1
        return True

    def close(self) -> None:
        pass

    def looked(self) -> None:
        """Wait until it was read."""
        looks = self.looks
        wait_until(lambda: self.looks > looks + 1, "the journal is read", 10, 0.002)


@dataclass
class Lonely(Agent):
    """An agent that gets no address."""

    def start(self) -> Lonely:
        self.coordinator = FakeCoordinator(lambda _request: messages.encode(self.answer))
        self.link = self.make_link("")
        self.link.start()
        return self

    def leader(self, term: int, *, answers: bool = True) -> Leader:
        address = self.coordinator.address if answers else "tcp://127.0.0.1:1"
        return Leader(address, term, "host", 1, f"run{term}")


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> FakeJournal:
    journal = FakeJournal()
    monkeypatch.setattr(leader_search, "LeaderFollower", lambda _settings, _job: journal)
    return journal


@pytest.fixture
def lonely(journal: FakeJournal) -> Iterator[Lonely]:
    lonely = Lonely()
    yield lonely
    lonely.close()


def test_agent_that_never_connected_learns_from_the_journal_that_the_job_has_ended(
    journal: FakeJournal, lonely: Lonely
) -> None:
    journal.leader = lonely.leader(3, answers=False)
    lonely.start()
    journal.looked()
    assert lonely.ends == []
    journal.leader, journal.ended = None, (3, Ended(0, "asked to stop"))
    wait_until(lambda: lonely.ends, "the end is known", 10, 0.005)
    journal.looked()
    assert lonely.ends == [Ended(0, "asked to stop")]


def test_agent_that_waits_for_the_next_run_is_not_ended_by_the_last_one(
    journal: FakeJournal, lonely: Lonely
) -> None:
    journal.ended = (3, Ended(3, "the run before", WHY))
    lonely.start()
    journal.looked()
    assert lonely.ends == []
    # A run that ends between two reads, before the agent has connected to its leader.
    journal.ended = (4, Ended(3, "this run", WHY))
    wait_until(lambda: lonely.ends, "the end is known", 10, 0.005)
    assert lonely.ends == [Ended(3, "this run", WHY)]


def test_agent_that_lost_its_leader_learns_from_the_journal_that_the_job_has_ended(
    journal: FakeJournal, lonely: Lonely
) -> None:
    lonely.answer = messages.AgentOrder(4, 0, 2)
    lonely.start()
    journal.leader = lonely.leader(4)
    lonely.wait_for(lambda report: report.target == 2)
    wait_until_equal(lambda: lonely.link._orders.term, 4, "it knows a term", 10, 0.005)
    journal.leader, journal.ended = None, (4, Ended(3, "the end", WHY))
    lonely.coordinator.close()
    wait_until(lambda: lonely.ends, "the end is known", 10, 0.005)
    assert lonely.ends == [Ended(3, "the end", WHY)]


def test_agent_that_connects_only_while_the_job_ends_is_told_so(journal: FakeJournal, lonely: Lonely) -> None:
    lonely.answer = messages.Shutdown(4, 0, "so it is")
    lonely.start()
    journal.leader = lonely.leader(4)
    wait_until(lambda: lonely.ends, "the end arrives", 10, 0.005)
    assert lonely.ends[0] == Ended(0, "so it is")
