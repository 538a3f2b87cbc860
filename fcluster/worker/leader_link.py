"""The worker's link to the leading coordinator.

Responsible for: the connection, which coordinator it leads to, and what is sent over it. It connects to the
given address, or to the leader that the seeker finds in the journal; turns frames into events for the main
thread; and says once why there is no connection. Its callbacks run in the threads of the transport, the
seeker and the reach watch. Any thread may call `send`.

Must not: decide what follows from a message; `core` does. It reads the core's session and term only to find
out which messages concern this worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fcluster.common.errors import FclusterError
from fcluster.common.failures import Ended
from fcluster.common.settings import Settings
from fcluster.wire import messages
from fcluster.wire.addresses import ReachWatch
from fcluster.wire.discovery import Leader
from fcluster.wire.keys import Role
from fcluster.wire.leader_search import LeaderSeeker
from fcluster.wire.messages import MalformedMessageError
from fcluster.wire.security import client_security
from fcluster.wire.transport import DealerTransport
from fcluster.worker import handler_processes
from fcluster.worker.core import events
from fcluster.worker.core.state import CoreState

_log = logging.getLogger("fcluster.worker")

ANNOUNCEMENT_S = 1.0
"""How long an announcement of a record waits for the coordinator's answer."""
SEEKER_CLOSE_S = 5.0


class LeaderLink:
    """See the module's docstring.

    Args:
        settings: the worker's settings.
        job: the job's name.
        fixed_address: ``tcp://host:port``. Empty: read it from the job's journal.
        core_state: the core's state. It is only read.
        post: queues an event for the main thread.
        on_job_over: called once it is known that the job has ended, before the event.
    """

    def __init__(
        self,
        settings: Settings,
        job: str,
        fixed_address: str,
        core_state: CoreState,
        post: Callable[[events.Event], None],
        on_job_over: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._fixed_address = fixed_address
        self._fixed_security = (
            client_security(settings, Role.WORKER, fixed_address) if fixed_address else None
        )
        self._core_state = core_state
        self._post = post
        self._on_job_over = on_job_over
        self._trouble = ""
        self._closing = False
        self._noted = threading.Event()  # the coordinator knows the record that was announced
        self._reach = ReachWatch(self.say_trouble)
        self._transport = DealerTransport(
            core_state.identity.worker.encode(),
            on_frame=self._on_frame,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
            on_refused=lambda reason: self.say_trouble(f"no connection to the coordinator: {reason}"),
        )
        self._seeker = LeaderSeeker(
            settings,
            job,
            fixed=bool(fixed_address),
            connect=self._connect,
            term=lambda: core_state.term,
            say=self.say_trouble,
            on_ended=self._on_job_ended,
            failpoint="worker.seeks-leader",
        )

    def start(self) -> None:
        """Connect to the given address, if there is one, and begin to look for the leader."""
        if self._fixed_address:
            self._reach.expect(self._fixed_address)
            self._transport.connect(self._fixed_address, self._fixed_security)
        self._seeker.start()

    def close(self) -> None:
        """Close the connection. From then on other workers may get the worker's shards."""
        self._closing = True
        self._reach.met()
        self._seeker.close(timeout_s=SEEKER_CLOSE_S)
        self._transport.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection to a coordinator."""
        return self._transport.connected

    def send(self, message: messages.FromWorker) -> None:
        """Send a message. It is lost if there is no connection."""
        self._transport.send(messages.encode(message))

    def announce(self, begun: messages.RecordBegun) -> None:
        """Send it, and wait until the coordinator knows it, for at most `ANNOUNCEMENT_S`."""
        self._noted.clear()
        self.send(begun)
        self._noted.wait(ANNOUNCEMENT_S)

    def say_trouble(self, trouble: str) -> None:
        """Log it once for each kind of problem, because attempts are repeated every second."""
        if trouble != self._trouble:
            _log.warning("%s", trouble)
        self._trouble = trouble

    # --- callbacks, in other threads ----------------------------------------------------------------------

    def _connect(self, leader: Leader | None) -> None:
        """Connect to that leader. None: to the given address."""
        try:
            address = self._fixed_address if leader is None else leader.address
            handler_processes.keep_from_children(addresses=[address])
            self._reach.expect(address)
            if leader is None:
                self._transport.connect(address, self._fixed_security)
                return
            security = client_security(self._settings, Role.WORKER, leader.address, leader.public_key)
            _log.info("the coordinator of term %d is at %s", leader.term, leader.address)
            self._transport.connect(leader.address, security)
        except ValueError as error:
            raise FclusterError(str(error)) from error

    def _on_connected(self) -> None:
        self._reach.met()
        self._trouble = ""
        self._seeker.linked()
        self._post(events.Connected())

    def _on_disconnected(self) -> None:
        _log.warning("lost the connection to the coordinator; looking for it")
        if self._transport.address is not None and not self._closing:
            self._reach.expect(self._transport.address)
        self._seeker.unlinked()

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = messages.decode_from_coordinator(frame)
        except MalformedMessageError as error:
            self._transport.malformed_frames += 1
            count = self._transport.malformed_frames
            if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: a flood must not fill the log
                _log.warning("dropped a malformed frame, %d so far: %s", count, error)
            return
        if self._is_of_older_term(message):
            # It was deposed and doesn't know that. The core refuses all its messages, so leave it.
            self._seeker.misled()
        else:
            self._seeker.heard()
        if isinstance(message, messages.RecordNoted):
            self._noted.set()
        else:
            if isinstance(message, messages.Shutdown) and self._ends_the_job(message):
                self._on_job_over()
            self._post(events.MessageReceived(message))

    def _ends_the_job(self, message: messages.Shutdown) -> bool:
        mine = message.session in (0, self._core_state.session)
        return mine and not self._is_of_older_term(message)

    def _is_of_older_term(self, message: messages.FromCoordinator) -> bool:
        return message.term < self._core_state.term

    def _on_job_ended(self, ended: Ended) -> None:
        """The journal says that the job has ended."""
        self._on_job_over()
        self._post(events.JobEnded(ended.reason, ended.failure))
