"""An agent's connection to the coordinator: it reports how many workers run here, and receives the target
number.

Responsible for: the connection to the leader, reports over it, and which orders are carried out (`Orders`).
Rules: an order is carried out once, and never if it comes from an older term; an agent that finds no
coordinator changes nothing. Must not start or stop processes; `supervisor` does.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Ended
from fcluster.common.settings import Settings
from fcluster.wire import messages
from fcluster.wire.discovery import Leader
from fcluster.wire.keys import Role
from fcluster.wire.leader_search import LeaderSeeker
from fcluster.wire.messages import MalformedMessageError
from fcluster.wire.security import client_security
from fcluster.wire.transport import DealerTransport

_log = logging.getLogger("fcluster.agent")

CLOSE_TIMEOUT_S = 5.0


class Orders:
    """Which orders an agent carries out; without any I/O."""

    def __init__(self) -> None:
        self.term = 0
        """The newest known term."""
        self.taken_term = 0
        self.taken_order = 0

    def is_stale(self, term: int) -> bool:
        """Whether this comes from a leader whose successor is already known."""
        if term < self.term:
            return True
        self.term = term
        return False

    def take(self, order: messages.AgentOrder) -> int | None:
        """How many workers to run from now on. None: nothing changes."""
        if self.is_stale(order.term) or order.order == 0:
            return None
        if (order.term, order.order) <= (self.taken_term, self.taken_order):
            return None
        self.taken_term, self.taken_order = order.term, order.order
        return order.target


@dataclass(frozen=True)
class Staff:
    """The workers of an agent: their target number, and the process ids of those that run."""

    target: int
    running: Sequence[int]


class AgentLink:
    """The connection of an agent, served by its own threads.

    Args:
        settings: the cluster's settings.
        job: the job's name.
        address: the coordinator's address. Empty: read it from the job's journal.
        staff: returns the present workers. Called from any thread.
        resize: called with the wanted number of workers.
        learn_slots: called with the slots of workers, by process id.
        on_end: called when the job has ended, according to the coordinator or the journal, with how it ended.
            May be called from any thread, and more than once.
        say: called with problems and news, as texts.
    """

    def __init__(
        self,
        settings: Settings,
        job: str,
        *,
        address: str,
        staff: Callable[[], Staff],
        resize: Callable[[int], None],
        learn_slots: Callable[[Mapping[int, int]], None],
        on_end: Callable[[Ended], None],
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._job = job
        self._address = address
        self._staff = staff
        self._resize = resize
        self._learn_slots = learn_slots
        self._on_end = on_end
        self._say = say
        self._said = ""
        self._orders = Orders()
        self._known_slots: Mapping[int, int] = {}
        self._host = socket.gethostname()
        self._name = f"agent-{self._host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._news = threading.Event()
        self._closing = False
        self._security = client_security(settings, Role.WORKER, address) if address else None
        self._transport = DealerTransport(
            self._name.encode(),
            on_frame=self._on_frame,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
            on_refused=lambda reason: self._trouble(f"no connection to the coordinator: {reason}"),
        )
        self._seeker = LeaderSeeker(
            settings,
            job,
            fixed=bool(address),
            connect=self._connect,
            term=lambda: self._orders.term,
            say=self._trouble,
            on_ended=on_end,
            failpoint="agent.seeks-leader",
        )
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)

    def start(self) -> None:
        """Start to look for the coordinator."""
        if self._address:
            self._transport.connect(self._address, self._security)
        self._seeker.start()
        self._thread.start()

    def tell(self) -> None:
        """Something has changed: report it to the coordinator at once. May be called from any thread."""
        self._news.set()

    def close(self) -> None:
        """Stop, and wait for the threads."""
        self._closing = True
        self._news.set()
        self._seeker.close(CLOSE_TIMEOUT_S)
        self._transport.close()
        self._thread.join(CLOSE_TIMEOUT_S)

    # --- reports -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            if self._transport.connected:
                self._transport.send(messages.encode(self._report()))
            self._news.wait(self._settings.heartbeat_interval_ms / 1000)
            self._news.clear()

    def _report(self) -> messages.AgentReport:
        staff = self._staff()
        running = list(staff.running)
        return messages.AgentReport(
            agent=self._name,
            job=self._job,
            host=self._host,
            pid=os.getpid(),
            target=staff.target,
            running=running,
            taken_term=self._orders.taken_term,
            taken_order=self._orders.taken_order,
            slots_wanted=any(pid not in self._known_slots for pid in running),
        )

    # --- what comes --------------------------------------------------------------------------------

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = messages.decode_from_coordinator(frame)
        except MalformedMessageError as error:
            self._trouble(f"dropped a malformed frame: {error}")
            return
        if self._orders.is_stale(message.term):
            self._seeker.misled()
            return
        self._seeker.heard()
        match message:
            case messages.AgentOrder():
                self._on_order(message)
            case messages.Shutdown():
                self._on_end(_ended_by(message))
            case messages.Refused():
                self._trouble(f"refused by the coordinator: {message.reason}")
            case _:
                pass

    def _on_order(self, order: messages.AgentOrder) -> None:
        target = self._orders.take(order)
        if target is not None:
            self._resize(target)
        if order.slots:
            self._known_slots = order.slots
            self._learn_slots(order.slots)

    # --- the connection ----------------------------------------------------------------------------

    def _connect(self, leader: Leader | None) -> None:
        """Connect to that leader. None: to the given address. Called in the seeker's thread."""
        try:
            if leader is None:
                self._transport.connect(self._address, self._security)
                return
            security = client_security(self._settings, Role.WORKER, leader.address, leader.public_key)
            self._transport.connect(leader.address, security)
        except ValueError as error:
            raise FclusterError(str(error)) from error

    def _on_connected(self) -> None:
        self._said = ""
        self._seeker.linked()
        self._news.set()

    def _on_disconnected(self) -> None:
        self._seeker.unlinked()

    def _trouble(self, trouble: str) -> None:
        """Log it once for each kind of problem, because attempts are repeated every second."""
        if trouble != self._said:
            self._say(trouble)
        self._said = trouble


def _ended_by(message: messages.Shutdown) -> Ended:
    code = ExitCode.DONE if message.failure is None else ExitCode.JOB_FAILED
    return Ended(code, message.reason, message.failure)
