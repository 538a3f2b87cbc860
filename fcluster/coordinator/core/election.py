"""When a standby may conclude that the leader is gone, and which of several standbys goes first; without any
I/O.

Responsible for: suspicion (`Watch`, in a standby), the order of the standbys (`Roster`, in the leader), and
how a leader that was asked to leave hands over to one of them (`Resignation`). Invariants:

- A suspicion is not a proof, and doesn't have to be: a new leader fences the previous one through the
  journal. But a wrong suspicion is disruptive. So a closed connection isn't enough: either nothing listens at
  the leader's address any more, twice in a row, or the leader has been silent for all of `silent_ms`.
- A standby that was itself suspended (stopped, swapped out) doesn't mistake its own absence for the leader's.
- Standbys suspect the leader one after another, in the order of their ranks.
- A leader that resigns keeps leading until a standby does, for a limited time: an invitation may be lost.

Must not: read a clock, draw random numbers, or know sockets and Kafka. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

REFUSED_MS = 100.0
"""If nothing listened at two moments this far apart, the process is gone, and not just slow to accept."""
PROBE_INTERVAL_MS = 50.0
RANK_STEP_MS = 1_500.0
"""How much longer each rank waits than the previous one. It must be longer than a takeover needs until it
shows in the journal: 0.2 s, or 0.45 s on a busy host. It only costs time if a standby dies together with the
leader.
"""
ABSENCE_NOTICED_MS = 1_000.0
ROSTER_KEPT_MS = 2_000.0
ROSTER_MAX = 100
RESIGN_MS = 5_000.0
"""Several times as long as a takeover takes. After that, no standby is expected to take over."""
RESIGN_STEP_MS = 100.0
"""How often a leader that resigns checks whether it is still the leader."""
STANDBYS_COME_MS = 3_000.0
"""Standbys need a moment to find a new leader. If it is asked to leave in that moment and sees no standby,
that doesn't mean that there is none.
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of a standby's patience.

    Attributes:
        silent_ms: a leader that is silent for this long is suspected.
        check_interval_ms: how often the leader is asked.
        rank: assumed until the leader gives one; need not be an integer.
    """

    silent_ms: float
    check_interval_ms: float
    rank: float = 0.0


class Watch:
    """What a standby knows about the leader that it follows.

    Args:
        bounds: how patient to be.
        now_ms: from a clock that never goes back, like all times here.
    """

    def __init__(self, bounds: Bounds, now_ms: float) -> None:
        self.bounds = bounds
        self.rank = bounds.rank
        self.was_heard = False
        self.resigns = False
        """Whether the leader has asked this standby to take over."""
        self.signs = 0
        """How often the leader has shown that it is alive."""
        self._linked = False
        self._heard_ms = now_ms
        self._refused_ms: float | None = None
        self._last_refused_ms = now_ms
        self._probe_ms = now_ms
        self._check_ms = now_ms
        self._now = now_ms

    def linked(self, now_ms: float) -> None:
        """A connection is open."""
        self._pass_time(now_ms)
        self._linked, self._refused_ms = True, None
        self._check_ms = now_ms
        self.signs += 1

    def unlinked(self, now_ms: float) -> None:
        """The connection is lost."""
        self._pass_time(now_ms)
        self._linked, self._refused_ms = False, None
        self._probe_ms = now_ms

    def heard(self, rank: int, now_ms: float, *, resigns: bool = False) -> None:
        """The leader answered: this standby has rank `rank`, counted from 0, and may have to take over."""
        self._pass_time(now_ms)
        self.was_heard, self.rank, self.resigns = True, float(rank), resigns
        self.signs += 1
        self._heard_ms = now_ms

    def probed(self, refused: bool, now_ms: float) -> None:
        """Whether the leader's host says that nothing listens at its address."""
        self._pass_time(now_ms)
        self._probe_ms = now_ms + PROBE_INTERVAL_MS
        if not refused:
            self._refused_ms = None
        elif not self._linked:
            self._refused_ms = now_ms if self._refused_ms is None else self._refused_ms
            self._last_refused_ms = now_ms

    def wants_probe(self, now_ms: float) -> bool:
        """Whether to check now if anything listens at the address."""
        return not self._linked and now_ms >= self._probe_ms

    def wants_check(self, now_ms: float) -> bool:
        """Whether to ask the leader now if it is alive. If so, the next check is due one interval later."""
        if not self._linked or now_ms < self._check_ms:
            return False
        self._check_ms = now_ms + self.bounds.check_interval_ms
        return True

    def suspicion(self, now_ms: float) -> str:
        """Why the leader seems to be gone, if it is this standby's turn. Otherwise empty."""
        self._pass_time(now_ms)
        if self.resigns:
            return "it hands over"
        patience_ms = self.rank * RANK_STEP_MS
        if now_ms - self._heard_ms >= self.bounds.silent_ms + patience_ms:
            return f"it has been silent for {now_ms - self._heard_ms:.0f} ms"
        since_ms = self._refused_ms
        if since_ms is not None and self._last_refused_ms - since_ms >= REFUSED_MS + patience_ms:
            return "nothing listens at its address any more"
        return ""

    def patience_again(self, now_ms: float) -> None:
        """The suspicion was wrong. Start again."""
        self._heard_ms, self._refused_ms, self.resigns = now_ms, None, False

    def next_ms(self) -> float:
        """When to check again if nothing happens before that."""
        due_ms = self._check_ms if self._linked else self._probe_ms
        return min(due_ms, self._heard_ms + self.bounds.silent_ms + self.rank * RANK_STEP_MS)

    def _pass_time(self, now_ms: float) -> None:
        away_ms = now_ms - self._now
        self._now = now_ms
        if away_ms >= max(ABSENCE_NOTICED_MS, 2 * self.bounds.check_interval_ms):
            self._heard_ms += away_ms


class Roster:
    """The leader's standbys, in the order in which they came.

    Args:
        check_interval_ms: how often they ask.
    """

    def __init__(self, check_interval_ms: float = 0.0) -> None:
        self._kept_ms = max(ROSTER_KEPT_MS, 3 * check_interval_ms)
        self._heard_ms: dict[bytes, float] = {}
        self._names: dict[bytes, str] = {}

    def heard(self, peer: bytes, name: str, now_ms: float) -> int:
        """A standby has asked. Returns its rank, counted from 0."""
        self._forget_lost(now_ms)
        if peer not in self._heard_ms and len(self._heard_ms) >= ROSTER_MAX:
            return ROSTER_MAX
        self._heard_ms[peer] = now_ms
        self._names[peer] = name
        return list(self._heard_ms).index(peer)

    def leaves(self, peer: bytes) -> None:
        """A standby says that it won't take over."""
        if peer in self._heard_ms:
            del self._heard_ms[peer], self._names[peer]

    def first(self, now_ms: float) -> bytes | None:
        """The standby whose turn is next. None if there is none."""
        self._forget_lost(now_ms)
        return next(iter(self._heard_ms), None)

    def knows(self, peer: bytes, now_ms: float) -> bool:
        """Whether that standby has asked recently."""
        self._forget_lost(now_ms)
        return peer in self._heard_ms

    def names(self, now_ms: float) -> list[str]:
        """The standbys that have asked recently, by rank."""
        self._forget_lost(now_ms)
        return [self._names[peer] for peer in self._heard_ms]

    def _forget_lost(self, now_ms: float) -> None:
        for peer in [peer for peer, ms in self._heard_ms.items() if now_ms - ms > self._kept_ms]:
            del self._heard_ms[peer], self._names[peer]


@dataclass(frozen=True, slots=True)
class ResignStep:
    """What a leader that resigns does next.

    Attributes:
        invite: the standby to ask now.
        check: whether to find out now if another coordinator already leads.
        give_up: whether to give up, because no standby takes over.
    """

    invite: bytes | None = None
    check: bool = False
    give_up: bool = False


class Resignation:
    """How a leader hands over: it asks one standby at a time, and checks whether that one takes over.

    Args:
        roster: the leader's roster.
        patient_until_ms: until then, a standby may still appear.
        now_ms: from a clock that never goes back, like all times here.
    """

    def __init__(self, roster: Roster, patient_until_ms: float, now_ms: float) -> None:
        self.invited: bytes | None = None
        """The standby that was asked last. Each answer to it repeats the request."""
        self._roster = roster
        self._patient_until_ms = patient_until_ms
        self._deadline_ms = now_ms + RESIGN_MS
        self._step_ms = now_ms

    def advance(self, now_ms: float) -> ResignStep:
        """What to do now. Call it again at `next_ms`."""
        if now_ms < self._step_ms:
            return ResignStep()
        if now_ms >= self._deadline_ms:
            return ResignStep(give_up=True)
        self._step_ms = now_ms + RESIGN_STEP_MS
        first = self._roster.first(now_ms)
        if first is not None and first != self.invited and not self._is_known(now_ms):
            self.invited = first
            return ResignStep(invite=first, check=True)
        if first is None and self.invited is None and now_ms >= self._patient_until_ms:
            return ResignStep(give_up=True)
        return ResignStep(check=self.invited is not None)

    def left(self, peer: bytes) -> None:
        """A standby says that it won't take over."""
        if peer == self.invited:
            self.invited, self._step_ms = None, float("-inf")

    def next_ms(self) -> float:
        """When to check again."""
        return self._step_ms

    def _is_known(self, now_ms: float) -> bool:
        """Whether the invited standby has asked since the invitation, or recently. Then it is about to take
        over.
        """
        return self.invited is not None and self._roster.knows(self.invited, now_ms)
