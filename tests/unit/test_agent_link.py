"""An agent's connection, against a coordinator that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from fcluster.agent import AgentLink, Staff
from fcluster.common import messages
from fcluster.common.settings import resolve
from tests.harness import wait_until
from tests.unit.test_admin_client import FakeCoordinator


@dataclass
class Agent:
    """What a link has led to. A coordinator answers each report with `answer`."""

    target: int = 2
    running: list[int] = field(default_factory=lambda: [11, 12])
    resized: list[int] = field(default_factory=list[int])
    slots: dict[int, int] = field(default_factory=dict[int, int])
    ends: list[tuple[bool, str]] = field(default_factory=list[tuple[bool, str]])
    said: list[str] = field(default_factory=list[str])
    answer: messages.FromCoordinator = field(default_factory=lambda: messages.AgentOrder(1, 0, 2))

    def start(self) -> Agent:
        self.coordinator = FakeCoordinator(lambda _request: messages.encode(self.answer))
        self.link = AgentLink(
            resolve({}, None, {}, {"brokers": "127.0.0.1:1", "heartbeat.interval.ms": 20}),
            "job",
            address=self.coordinator.address,
            staff=lambda: Staff(self.target, self.running),
            resize=self.resize,
            learn_slots=self.slots.update,
            on_end=lambda failed, reason: self.ends.append((failed, reason)),
            say=self.said.append,
        )
        self.link.start()
        return self

    def resize(self, target: int) -> None:
        self.resized.append(target)
        self.target = target

    @property
    def reports(self) -> list[messages.AgentReport]:
        return [r for r in self.coordinator.requests if isinstance(r, messages.AgentReport)]

    def wait_for(self, condition: Callable[[messages.AgentReport], bool]) -> messages.AgentReport:
        """Until the newest report is so."""
        wait_until(lambda: self.reports and condition(self.reports[-1]), "a report", 10, 0.005)
        return self.reports[-1]

    def close(self) -> None:
        self.link.close()
        self.coordinator.close()


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent().start()
    yield agent
    agent.close()


def test_agent_says_how_things_stand_and_again_when_they_change(agent: Agent) -> None:
    report = agent.wait_for(lambda report: report.target == 2)
    assert (report.job, report.running, report.taken_order) == ("job", [11, 12], 0)
    agent.running = [11, 12, 13]
    agent.link.tell()
    agent.wait_for(lambda report: report.running == [11, 12, 13])


def test_order_is_taken_once_though_it_is_repeated_and_said_so(agent: Agent) -> None:
    agent.answer = messages.AgentOrder(3, 7, 5)
    agent.wait_for(lambda report: (report.taken_term, report.taken_order, report.target) == (3, 7, 5))
    agent.target = 4  # one of them was drained
    count = len(agent.reports)
    wait_until(lambda: len(agent.reports) > count + 3, "more reports")
    assert agent.resized == [5]
    agent.answer = messages.AgentOrder(2, 9, 1)  # of a leader that was deposed
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
def test_agent_hears_that_the_job_has_ended(agent: Agent, failed: bool) -> None:
    agent.answer = messages.Shutdown(1, 0, "so it is", failed)
    wait_until(lambda: agent.ends, "the end is heard", 10, 0.005)
    assert agent.ends[0] == (failed, "so it is")


def test_refusal_is_said_once(agent: Agent) -> None:
    agent.answer = messages.Refused(1, "another job", retry=False)
    wait_until(lambda: agent.said, "it is said", 10, 0.005)
    count = len(agent.reports)
    wait_until(lambda: len(agent.reports) > count + 3, "more reports")
    assert agent.said == ["refused by the coordinator: another job"]


def test_end_in_the_journal_counts_if_it_is_not_of_a_former_run(agent: Agent) -> None:
    agent.link._on_job_ended(9, False, "before we began")
    assert agent.ends == []
    agent.answer = messages.AgentOrder(4, 0, 2)
    wait_until(lambda: agent.link._orders.term == 4, "it has heard of a term", 10, 0.005)
    agent.link._on_job_ended(3, False, "a former run")
    assert agent.ends == []
    agent.link._on_job_ended(4, True, "this one")
    assert agent.ends == [(True, "this one")]
