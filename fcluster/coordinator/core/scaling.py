"""Agents and their targets: the answers to agents, and to clients that scale the job.

Responsible for: these answers. `agents` counts the workers and spreads them. Must not: start or stop
anything. Pure.
"""

from __future__ import annotations

import msgspec

from fcluster.coordinator.core.agents import Agents
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.model import Phase
from fcluster.coordinator.core.outbox import Outbox
from fcluster.wire import messages


class Scaling:
    """Answers agents, and clients that scale the job."""

    def __init__(self, cluster: Cluster, outbox: Outbox, agents: Agents) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._agents = agents

    def agent_report(self, peer: bytes, report: messages.AgentReport) -> None:
        """An agent reports its workers. The answer says how many it should run."""
        term = self._cluster.term
        if report.job != self._cluster.terms.topology.job:
            reason = (
                f"this is the coordinator of job {self._cluster.terms.topology.job!r}, not of {report.job!r}"
            )
            self._outbox.send(peer, messages.Refused(term, reason, retry=False))
            return
        order = self._agents.heard(peer, report, self._cluster.now_ms)
        if self._cluster.phase is Phase.STOPPING:
            self._outbox.send(peer, self._cluster.shutdown())
        elif order is None:
            self._outbox.send(peer, messages.Refused(term, "there are too many agents", retry=True))
        elif report.slots_wanted:
            own = set(report.running)
            slots = {
                session.pid: session.slot
                for session in self._cluster.sessions.values()
                if session.host == report.host and session.pid in own
            }
            self._outbox.send(peer, msgspec.structs.replace(order, slots=slots))
        else:
            self._outbox.send(peer, order)

    def scale(self, request: messages.ScaleRequest) -> messages.ScaleReply | messages.Refused:
        """A client asks for another number of workers."""
        if self._cluster.phase is not Phase.RUNNING:
            return self._cluster.refused(f"the job is stopping ({self._cluster.stop_reason})")
        answer = self._agents.scale(request, self._cluster.now_ms)
        if isinstance(answer, str):
            return self._cluster.refused(answer)
        reply, orders = answer
        for peer, order in orders.items():
            self._outbox.send(peer, order)
        told = ", ".join(f"{target.host}:{target.pid} {target.target}" for target in reply.targets)
        self._outbox.log("info", f"workers wanted, by agent: {told}")
        return reply
