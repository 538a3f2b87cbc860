"""The leader's role: standbys that check whether it is alive, handing over, and doubts about its leadership.

Responsible for: answers to standbys, a leader's resignation, and checking the journal for a newer leader.
Rule: only the journal decides who leads. A leader keeps leading until one of its writes is refused. Pure.
"""

from __future__ import annotations

from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.election import STANDBYS_COME_MS, Resignation, Roster
from fcluster.coordinator.core.ending import Ending
from fcluster.coordinator.core.model import Phase
from fcluster.coordinator.core.outbox import CHECK_KEY, Outbox
from fcluster.wire import messages

DOUBT_INTERVAL_MS = 1_000
"""Workers may claim, rightly or not, that there is a newer leader. The journal is checked at most this
often."""


class Leadership:
    """Holds the leadership, and hands it over.

    Attributes:
        resignation: the resignation in progress, if there is one.
        standbys: this leader's standbys.
    """

    def __init__(self, cluster: Cluster, outbox: Outbox, ending: Ending) -> None:
        self.resignation: Resignation | None = None
        self.standbys = Roster(cluster.settings.heartbeat_interval_ms)
        self._cluster = cluster
        self._outbox = outbox
        self._ending = ending
        self._doubted_ms = float("-inf")

    def deadlines_ms(self) -> list[float | None]:
        """When something is due if nothing happens before that."""
        return [] if self.resignation is None else [self.resignation.next_ms()]

    def leader_check(self, peer: bytes, check: messages.LeaderCheck) -> None:
        """A standby asks whether the leader is alive, or announces that it exits."""
        if check.leaves:
            self.standbys.leaves(peer)
            if self.resignation is not None:
                self.resignation.left(peer)
            return
        rank = self.standbys.heard(peer, check.standby, self._cluster.now_ms)
        self._tell_alive(peer, rank)

    def _tell_alive(self, peer: bytes, rank: int) -> None:
        resigns = self.resignation is not None and self.resignation.invited == peer
        self._outbox.send(
            peer,
            messages.LeaderAlive(self._cluster.term, self._cluster.terms.cluster_id, rank, resigns),
        )

    def resign(self) -> None:
        """The process was asked to exit: a standby should take over, if there is one."""
        if self._cluster.phase is Phase.RUNNING and self.resignation is None:
            self._outbox.log("info", "asked to leave: handing over to a standby, if there is one")
            took_over = self._cluster.counters.adoptions or self._cluster.awaits_sessions()
            patient_until_ms = (
                self._cluster.started_ms + STANDBYS_COME_MS if took_over else self._cluster.now_ms
            )
            self.resignation = Resignation(self.standbys, patient_until_ms, self._cluster.now_ms)

    def follow_resignation(self) -> None:
        """Keep leading until a standby has fenced us, which our next write to the journal shows."""
        if self.resignation is None:
            return
        if self._cluster.phase is not Phase.RUNNING:
            self.resignation = None
            return
        step = self.resignation.advance(self._cluster.now_ms)
        if step.invite is not None:
            self._tell_alive(step.invite, 0)
        if step.check:
            self._check_office()
        if step.give_up:
            self.resignation = None
            self._ending.begin_drain("asked to leave, and no standby took over")

    def _check_office(self) -> None:
        """Write to the journal, which refuses if another coordinator leads. There is only one such write at a
        time.
        """
        if self._outbox.owes_nothing:
            self._outbox.journal(CHECK_KEY, {"term": self._cluster.term})

    def doubt(self, peer: bytes, hello: messages.Hello) -> None:
        """A worker knows of a newer leader, and wouldn't obey us. The journal shows whether it is right."""
        if self._cluster.now_ms - self._doubted_ms >= DOUBT_INTERVAL_MS:
            self._doubted_ms = self._cluster.now_ms
            self._outbox.log(
                "warning",
                f"worker {hello.worker} on {hello.host} knows of term {hello.term}, but this one is "
                f"{self._cluster.term}: checking the journal",
            )
            self._check_office()
        reason = f"this coordinator has term {self._cluster.term}, but you know of term {hello.term}"
        self._outbox.send(peer, messages.Refused(self._cluster.term, reason, retry=True))
