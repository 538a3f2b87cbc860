"""How the worker exits: because the job drains, or because this worker is asked to leave.

Responsible for: continuing to process until the shards have moved, then the last commit and the last message.
Invariants:

- A worker that is leaving keeps leaving, whatever happens to its session, its connection or its coordinator,
  and exits within bounded time.
- `Drained` is sent when nothing is left to commit.

Pure.
"""

from __future__ import annotations

from fcluster.wire import messages
from fcluster.worker.core import events
from fcluster.worker.core.model import Phase
from fcluster.worker.core.state import CoreState

LEAVING_REPEATED_MS = 1_000


class Departure:
    """Drains, and leaves."""

    def __init__(self, state: CoreState) -> None:
        self._now = state
        self._leave_by_ms = 0
        self._leaving_since_ms = 0
        self._leaving_said_ms = 0

    # --- the whole job drains -------------------------------------------------------------------------

    def drain(self) -> None:
        """Stop processing, and commit what there is."""
        if self._now.works():
            self._now.phase = Phase.DRAINING
            self._now.add(events.StopReading(tuple(self._now.shards)))
        self.finish_drain()

    def finish_drain(self) -> None:
        """Send `Drained` if everything is committed."""
        if self._now.phase is Phase.DRAINING and not self._now.open.dirty and self._now.in_flight is None:
            self._now.phase = Phase.DRAINED
        if self._now.phase is Phase.DRAINED:
            self._now.send(messages.Drained(self._now.session))
            if self._now.leaving:
                self._leave()

    # --- this worker leaves ---------------------------------------------------------------------------

    def termination_requested(self) -> None:
        """The process was asked to exit, perhaps again."""
        draining = self._now.phase in (Phase.DRAINING, Phase.DRAINED)
        if self._now.session == 0 or (self._now.leaving and draining):
            # Another worker will process the uncommitted records again.
            self._now.stop_as_asked()
        elif self._now.leaving:
            self.leave_at_once()
        else:
            self.begin()

    def begin(self) -> None:
        """Keep processing until the shards have moved away."""
        if not self._now.leaving:
            self._now.leaving, self._leaving_since_ms = True, self._now.now_ms
            self._leave_by_ms = self._now.now_ms + self._now.bounds.leave_timeout_ms
            self._now.log("info", f"leaving: {len(self._now.shards)} shards have to move away first")
        if self._now.works():
            self._say_leaving()
            self.leave_if_empty()
        else:
            self.finish_drain()  # the whole job drains

    def _say_leaving(self) -> None:
        self._leaving_said_ms = self._now.now_ms
        self._now.send(messages.Leaving(self._now.session))

    def leave_if_empty(self) -> None:
        """Exit if the worker is leaving and has no shards left."""
        empty = not self._now.shards and self._now.in_flight is None
        if self._now.leaving and self._now.works() and empty:
            self._leave()

    def leave_at_once(self) -> None:
        """Commit what was processed, then exit: no worker can take the shards, or there is no time to
        wait.
        """
        if not self._now.leaving:
            self._now.leaving, self._leaving_since_ms = True, self._now.now_ms
        self._leave_by_ms = self._now.now_ms + self._now.bounds.last_commit_timeout_ms
        self.drain()

    def follow(self) -> None:
        """Time has passed. Check deadlines."""
        overdue = self._now.now_ms >= self._leave_by_ms
        silence_ms = self._now.now_ms - max(self._now.heard_ms, self._leaving_since_ms)
        if silence_ms >= self._now.bounds.leader_patience_ms:
            self._now.log("warning", "leaving without a last commit: there is no coordinator")
            self._now.stop_as_asked()
        elif not self._now.works():
            if overdue:
                self._now.log("warning", "leaving without a last commit: its epoch wasn't complete in time")
                self._now.stop_as_asked()
        elif overdue:
            self._now.log("warning", f"{len(self._now.shards)} shards did not move away in time; leaving now")
            self.leave_at_once()
        elif self._now.now_ms - self._leaving_said_ms >= LEAVING_REPEATED_MS:
            self._say_leaving()

    def _leave(self) -> None:
        self._now.send(messages.Goodbye(self._now.session))
        self._now.stop_as_asked()
