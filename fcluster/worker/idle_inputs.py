"""Finds the inputs that have been idle for so long that event time no longer waits for them, and reports
event time.

Responsible for: measuring how long each input has had no new record, by the wall clock. Where the job sets
`idle_ms` of a `Watermark`, an input that is at its end counts as idle after that time, until its next record.
Belongs to the main thread.

Must not: read a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from fcluster.common.ids import ShardId
from fcluster.wire.messages import TIME_MS_MAX, TimeStatus
from fcluster.worker.processing import InputRunner, ShardRunner

LOOK_GAP_MS_MAX = 2_000
"""More time than this between two looks doesn't count: the process was suspended, or its main thread was
busy, and records may be waiting that nobody could read. Looks are much closer together otherwise.
"""


class Ahead(NamedTuple):
    """Why a shard isn't read on; see `drift`.

    Attributes:
        ms: how far it is ahead. 0: the partition that it waits for hasn't begun.
        partition: the partition that it waits for.
    """

    ms: int
    partition: str


class AttendedTime:
    """The time in which somebody looked; see `LOOK_GAP_MS_MAX`."""

    def __init__(self) -> None:
        self._looked_ms: float | None = None
        self._passed_ms = 0.0

    def passed_ms(self, now_ms: float) -> float:
        """Somebody looks at this time of a clock that never goes back. Returns how much has passed so far."""
        if self._looked_ms is not None:
            # One look may take the time before another one that comes first.
            self._passed_ms += min(max(0.0, now_ms - self._looked_ms), LOOK_GAP_MS_MAX)
        self._looked_ms = now_ms
        return self._passed_ms


class IdleInputs:
    """The inputs of all running shards that may become idle."""

    def __init__(self) -> None:
        self._attended = AttendedTime()
        self._quiet_since: dict[InputRunner, tuple[int, float]] = {}
        """The offset since which there was nothing new, and the attended time then."""

    def look(
        self, runners: Iterable[ShardRunner], now_ms: float, held: Collection[ShardId] = ()
    ) -> frozenset[ShardId]:
        """Leave inputs that have become idle out of event time.

        Args:
            runners: the shards' runners.
            now_ms: the time on a clock that never goes back.
            held: the shards that aren't read on for now. Nobody knows whether they have new records.

        Returns:
            The shards of these inputs: there is something to commit.
        """
        passed_ms = self._attended.passed_ms(now_ms)
        changed: set[ShardId] = set()
        quiet_since: dict[InputRunner, tuple[int, float]] = {}
        for runner in runners:
            if runner.clock is None or runner.shard in held:
                continue
            for one in runner.inputs:
                idle_ms = _idle_ms(one)
                if idle_ms is None or runner.clock.source(one.number).idle:
                    continue
                offset, since_ms = self._quiet_since.get(one, (-1, passed_ms))
                if offset != one.next_offset:
                    since_ms = passed_ms
                quiet_since[one] = one.next_offset, since_ms
                is_at_end = 0 <= one.end <= max(one.read_position, one.next_offset)
                if is_at_end and passed_ms - since_ms >= idle_ms:
                    runner.clock.set_idle(one.number, True)
                    changed.add(runner.shard)
        self._quiet_since = quiet_since
        return frozenset(changed)


def times_of(
    runner: ShardRunner, wall_ms: int, ended: bool = False, ahead: Ahead | None = None
) -> list[TimeStatus | None]:
    """What to report of the shard's event time, for each input, at this time of the wall clock. `ended` and
    `ahead`: see `TimeStatus`.
    """
    clock = runner.clock
    if clock is None:
        return [None] * len(runner.inputs)
    return [
        TimeStatus(
            _sendable(clock.now_ms),
            _sendable(one.watermark_ms),
            one.idle,
            -1 if one.slowest is None else one.slowest,
            one.idle_upstream,
            wall_ms,
            -1 if runner.timers is None else runner.timers.count,
            ended,
            *((-1, "") if ahead is None else ahead),
        )
        for one in clock.look()
    ]


def _sendable(time_ms: int | None) -> int | None:
    """A time as a message holds it. The end of event time is beyond that."""
    return None if time_ms is None else min(time_ms, TIME_MS_MAX)


def _idle_ms(one: InputRunner) -> int | None:
    source = one.stage.inputs[one.number]
    return None if source.internal or source.watermark is None else source.watermark.idle_ms
