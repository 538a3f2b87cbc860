"""What a coordinator reports about itself over HTTP.

Responsible for: reporting whether its loops run, what it does (start, stand by, take over, lead), and its
status. The coordinator's main thread sets it, and the threads of the HTTP port read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fcluster.wire.discovery import Leader
from fcluster.wire.http_port import Pulse, Verdict

LOOP_BOUND_S = 10.0
"""A loop that should run several times a second counts as stuck if it hasn't run for this long."""
STANDING_BY_BOUND_S = 30.0
"""The same for a standby, which reads the journal from time to time, and waits for brokers that are down."""
STARTING_BOUND_S = 180.0
"""Connecting, creating topics and taking over the journal have their own limits, whose sum is less than
this."""


@dataclass(frozen=True, slots=True)
class _Doing:
    role: str
    ready: bool
    text: str
    leader: Leader | None = None
    document: Callable[[], Mapping[str, Any] | None] | None = None


class CoordinatorHealth:
    """See the module's docstring.

    Args:
        job: the name of the job that it coordinates.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._pulse = Pulse("the main loop", STARTING_BOUND_S)
        self._doing = _Doing("starting", False, "starts")

    # --- said by the main thread ------------------------------------------------------------------------

    def takes_over(self) -> None:
        """It is becoming the leader."""
        self._pulse.beat(STARTING_BOUND_S)
        self._doing = _Doing("taking-over", False, f"becoming the leader of job {self._job}")

    def leads(self, leader: Leader, document: Callable[[], Mapping[str, Any] | None]) -> None:
        """It leads.

        Args:
            leader: its leader record.
            document: returns the status document to any thread, within a few seconds.
        """
        self._pulse.beat(LOOP_BOUND_S)
        text = f"leads job {self._job} in term {leader.term}"
        self._doing = _Doing("leader", True, text, leader, document)

    def looks_for_leader(self) -> None:
        """It doesn't lead. It doesn't know which coordinator does, or the leader that it watches doesn't
        answer.
        """
        self._pulse.beat(STANDING_BY_BOUND_S)
        if self._doing.role != "starting":
            self._doing = _Doing("standby", False, f"looking for the leader of job {self._job}")

    def stands_by(self, leader: Leader) -> None:
        """It watches a leader that is alive."""
        self._pulse.beat(STANDING_BY_BOUND_S)
        if self._doing.leader != leader or self._doing.role != "standby":
            leads = f"process {leader.pid} on {leader.host} leads job {self._job} in term {leader.term}"
            self._doing = _Doing("standby", True, f"standing by: {leads}", leader)

    def turned(self) -> None:
        """The leader's loop has run once."""
        self._pulse.beat(LOOP_BOUND_S)

    # --- asked by the port ------------------------------------------------------------------------------

    def live(self) -> Verdict:
        trouble = self._pulse.trouble()
        return Verdict(not trouble, trouble or f"lives: {self._doing.text}")

    def ready(self) -> Verdict:
        trouble = self._pulse.trouble()
        return Verdict(self._doing.ready and not trouble, trouble or self._doing.text)

    def status(self) -> Mapping[str, Any] | None:
        doing = self._doing
        if doing.document is not None:
            document = doing.document()
            return None if document is None else {"role": doing.role, **document}
        leader = doing.leader
        return {
            "role": doing.role,
            "job": self._job,
            "leader": None
            if leader is None
            else {"address": leader.address, "term": leader.term, "host": leader.host, "pid": leader.pid},
        }
