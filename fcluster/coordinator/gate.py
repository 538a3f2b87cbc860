"""Decides which incoming frames reach the core.

Responsible for: decoding frames, and checking that the sender's role may send such a message. Rules: no frame
raises; dropped frames are counted; no sender can use another sender's name; one frame leads to at most one
answer. Must not know sockets or the cluster's state.
"""

from __future__ import annotations

import logging
from typing import Final, get_args

from fcluster.wire import messages
from fcluster.wire.keys import Role
from fcluster.wire.messages import MalformedMessageError, Message, Refused, ToCoordinator
from fcluster.wire.transport import FrameReceived

_log = logging.getLogger("fcluster.coordinator")

ADMIN_KINDS: Final[tuple[type[Message], ...]] = get_args(messages.FromAdmin)
WORKER_KINDS: Final[tuple[type[Message], ...]] = (*get_args(messages.FromWorker), messages.FromAgent)
_KINDS_OF: Final[dict[str, tuple[type[Message], ...]]] = {
    Role.WORKER: WORKER_KINDS,
    Role.ADMIN: ADMIN_KINDS,
    Role.COORDINATOR: (messages.LeaderCheck,),  # standby coordinators
}


class Gate:
    """Admits messages or rejects them.

    Args:
        term: the coordinator's term, for its answers.
        secured: whether connections carry the role of their key. Then the role is checked. Otherwise every
            message is allowed.
    """

    def __init__(self, term: int, *, secured: bool) -> None:
        self.malformed_frames = 0
        self.unauthorised_frames = 0
        self._failed_handshakes = 0
        self._term = term
        self._secured = secured

    def admit(self, received: FrameReceived) -> ToCoordinator | Refused | None:
        """The message in a frame. If its sender may not send it: an answer for the sender, or nothing."""
        try:
            message = messages.decode_for_coordinator(received.frame)
        except MalformedMessageError as error:
            self._drop_malformed(str(error))
            return None
        if isinstance(message, messages.Hello | messages.AgentReport):
            name = message.worker if isinstance(message, messages.Hello) else message.agent
            if name.encode() != received.peer:
                kind = type(message).__name__
                self._drop_malformed(f"the connection {received.peer!r} sent {kind} for {name!r}")
                return None
        if not self._secured or isinstance(message, _KINDS_OF.get(received.role, ())):
            return message
        return self._drop_unauthorised(received.role, message)

    def note_handshake(self, reason: str) -> None:
        """A process that tried to connect was rejected."""
        self._failed_handshakes += 1
        if _is_due(self._failed_handshakes):
            _log.warning("refused a connection, %d so far: %s", self._failed_handshakes, reason)

    def _drop_malformed(self, reason: str) -> None:
        self.malformed_frames += 1
        if _is_due(self.malformed_frames):
            _log.warning("dropped a malformed frame, %d so far: %s", self.malformed_frames, reason[:500])

    def _drop_unauthorised(self, role: str, message: Message) -> Refused | None:
        self.unauthorised_frames += 1
        kind = type(message).__name__
        if _is_due(self.unauthorised_frames):
            count = self.unauthorised_frames
            _log.warning("dropped a %s sent with a key of role %r, %d so far", kind, role, count)
        if isinstance(message, messages.Hello):
            reason = (
                f"this is the key of role {role!r}. A worker joins with worker.key in its security.keys.dir."
            )
        elif isinstance(message, ADMIN_KINDS):
            reason = f"this is the key of role {role!r}. {kind} needs admin.key in security.keys.dir."
        else:
            return None
        return Refused(self._term, reason, retry=False)


def _is_due(count: int) -> bool:
    """The 1st, 2nd, 4th, 8th, ... occurrence: a flood must not fill the log."""
    return count & (count - 1) == 0
