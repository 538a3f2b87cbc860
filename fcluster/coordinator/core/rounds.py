"""Epochs: their numbers, their intervals, and their path from barrier to commit.

Responsible for: the numbers of epochs (`EpochNumbers`), how long a worker waits between two of its epochs
(`next_interval_ms`), and the collection of an epoch (`Rounds`). Invariants:

- Epoch numbers strictly increase, across all terms: a number is used only below a reservation in the journal,
  and a new leader begins at the end of the reservation (invariant 16).
- Epochs don't wait for the journal while reserved numbers last. More are reserved long before they run out.
- One epoch is collected at a time. It is declared complete when all participants have prepared, or after
  `checkpoint.straggler.ms`. A session that prepares later is told at once that the epoch is complete.
- A session takes part in one epoch at a time. It gets `Complete(e)` only after its `Prepared(e)`, and its
  next barrier only after its `Committed(e)`.
- Each session has its own interval, so that one worker's backlog doesn't cost the others their latency.

Must not: know shards, slots or the journal. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fcluster.common.settings import Settings
from fcluster.coordinator.core.model import LONG_AGO_MS, EpochPhase, Session, SessionPhase
from fcluster.wire import messages

RESERVED_EPOCHS = 10_000
"""How many numbers are reserved at a time. At the fastest sensible rate (an epoch every few ms), this is one
journal write a minute.
"""

_EARLY_SHARE = 8
"""A session takes part together with those that are due if only this fraction of its interval is left."""

# Looking up a member of an enum takes eight times as long as a global (Python 3.11), and these are looked up
# for each session in each epoch.
_NONE, _PREPARING, _PREPARED, _COMMITTING = EpochPhase
_LIVE = SessionPhase.LIVE


class EpochNumbers:
    """Hands out epoch numbers below the journalled reservation.

    Args:
        highest_known: the highest number known from the journal and the committed offsets. Only higher ones
            are handed out.
    """

    def __init__(self, highest_known: int) -> None:
        self.highest = highest_known
        """The highest number that was handed out or observed."""
        self.reserved_until = 0
        """Exclusive: all numbers below it are reserved in the journal."""
        self._requested_until = 0

    @property
    def available(self) -> bool:
        """Whether `take` would return a number."""
        return self.highest + 1 < self.reserved_until

    def observe(self, epoch: int) -> None:
        """Epoch `epoch` exists: no number up to it is handed out from now on."""
        self.highest = max(self.highest, epoch)

    def wanted_reservation(self) -> int | None:
        """The new end of the reservation, to be written to the journal. None while the present one, or one
        being written, is enough.
        """
        if self._requested_until - self.highest > RESERVED_EPOCHS // 2:
            return None
        self._requested_until = self.highest + 1 + RESERVED_EPOCHS
        return self._requested_until

    def reserved(self, until: int) -> None:
        """The journal holds the reservation up to `until`, exclusive."""
        self.reserved_until = max(self.reserved_until, until)

    def take(self) -> int | None:
        """The next number. None if the journal must hold a new reservation first."""
        if not self.available:
            return None
        self.highest += 1
        return self.highest


def next_interval_ms(
    interval_ms: float, backlog: bool, epoch_ms: float, interval_ms_min: float, interval_ms_max: float
) -> float:
    """How long after a worker's last barrier its next one may follow.

    The interval is short when the worker has caught up (for latency). With a backlog it doubles (for
    throughput), and is at least as long as the last epoch took from barrier to commit, so that the worker
    doesn't spend all its time on committing. One caught-up epoch is enough to return to the shortest
    interval.
    """
    if not backlog:
        return interval_ms_min
    return max(interval_ms_min, min(interval_ms_max, max(2 * interval_ms, epoch_ms, 1.0)))


@dataclass(slots=True)
class Round:
    """The epoch that is being collected: which sessions haven't prepared yet, and which have and wait for the
    others.
    """

    epoch: int
    barrier_ms: float
    waiting: dict[int, Session]
    prepared: dict[int, Session] = field(default_factory=lambda: dict[int, Session]())


class Rounds:
    """Collects epochs from the sessions that have something to commit.

    Args:
        numbers: the numbers of epochs.
        settings: the cluster's settings.
        term: this leadership's term.
        send: sends a message to a session's peer.
    """

    def __init__(
        self,
        numbers: EpochNumbers,
        settings: Settings,
        term: int,
        send: Callable[[bytes, messages.FromCoordinator], None],
    ) -> None:
        self.numbers = numbers
        self.current: Round | None = None
        self.completed_epoch = 0
        self.begun = 0
        self.stragglers = 0
        self.wanting: dict[int, Session] = {}
        """Sessions that have something to commit beyond their epoch in flight."""
        self._settings = settings
        self._term = term
        self._send = send
        self._last_barrier_ms = LONG_AGO_MS
        self._hurried = False

    # --- what happened --------------------------------------------------------------------------------

    def want(self, session: Session) -> None:
        """The session has processed records that no barrier covers."""
        self.wanting[session.number] = session

    def hurry(self) -> None:
        """Ignore intervals from now on, because the job is draining."""
        self._hurried = True

    def prepared(self, session: Session, epoch: int, now_ms: float) -> None:
        """The session's epoch is flushed. It waits for the others, unless the epoch was already declared
        complete.
        """
        if session.epoch_phase is not _PREPARING:
            return
        if not session.committed_epoch < epoch <= session.epoch:
            return
        if epoch < session.epoch:
            # The worker's report that it got no barrier crossed a barrier. So it got another one, which it
            # ignores.
            self._drop_out(session, now_ms)
            session.epoch = epoch
        current = self.current
        if current is None or session.number not in current.waiting:
            self._complete(session, now_ms)
            return
        del current.waiting[session.number]
        current.prepared[session.number] = session
        session.epoch_phase = _PREPARED
        if not current.waiting:
            self._declare_complete(current, now_ms)

    def committed(self, session: Session, message: messages.Committed, now_ms: float) -> None:
        """The session's epoch is committed. Its next interval depends on how that went."""
        if session.epoch_phase is not _NONE and session.epoch == message.epoch:
            self._drop_out(session, now_ms)
            session.epoch_phase = _NONE
            session.committed_epoch = message.epoch
            session.epochs_committed += 1
            session.commit_ms = message.commit_ms
            session.interval_ms = next_interval_ms(
                session.interval_ms,
                session.backlog,
                now_ms - session.barrier_ms,
                self._settings.commit_interval_min_ms,
                self._settings.commit_interval_max_ms,
            )
            session.due_ms = session.barrier_ms + session.interval_ms
        if message.dirty:
            self.want(session)

    def returned(self, session: Session, hello: messages.Hello, now_ms: float) -> None:
        """The session is back after messages may have been lost. Its own report about its epoch is
        authoritative.
        """
        in_flight = hello.prepared_epoch or hello.in_flight_epoch
        if session.epoch_phase is not _NONE and session.epoch != in_flight:
            # The barrier never arrived. Or the epoch is committed, and only that message was lost.
            self._drop_out(session, now_ms)
            session.epoch_phase = _NONE
        if in_flight and session.epoch_phase is _NONE:
            session.epoch, session.epoch_phase = in_flight, _PREPARING
            session.barrier_ms = session.epoch_phase_ms = now_ms
        if hello.prepared_epoch and session.epoch_phase is _PREPARING:
            self.prepared(session, in_flight, now_ms)
        elif hello.prepared_epoch and session.epoch_phase is _COMMITTING:
            self._complete(session, now_ms)  # the first one was lost
        if hello.dirty:
            self.want(session)

    def unlinked(self, session: Session, now_ms: float) -> None:
        """Its connection closed, so the others don't wait for it. If it is alive, it continues as a
        straggler.
        """
        current = self.current
        if current is not None and current.waiting.pop(session.number, None) is not None:
            self.stragglers += 1
            if not current.waiting:
                self._declare_complete(current, now_ms)

    def ended(self, session: Session, now_ms: float) -> None:
        """The session is over: it gets no more messages of this epoch, and no session waits for it."""
        self.wanting.pop(session.number, None)
        self._drop_out(session, now_ms)
        session.epoch_phase = _NONE

    # --- time -----------------------------------------------------------------------------------------

    def advance(self, now_ms: float) -> None:
        """If it is time, declare the epoch complete without its stragglers, and begin the next one."""
        current = self.current
        if current is not None and now_ms >= current.barrier_ms + self._settings.checkpoint_straggler_ms:
            self.stragglers += len(current.waiting)
            self._declare_complete(current, now_ms)
        if self.current is None and self.wanting and now_ms >= self._next_barrier_ms:
            self._begin(now_ms)

    def deadline_ms(self) -> float | None:
        """When `advance` has something to do if nothing happens before that. None: never."""
        if self.current is not None:
            return self.current.barrier_ms + self._settings.checkpoint_straggler_ms
        if not self.wanting or not self.numbers.available:
            return None
        next_barrier_ms = self._next_barrier_ms
        first_ms: float | None = None
        for session in self.wanting.values():
            if not _can_prepare(session):
                continue
            due_ms = self._due_ms(session)
            if due_ms <= next_barrier_ms:
                return next_barrier_ms  # the usual case; the others make no difference
            first_ms = due_ms if first_ms is None else min(first_ms, due_ms)
        return first_ms

    @property
    def _next_barrier_ms(self) -> float:
        if self._hurried:
            return LONG_AGO_MS
        return self._last_barrier_ms + self._settings.commit_interval_min_ms

    def _due_ms(self, session: Session) -> float:
        return LONG_AGO_MS if self._hurried else session.due_ms - session.interval_ms / _EARLY_SHARE

    def _begin(self, now_ms: float) -> None:
        participants = {
            number: session
            for number, session in self.wanting.items()
            if _can_prepare(session) and self._due_ms(session) <= now_ms
        }
        epoch = self.numbers.take() if participants else None
        if epoch is None:
            return
        self.begun += 1
        self._last_barrier_ms = now_ms
        self.current = Round(epoch, now_ms, participants)
        for session in participants.values():
            del self.wanting[session.number]
            session.epoch, session.epoch_phase = epoch, _PREPARING
            session.barrier_ms = session.epoch_phase_ms = now_ms
            session.due_ms = now_ms + session.interval_ms
            self._send(session.peer, messages.Barrier(self._term, session.number, epoch))

    # --- the end of an epoch --------------------------------------------------------------------------

    def _drop_out(self, session: Session, now_ms: float) -> None:
        current = self.current
        if current is None:
            return
        taking_part = session.number in current.waiting or session.number in current.prepared
        current.waiting.pop(session.number, None)
        current.prepared.pop(session.number, None)
        if taking_part and not current.waiting:
            self._declare_complete(current, now_ms)

    def _declare_complete(self, current: Round, now_ms: float) -> None:
        self.current = None
        self.completed_epoch = current.epoch
        for session in current.prepared.values():
            self._complete(session, now_ms)

    def _complete(self, session: Session, now_ms: float) -> None:
        session.epoch_phase, session.epoch_phase_ms = _COMMITTING, now_ms
        self._send(session.peer, messages.Complete(self._term, session.number, session.epoch))


def _can_prepare(session: Session) -> bool:
    return session.epoch_phase is _NONE and session.phase is _LIVE and session.unlinked_ms is None
