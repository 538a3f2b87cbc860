"""How a worker or an agent finds the leader again.

Responsible for: when to look for the leader, and where to connect (`Search`); which end of the job in the
journal concerns this process (`Ends`); and the thread that follows the journal meanwhile (`LeaderSeeker`).
Rules: a working connection is given up only for a leader of a newer term, or if its peer has an older term;
the journal is read only when needed; a given address isn't forgotten: if the journal's address doesn't work,
both are tried in turn. Must not exchange messages with the leader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaException

from fcluster.common import failpoints
from fcluster.common.clocks import monotonic_ms
from fcluster.common.errors import FclusterError
from fcluster.common.failures import Ended
from fcluster.common.settings import Settings
from fcluster.wire.discovery import Leader, LeaderFollower

JOURNAL_POLL_S = 0.1
RETRY_S = 1.0
FIXED_PATIENCE_MS = 300.0
"""How long to wait for a coordinator to restart at the given address before the journal is read."""
TURN_MS = 2_000.0


class Search:
    """Decides when to look for the leader, and whom to follow; without any I/O.

    Args:
        fixed: whether an address was given. It is followed first.
        silent_ms: a leader that is silent for this long over an open connection may have been deposed.
        now_ms: from a clock that never goes back, like all times here.
    """

    def __init__(self, *, fixed: bool, silent_ms: float, now_ms: float) -> None:
        self.following: Leader | None = None
        """None: the given address, or no leader yet."""
        self._fixed = fixed
        self._silent_ms = silent_ms
        self._linked = False
        self._misled = False
        self._heard_ms = now_ms
        self._since_ms = now_ms
        self._patience_ms = FIXED_PATIENCE_MS if fixed else 0.0

    def linked(self, now_ms: float) -> None:
        """A connection is open."""
        self._linked, self._misled, self._heard_ms = True, False, now_ms

    def unlinked(self, now_ms: float) -> None:
        """The connection is lost."""
        if self._linked:
            self._since_ms = now_ms
            self._patience_ms = FIXED_PATIENCE_MS if self._fixed and self.following is None else 0.0
        self._linked = self._misled = False

    def heard(self, now_ms: float) -> None:
        """The leader sent a message."""
        self._misled, self._heard_ms = False, now_ms

    def misled(self) -> None:
        """The peer of the connection has an older term than another leader that was heard."""
        self._misled = self._linked

    def is_wanted(self, now_ms: float) -> bool:
        """Whether to read the journal."""
        if self._linked:
            return self._misled or now_ms - self._heard_ms >= self._silent_ms
        return now_ms - self._since_ms >= self._patience_ms

    def turns_back(self, now_ms: float) -> bool:
        """Whether to try the given address again. If so, it is followed from now on."""
        overdue = now_ms - self._since_ms >= TURN_MS
        if not self._fixed or self.following is None or self._linked or not overdue:
            return False
        self.following, self._since_ms, self._patience_ms = None, now_ms, TURN_MS
        return True

    def follows(self, newest: Leader, term: int, now_ms: float) -> bool:
        """Whether to connect to `newest`, the journal's leader. If so, it is followed from now on.

        Args:
            newest: its leader record.
            term: the newest term in which the present leader, or one before it, has sent a message.
            now_ms: the time.
        """
        if newest == self.following or not self.is_wanted(now_ms):
            return False
        if self._linked and (newest.term < term or (newest.term == term and not self._misled)):
            return False
        self.following, self._since_ms = newest, now_ms
        self._linked = self._misled = False
        return True


class Ends:
    """Distinguishes the end of this process's run from the end of an earlier run, without any I/O.

    The journal keeps the end of the last run until the next leader starts. A process that was started for the
    next run finds it there, and waits. An end counts if it is newer than what the journal said when it was
    first read, or if its leader, or an earlier one, has sent a message to this process.
    """

    def __init__(self) -> None:
        self._over_before: int | None = None
        """The newest term whose end doesn't concern this process. None: the journal hasn't been read yet."""

    def looked(self, leader: Leader | None, ended_term: int) -> None:
        """The journal was read to its end.

        Args:
            leader: its leader record.
            ended_term: the term in which the job was ended. 0 if it wasn't ended, or if there is a leader.
        """
        if self._over_before is None:
            self._over_before = leader.term - 1 if leader is not None else ended_term

    def concerns_us(self, ended_term: int, heard_term: int) -> bool:
        """Whether the job has ended for this process.

        Args:
            ended_term: see `looked`; not 0.
            heard_term: the newest term in which a leader has sent a message to this process, 0 if none has.
        """
        if 0 < heard_term <= ended_term:
            return True
        return self._over_before is not None and ended_term > self._over_before


class LeaderSeeker:
    """Looks for the leader whenever there is no connection to one, in its own thread.

    Args:
        settings: the cluster's settings.
        job: the job's name.
        fixed: whether an address was given. The caller connects to it first.
        connect: called with the leader to connect to. None: the given address. It may raise FclusterError.
        term: returns the newest known term.
        say: called with problems and news, as texts.
        on_ended: called once, if the journal says that this process's run has ended, with how it ended.
        failpoint: the failpoint to pass before the journal is read for the first time.
    """

    def __init__(
        self,
        settings: Settings,
        job: str,
        *,
        fixed: bool,
        connect: Callable[[Leader | None], None],
        term: Callable[[], int],
        say: Callable[[str], None],
        on_ended: Callable[[Ended], None],
        failpoint: str,
    ) -> None:
        # A leader answers each heartbeat.
        silent_ms = 3.0 * settings.heartbeat_interval_ms
        self._search = Search(fixed=fixed, silent_ms=silent_ms, now_ms=monotonic_ms())
        self._interval_s = settings.heartbeat_interval_ms / 1000
        self._job = job
        self._follower = LeaderFollower(settings, job)
        self._connect = connect
        self._term = term
        self._say = say
        self._on_ended = on_ended
        self._failpoint = failpoint
        self._ends = Ends()
        self._end_told = False
        self._news = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="seeker", daemon=True)

    def start(self) -> None:
        """Start."""
        self._thread.start()

    def linked(self) -> None:
        """A connection is open."""
        self._search.linked(monotonic_ms())

    def unlinked(self) -> None:
        """The connection is lost."""
        self._search.unlinked(monotonic_ms())
        self._news.set()

    def heard(self) -> None:
        """The leader sent a message."""
        self._search.heard(monotonic_ms())

    def misled(self) -> None:
        """The peer has an older term than another leader that was heard."""
        self._search.misled()
        self._news.set()

    def close(self, timeout_s: float) -> None:
        """Stop, within `timeout_s` seconds."""
        self._stopping = True
        self._news.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        failpoints.reach(self._failpoint)
        while not self._stopping:
            if self._search.turns_back(monotonic_ms()):
                self._connect(None)
            if self._search.is_wanted(monotonic_ms()):
                self._look()
            else:
                self._follower.close()
                self._news.wait(min(self._interval_s, FIXED_PATIENCE_MS / 1000))
                self._news.clear()
        self._follower.close()

    def _look(self) -> None:
        try:
            known = self._follower.poll(JOURNAL_POLL_S)
        except (FclusterError, KafkaException) as error:
            self._say(f"looking for the coordinator: {error}")
            self._pause()
            return
        leader = self._follower.leader
        if known:
            self._take_end(leader)
        if known and leader is None:
            self._say(f"no coordinator of job {self._job} yet; waiting for one")
            if not self._follower.is_open:
                self._pause()
        elif known and leader is not None and leader.term < self._term():
            self._say(
                f"the journal names a coordinator of term {leader.term}, but this worker has met one of "
                f"term {self._term()}; if the journal topic was deleted, restart this worker"
            )
            self._pause()
        elif known and leader is not None and self._search.follows(leader, self._term(), monotonic_ms()):
            try:
                self._connect(leader)
            except FclusterError as error:
                # The journal may still name a leader that ran with other keys. The next leader's key may fit.
                self._say(f"looking for the coordinator: {error}")

    def _take_end(self, leader: Leader | None) -> None:
        """The journal was read to its end: has the job ended?"""
        term, ended = self._follower.ended or (0, Ended(0))
        if leader is not None:
            term = 0  # it belongs to the former run
        self._ends.looked(leader, term)
        if term and not self._end_told and self._ends.concerns_us(term, self._term()):
            self._end_told = True
            self._on_ended(ended)

    def _pause(self) -> None:
        """There is nothing to follow. Look again later, whatever happens in the meantime."""
        deadline_s = time.monotonic() + RETRY_S
        while not self._stopping and time.monotonic() < deadline_s:
            self._news.wait(deadline_s - time.monotonic())
            self._news.clear()
