"""Agents in the coordinator's core, and what an agent does with its orders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.coordinator.core import events
from fcluster.coordinator.core.agents import AGENTS_MAX, Agents, spread
from fcluster.host.agent import Orders
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness

ADMIN = b"admin"
TARGETS = st.dictionaries(st.binary(min_size=1, max_size=2), st.integers(0, 30), min_size=1, max_size=8)


class FakeAgent:
    """An agent that carries out orders when the test says so."""

    def __init__(self, harness: Harness, name: str, target: int, host: str = "host-1", pid: int = 1) -> None:
        self.harness = harness
        self.name = name
        self.peer = name.encode()
        self.host, self.pid = host, pid
        self.target = target
        self.orders = Orders()
        self.report()

    def report(
        self, *, job: str = "job", slots_wanted: bool = False, running: list[int] | None = None
    ) -> None:
        report = messages.AgentReport(
            self.name, job, self.host, self.pid, self.target, running or [], self.orders.taken_term,
            self.orders.taken_order, slots_wanted,
        )  # fmt: skip
        self.harness.say(self.peer, report)

    def told(self) -> list[messages.AgentOrder]:
        return self.harness.messages_to(self.peer, messages.AgentOrder)

    def obey(self) -> None:
        for order in self.told():
            target = self.orders.take(order)
            self.target = self.target if target is None else target
        self.report()


def scale(harness: Harness, total: int = -1, **places: int) -> messages.ScaleReply:
    reply = ask(harness, messages.ScaleRequest(total, places))
    assert isinstance(reply, messages.ScaleReply), reply
    return reply


def ask(harness: Harness, request: messages.ToCoordinator) -> messages.FromCoordinator:
    harness.say(ADMIN, request)
    return harness.messages_to(ADMIN, messages.Message)[-1]


def refusal(harness: Harness, request: messages.ToCoordinator) -> str:
    reply = ask(harness, request)
    assert isinstance(reply, messages.Refused), reply
    assert not reply.retry
    return reply.reason


@given(st.integers(0, 100), TARGETS)
def test_spread_is_even_and_starts_and_ends_as_few_workers_as_possible(
    total: int, targets: dict[bytes, int]
) -> None:
    wanted = spread(total, targets)
    assert sum(wanted.values()) == total
    assert set(wanted) == set(targets)
    assert max(wanted.values()) - min(wanted.values()) <= 1
    changes = sum(abs(wanted[peer] - targets[peer]) for peer in targets)
    # No other even spread needs fewer: a slot more here can't be a slot more elsewhere at lower cost.
    share = total // len(targets)
    more = [peer for peer in targets if wanted[peer] > share]
    less = [peer for peer in targets if wanted[peer] == share]
    for one in more:
        for other in less:
            swapped = wanted | {one: share, other: share + 1}
            assert sum(abs(swapped[peer] - targets[peer]) for peer in targets) >= changes


def test_total_is_spread_over_the_agents_and_repeated_until_it_is_confirmed() -> None:
    harness = Harness()
    one, two = FakeAgent(harness, "a1", 4), FakeAgent(harness, "a2", 1)
    reply = scale(harness, 5)
    assert [(target.agent, target.target) for target in reply.targets] == [("a1", 3), ("a2", 2)]
    assert (one.told()[-1].target, two.told()[-1].target) == (3, 2)
    assert harness.core.status()["agents"][0]["wanted"] == 3
    one.report()  # it hasn't received the order yet
    assert one.told()[-1].order == one.told()[-2].order > 0
    one.obey()
    assert one.told()[-1].order == 0
    shown = harness.core.status()["agents"][0]
    assert (shown["agent"], shown["target"], shown["wanted"], shown["running"]) == ("a1", 3, -1, 0)


def test_target_that_shrank_after_the_order_stays_smaller() -> None:
    harness = Harness()
    agent = FakeAgent(harness, "a1", 1)
    scale(harness, 4)
    agent.obey()
    agent.target = 3  # one of its workers was drained
    agent.obey()
    assert agent.target == 3
    assert harness.core.status()["agents"][0]["target"] == 3


def test_agent_that_already_has_its_target_gets_no_order() -> None:
    harness = Harness()
    agent = FakeAgent(harness, "a1", 2)
    assert [target.target for target in scale(harness, 2).targets] == [2]
    assert agent.told()[-1].order == 0


def test_agents_are_found_by_host_address_and_id() -> None:
    harness = Harness()
    agents = [FakeAgent(harness, "a1", 1, host="h1"), FakeAgent(harness, "a2", 1, host="h2", pid=7)]
    agents.append(FakeAgent(harness, "a3", 1, host="h2", pid=8))
    scale(harness, **{"h1": 5, "h2:7": 6, "a3": 7})
    for agent in agents:
        agent.obey()
    assert [agent.target for agent in agents] == [5, 6, 7]


def test_impossible_scale_is_refused_with_a_list_of_agents() -> None:
    harness = Harness()
    FakeWorker(harness, "w0").hello()
    assert "there is no agent" in refusal(harness, messages.ScaleRequest(3))
    FakeAgent(harness, "a1", 1, host="h", pid=1)
    FakeAgent(harness, "a2", 2, host="h", pid=2)
    listed = "Connected are: h:1 (1 workers), h:2 (2 workers)"
    assert refusal(harness, messages.ScaleRequest(-1, {"x": 1})) == f"there is no agent 'x'. {listed}"
    several = refusal(harness, messages.ScaleRequest(-1, {"h": 1}))
    assert several == f"there are several agents on 'h'. {listed}"
    assert "given twice" in refusal(harness, messages.ScaleRequest(-1, {"h:1": 1, "a1": 2}))
    assert "at most" in refusal(harness, messages.ScaleRequest(2001))
    assert "neither" in refusal(harness, messages.ScaleRequest())
    harness.say(ADMIN, messages.StopRequest())
    assert "stopping" in refusal(harness, messages.ScaleRequest(1))


def test_lost_agent_is_not_counted_and_gets_its_order_when_it_is_back() -> None:
    harness = Harness()
    gone, staying = FakeAgent(harness, "a1", 2), FakeAgent(harness, "a2", 2)
    scale(harness, 6)
    harness.feed(events.PeerDisconnected(gone.peer))
    assert [target.agent for target in scale(harness, 6).targets] == ["a2"]
    assert staying.told()[-1].target == 6
    gone.report()
    assert gone.told()[-1].target == 3
    harness.pass_ms(3_000)
    assert harness.core.status()["agents"] == []


def test_new_leader_learns_targets_from_the_agents_and_orders_again() -> None:
    harness = Harness()
    agent = FakeAgent(harness, "a1", 1)
    scale(harness, 4)
    agent.obey()
    harness.lead()
    agent.report()
    assert harness.core.status()["agents"][0]["target"] == 4
    scale(harness, 2)
    agent.obey()
    assert agent.target == 2


def test_agent_learns_the_slots_of_its_own_workers() -> None:
    harness = Harness(workers=1)
    worker = FakeWorker(harness, "w0", slot=3)
    worker.hello()
    agent = FakeAgent(harness, "a1", 1)
    agent.report(slots_wanted=True, running=[1, 2])
    assert agent.told()[-1].slots == {1: 3}
    assert harness.core.status()["workers"][0]["agent"] == "a1"
    stranger = FakeAgent(harness, "a2", 1, host="host-2")
    stranger.report(slots_wanted=True, running=[1])
    assert stranger.told()[-1].slots == {}


def test_agent_of_another_job_is_refused() -> None:
    harness = Harness()
    agent = FakeAgent(harness, "a1", 1)
    agent.report(job="another")
    (refused,) = harness.messages_to(agent.peer, messages.Refused)
    assert refused.reason == "this is the coordinator of job 'job', not of 'another'"


def test_agents_are_told_of_the_end() -> None:
    harness = Harness(workers=1)
    worker, agent = FakeWorker(harness, "w0"), FakeAgent(harness, "a1", 1)
    worker.hello()
    harness.say(ADMIN, messages.StopRequest())
    worker.drained()
    (shutdown,) = harness.messages_to(agent.peer, messages.Shutdown)
    assert (shutdown.session, shutdown.failure) == (0, None)


def test_number_of_agents_is_bounded() -> None:
    agents = Agents(term=1, patience_ms=3_000)
    for number in range(AGENTS_MAX):
        report = messages.AgentReport(f"a{number}", "job", "h", number, 1, [], 0, 0)
        assert agents.heard(report.agent.encode(), report, now_ms=0)
    report = messages.AgentReport("more", "job", "h", 1, 1, [], 0, 0)
    assert agents.heard(b"more", report, now_ms=0) is None
    assert agents.heard(b"more", report, now_ms=3_000)  # the others have become silent


@pytest.mark.parametrize(
    ("orders", "taken"),
    [
        ([(1, 1, 5), (1, 1, 5)], [5, None]),
        ([(1, 2, 5), (1, 1, 4)], [5, None]),
        ([(1, 9, 5), (2, 1, 4)], [5, 4]),
        ([(2, 1, 5), (1, 9, 4)], [5, None]),
        ([(2, 0, 5), (1, 9, 4)], [None, None]),
    ],
)
def test_order_is_carried_out_once_and_never_from_an_older_term(
    orders: list[tuple[int, int, int]], taken: list[int | None]
) -> None:
    agent = Orders()
    assert [agent.take(messages.AgentOrder(*order)) for order in orders] == taken
