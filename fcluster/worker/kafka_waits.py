"""Which parts of this worker wait for Kafka, and for how long. Other parts that take long hang.

Responsible for: recording each wait, for heartbeats; keeping the watchdog from mistaking a wait for Kafka for
a hung process; and waking up a call that keeps waiting, or abandoning it if it still waits although Kafka
answers again. Rule: every wait is bounded. Calls have their own limits, and the thread of a call that ignores
its limit is abandoned.

Must not: decide what follows from a lost transaction.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from fcluster.kafka.outcasts import Relief
from fcluster.worker.watchdog import Watchdog

TOLD_AFTER_S = 1.0
"""A wait that is longer than this is reported. Healthy brokers answer within milliseconds."""
USUAL_S_MAX = 5.0
"""On a busy machine they take longer. A call counts as stuck only after twice the longest recent wait (which
decays by a twentieth with each call). A wait above this limit indicates a failover and says nothing about the
machine."""
ASKED_TIMES = 2
"""A call also counts as stuck only after this many times as long as Kafka took to answer the new client."""
ANSWERED_PATIENCE_S = 1.0
"""How long a call may still take once Kafka has answered another client: twice what librdkafka waits before
it repeats a request. It doubles each time that this wasn't enough (`PATIENCE_S_MAX`).
"""
PATIENCE_S_MAX = 15.0
WAKE_AFTER_S = 0.5
"""A call that can be woken up is woken up when it has taken this long, which does no harm if it isn't stuck.
After a clean restart of a broker, its successor is known at once.
"""
WAKE_INTERVAL_S = 1.1
"""A call that was woken up looks for its coordinator at most once a second."""
WOKEN_PATIENCE_S = 15.0
"""How long a call may still take if it can be woken up: it should end by itself, and then nothing is lost."""
_POLL_S = 0.05


@dataclass(slots=True)
class _Wait:
    what: str
    since_s: float
    answers: Callable[[float], bool] | None = None
    wake: Callable[[], bool] | None = None
    give_up: Callable[[], None] = lambda: None
    ended: bool = False
    watched: bool = False
    waking: bool = False
    woken: bool = False
    asked_in_vain: bool = False
    given_up: bool = False


class KafkaWaits:
    """The waits of one worker.

    Args:
        watchdog: doesn't count the time that is spent waiting here.
        relief: is told how long something has waited.

    Attributes:
        in_vain: the job is over, so nobody needs what is waited for. Set by any thread.
    """

    def __init__(self, watchdog: Watchdog, relief: Relief | None = None) -> None:
        self._watchdog = watchdog
        self._relief = relief
        self._lock = threading.Lock()
        self._waits: dict[int, _Wait] = {}
        self._next = 0
        self._usual_s = 0.0
        self._patience_s = ANSWERED_PATIENCE_S
        self.in_vain = False

    @contextlib.contextmanager
    def waiting(self, what: str) -> Generator[None]:
        """The block waits for Kafka, for a bounded time."""
        with self._noted(_Wait(what, time.monotonic())):
            yield

    @contextlib.contextmanager
    def unsticking(
        self,
        what: str,
        answers: Callable[[float], bool],
        wake: Callable[[], bool],
        give_up: Callable[[], None],
    ) -> Generator[None]:
        """The block is a call that may keep waiting for a dead broker.

        Args:
            what: describes the call.
            answers: asks with a new client whether Kafka can do again what the block waits for, in a few
                seconds at most. Its argument is how long the block has waited, in seconds. It is called
                repeatedly, in its own thread, once the block takes longer than `TOLD_AFTER_S`.
            wake: called in another thread once the block takes longer than `WAKE_AFTER_S`, and every
                `WAKE_INTERVAL_S` until it ends. It makes the call look again for the broker, or returns False
                if it can't.
            give_up: called in the first thread if the block hasn't ended soon after an answer.
        """
        with self._noted(_Wait(what, time.monotonic(), answers, wake, give_up)):
            yield

    @contextlib.contextmanager
    def _noted(self, wait: _Wait) -> Generator[None]:
        with self._lock:
            self._next += 1
            token = self._next
            self._waits[token] = wait
        try:
            with self._watchdog.paused():
                yield
        finally:
            wait.ended = True
            with self._lock:
                del self._waits[token]
                if wait.answers is not None and not wait.given_up:
                    self._patience_s = ANSWERED_PATIENCE_S
                took_s = time.monotonic() - wait.since_s
                if took_s <= USUAL_S_MAX and not wait.asked_in_vain and not wait.given_up:
                    self._usual_s = max(took_s, 0.95 * self._usual_s)

    def longest(self) -> tuple[str, float]:
        """What has waited longest, and for how many seconds so far. Nothing if all is well."""
        now_s = time.monotonic()
        with self._lock:
            first = min(self._waits.values(), key=lambda wait: wait.since_s, default=None)
        if first is None or now_s - first.since_s < TOLD_AFTER_S:
            return "", 0.0
        return first.what, now_s - first.since_s

    def check(self) -> None:
        """Look for calls that take long. Called a few times a second by a thread that never waits."""
        now_s = time.monotonic()
        with self._lock:
            stuck_s = max(TOLD_AFTER_S, self._usual_s)
            slow = [
                wait
                for wait in self._waits.values()
                if wait.answers is not None and not wait.watched and now_s - wait.since_s >= stuck_s
            ]
            sleepy = [
                wait
                for wait in self._waits.values()
                if wait.wake is not None and not wait.waking and now_s - wait.since_s >= WAKE_AFTER_S
            ]
            longest_s = max((now_s - wait.since_s for wait in self._waits.values()), default=0.0)
        if self._relief is not None:
            self._relief.waited(longest_s)
        for wait in sleepy:
            wait.waking = True
            threading.Thread(target=self._keep_awake, args=[wait], name="wake", daemon=True).start()
        for wait in slow:
            wait.watched = True
            threading.Thread(target=self._unstick, args=[wait], name="unstick", daemon=True).start()

    def _keep_awake(self, wait: _Wait) -> None:
        assert wait.wake is not None
        next_s = time.monotonic()
        while not wait.ended and not wait.given_up:
            if time.monotonic() >= next_s:
                wait.woken |= wait.wake()
                next_s = time.monotonic() + WAKE_INTERVAL_S
            time.sleep(_POLL_S)

    def _unstick(self, wait: _Wait) -> None:
        assert wait.answers is not None
        while not wait.ended:
            asked_s = time.monotonic()
            if wait.answers(asked_s - wait.since_s):
                answered_s = time.monotonic()
                patience_s = self._patience_s
                if not wait.asked_in_vain:  # otherwise it was a failover, not a busy machine
                    patience_s = max(patience_s, self._usual_s, ASKED_TIMES * (answered_s - asked_s))
                while not wait.ended:
                    # Whether it can be woken up may turn out only now.
                    bound_s = max(patience_s, WOKEN_PATIENCE_S) if wait.woken else patience_s
                    if time.monotonic() >= answered_s + bound_s:
                        wait.given_up = True
                        self._patience_s = min(PATIENCE_S_MAX, 2 * self._patience_s)
                        wait.give_up()
                        return
                    time.sleep(_POLL_S)
                return
            wait.asked_in_vain = True
            time.sleep(_POLL_S)
