"""Agents: processes that run a target number of workers on a host.

Responsible for: the list of agents, spreading a wanted number of workers over them, and repeating each order
until the agent confirms it. Rules: an agent is the source of truth about its own target (this module only has
the last report, and a new leader learns the target from the agent); each order is carried out once;
everything is bounded. Must not know shards or sessions. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fcluster.wire import messages
from fcluster.wire.messages import AGENT_WORKERS_MAX, AgentOrder, AgentReport, AgentTarget

AGENTS_MAX = 1_000
NAMED_MAX = 20


@dataclass(slots=True)
class Agent:
    """What is known about one agent.

    Attributes:
        report: its last report.
        heard_ms: when that report came.
        linked: whether its connection is open.
        wanted: the target that it was ordered to have, but hasn't confirmed yet. None: no order is pending.
        order: the number of the last order.
    """

    report: AgentReport
    heard_ms: float
    linked: bool = True
    wanted: int | None = None
    order: int = 0

    @property
    def target(self) -> int:
        """How many workers it runs, or is about to run."""
        return self.report.target if self.wanted is None else self.wanted

    @property
    def place(self) -> str:
        """How operators name it."""
        return f"{self.report.host}:{self.report.pid}"


class Agents:
    """The connected agents.

    Args:
        term: the term of this leadership.
        patience_ms: an agent that is silent for this long is forgotten.
    """

    def __init__(self, term: int, patience_ms: float) -> None:
        self._term = term
        self._patience_ms = patience_ms
        self._by_peer: dict[bytes, Agent] = {}
        self._orders = 0

    def heard(self, peer: bytes, report: AgentReport, now_ms: float) -> AgentOrder | None:
        """Take an agent's report. Returns the answer, which carries the agent's pending order, if there is
        one. None: there are too many agents.
        """
        agent = self._by_peer.get(peer)
        if agent is None:
            self._forget_silent(now_ms)
            if len(self._by_peer) >= AGENTS_MAX:
                return None
            agent = self._by_peer[peer] = Agent(report, now_ms)
        agent.report, agent.heard_ms, agent.linked = report, now_ms, True
        if report.taken_term == self._term and report.taken_order >= agent.order:
            agent.wanted = None
        return self.order_for(agent)

    def order_for(self, agent: Agent) -> AgentOrder:
        """The agent's pending order. Order 0 means none."""
        if agent.wanted is None:
            return AgentOrder(self._term, 0, agent.report.target)
        return AgentOrder(self._term, agent.order, agent.wanted)

    def unlinked(self, peer: bytes) -> None:
        """Its connection closed. It reconnects, or it is dead."""
        agent = self._by_peer.get(peer)
        if agent is not None:
            agent.linked = False

    def peers(self) -> list[bytes]:
        """The connections of all agents."""
        return [peer for peer, agent in self._by_peer.items() if agent.linked]

    def _forget_silent(self, now_ms: float) -> None:
        for peer, agent in list(self._by_peer.items()):
            if now_ms - agent.heard_ms >= self._patience_ms:
                del self._by_peer[peer]

    def connected(self, now_ms: float) -> dict[bytes, Agent]:
        """The agents that can be given orders, by peer, sorted by name."""
        self._forget_silent(now_ms)
        found = {peer: agent for peer, agent in self._by_peer.items() if agent.linked}
        return dict(sorted(found.items(), key=lambda item: item[1].report.agent))

    # --- scaling ----------------------------------------------------------------------------------

    def scale(
        self, request: messages.ScaleRequest, now_ms: float
    ) -> tuple[messages.ScaleReply, dict[bytes, AgentOrder]] | str:
        """Order the wanted numbers of workers.

        Returns:
            The reply and the new orders by peer, or a sentence that says why it isn't possible.
        """
        agents = self.connected(now_ms)
        if not agents:
            return (
                "there is no agent that could start or stop workers. `fcluster up` is an agent, and so is "
                "`fcluster worker JOB --workers N` on any host."
            )
        wanted = self._wanted(request, agents)
        if isinstance(wanted, str):
            return wanted
        orders: dict[bytes, AgentOrder] = {}
        for peer, target in wanted.items():
            agent = agents[peer]
            if target != agent.target:
                self._orders += 1
                agent.wanted, agent.order = target, self._orders
                orders[peer] = self.order_for(agent)
        targets = [
            AgentTarget(agents[peer].report.agent, agents[peer].report.host, agents[peer].report.pid, target)
            for peer, target in wanted.items()
        ]
        return messages.ScaleReply(self._term, targets), orders

    def _wanted(
        self, request: messages.ScaleRequest, agents: Mapping[bytes, Agent]
    ) -> dict[bytes, int] | str:
        if request.total < 0 and not request.places:
            return "neither a number of workers nor hosts are given"
        if request.total >= 0:
            if request.total > AGENT_WORKERS_MAX * len(agents):
                return (
                    f"{request.total} workers are too many for {len(agents)} agents: "
                    f"each runs at most {AGENT_WORKERS_MAX}"
                )
            return spread(request.total, {peer: agent.target for peer, agent in agents.items()})
        wanted: dict[bytes, int] = {}
        for place, target in request.places.items():
            peer = _find(place, agents)
            if isinstance(peer, str):
                return peer
            if peer in wanted:
                return f"the agent {agents[peer].place} is given twice"
            wanted[peer] = target
        return wanted

    # --- looking at it ----------------------------------------------------------------------------

    def describe(self, now_ms: float) -> list[dict[str, Any]]:
        """The agents, for the status document."""
        return [
            {
                "agent": agent.report.agent,
                "host": agent.report.host,
                "pid": agent.report.pid,
                "target": agent.report.target,
                "wanted": -1 if agent.wanted is None else agent.wanted,
                "running": len(agent.report.running),
                "last_heard_ms": round(now_ms - agent.heard_ms),
            }
            for agent in self.connected(now_ms).values()
        ]

    def keeper_of(self, now_ms: float) -> dict[tuple[str, int], str]:
        """The agent that runs a worker, by the worker's host and process id."""
        return {
            (agent.report.host, pid): agent.report.agent
            for agent in self.connected(now_ms).values()
            for pid in agent.report.running
        }


def spread(total: int, targets: Mapping[bytes, int]) -> dict[bytes, int]:
    """Spread `total` workers evenly over agents, with as few starts and stops as possible.

    Args:
        total: number of workers.
        targets: the present target of each agent, at least one agent. Their order breaks ties.
    """
    share, extra = divmod(total, len(targets))
    # The agents with most workers get one more: otherwise they would have to stop one.
    fortunate = sorted(targets, key=lambda peer: -targets[peer])[:extra]
    return {peer: share + (peer in fortunate) for peer in targets}


def _find(place: str, agents: Mapping[bytes, Agent]) -> bytes | str:
    """The agent with this name: its host (if that has no other agent), HOST:PID, or its id."""
    found = [peer for peer, agent in agents.items() if place in (agent.report.agent, agent.place)] or [
        peer for peer, agent in agents.items() if place == agent.report.host
    ]
    if len(found) == 1:
        return found[0]
    what = "there are several agents on" if found else "there is no agent"
    return f"{what} {place!r}. Connected are: {_listed(list(agents.values()))}"


def _listed(agents: Sequence[Agent]) -> str:
    named = ", ".join(f"{agent.place} ({agent.target} workers)" for agent in agents[:NAMED_MAX])
    more = f" and {len(agents) - NAMED_MAX} more" if len(agents) > NAMED_MAX else ""
    return named + more
