"""When the timers of a worker's shards are due, and what the worker has to know about those that fire.

Responsible for: knowing which running shards have timers that are due, how long the main thread may wait for
the next one, and which timer is being called. `record_pump` lets timers fire between two records. Event-time
timers fire in the call of the record that advanced event time, after that record (`fcluster.engine.firing`).
Belongs to the main thread.

Must not: decide what follows from a failure, or know epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from fcluster.common.clocks import wall_ms
from fcluster.common.ids import ShardId
from fcluster.engine.firing import FIRED_AT_ONCE_MAX, TimerRunner
from fcluster.engine.records import TimerRecord
from fcluster.worker.core.model import RecordAt
from fcluster.worker.inbox import Inbox
from fcluster.worker.processing import ShardRunner
from fcluster.worker.record_watch import RecordWatch

ANNOUNCED_TIMERS: Final = 2_000
"""If something in a shard ends processes, this many of its timers are announced before they are called."""
_WAIT_S_MIN: Final = 0.001


class DueTimers:
    """The timers of the shards that are read.

    Args:
        timed: the shards with timers; `RunningShards.timed`.
        inbox: timers stop firing when it has an event.
        record_watch: knows the timer that is being called.
        wall_ms: processing time, in milliseconds since 1970.
    """

    def __init__(
        self,
        timed: Mapping[ShardId, ShardRunner],
        inbox: Inbox,
        record_watch: RecordWatch,
        wall_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._timed = timed
        self._inbox = inbox
        self._watch = record_watch
        self._wall_ms = wall_ms
        self._last: TimerRecord | None = None

    def start(self, runner: ShardRunner, announce: Callable[[TimerRecord], None] | None) -> None:
        """Begin to watch a shard's timers.

        Args:
            announce: called before each timer, for some time. None: nothing is suspect.
        """
        timers = runner.timers
        if timers is None:
            return
        timers.interrupts = self._inbox.interrupts
        timers.left = self._inbox.interrupt
        left = ANNOUNCED_TIMERS if announce is not None else 0

        def begun(timer: TimerRecord) -> None:
            nonlocal left
            self._last = self._watch.record = timer
            if left and announce is not None:
                left -= 1
                announce(timer)

        timers.begun = begun

    def limit(self, records_max: int | None) -> None:
        """With a limit on the records of an epoch, each timer is a piece of its own: none fires in a record's
        call.
        """
        at_once_max = FIRED_AT_ONCE_MAX if records_max is None else 0
        for _runner, timers in self._all():
            timers.at_once_max = at_once_max

    def are_due(self) -> bool:
        """Whether a timer is due."""
        return any(timers.is_due() for _runner, timers in self._all())

    def must_fire(self) -> bool:
        """Whether a timer is due before which no record may be processed."""
        return any(timers.must_fire() for _runner, timers in self._all())

    def due(self, *, must_fire: bool = False) -> list[ShardRunner]:
        """The shards with timers that are due; `must_fire`: with those before which no record may be
        processed.
        """
        return [
            runner for runner, timers in self._all() if (timers.must_fire() if must_fire else timers.is_due())
        ]

    def wait_s(self, timeout_s: float) -> float:
        """The timeout, or less if a timer in processing time is due before that."""
        now_ms = self._wall_ms()
        for _runner, timers in self._all():
            due_ms = timers.next_processing_ms()
            if due_ms is not None:
                timeout_s = min(timeout_s, (due_ms - now_ms) / 1000)
        return max(_WAIT_S_MIN, timeout_s)

    def take_fired(self) -> tuple[frozenset[ShardId], int]:
        """The shards in which timers have fired since the last call, and how many."""
        shards: list[ShardId] = []
        count = 0
        for runner in self._timed.values():
            fired = runner.take_fired()
            if fired:
                shards.append(runner.shard)
                count += fired
        return frozenset(shards), count

    def _all(self) -> Iterator[tuple[ShardRunner, TimerRunner]]:
        for runner in self._timed.values():
            assert runner.timers is not None
            yield runner, runner.timers

    def newest(self, shard: ShardId) -> RecordAt | None:
        """The timer that was called last, if it is the only thing in its epoch."""
        return None if self._last is None else place_of_timer(shard, self._last)


def place_of_timer(shard: ShardId, timer: TimerRecord) -> RecordAt:
    """The position of a timer among the records of its shard."""
    return RecordAt(shard, timer.offset(), 0, timer.title)
