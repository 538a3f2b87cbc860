"""Finds the shards that are so far ahead in event time that they aren't read on until others have come after,
and the partitions for which others wait.

Responsible for: `max_drift` of a `Watermark`. Of each group of stages (`graph.drift`), the slowest partition
is looked for among those that this worker reads; the coordinator says which one is the slowest elsewhere. A
shard whose event time is more than `max_drift` later is held. It only changes when records are read, never
what becomes of them. Belongs to the main thread.

Invariants, because a wait must always end:
- The slowest partition is never held. So the one for whom others wait is read.
- Others wait for a partition only while it may come nearer. They no longer do when it is idle, when it is
  read to its end and gets no more, or when its event time hasn't moved for `PATIENCE_MS`, whatever the reason
  is: records without timestamps, records that fail, or a handler that hangs. They do again once it moves.
- What is said of other workers counts only while it is said again and again.

Must not: read a clock, or pause a reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fcluster.common.ids import ShardId
from fcluster.engine.clock import END_MS
from fcluster.graph.drift import KeepsStep, how_far
from fcluster.wire.messages import SlowestInput
from fcluster.worker.idle_inputs import Ahead, AttendedTime
from fcluster.worker.processing import InputRunner, ShardRunner

PATIENCE_MS: Final = 30_000
"""Others wait so long for a partition whose event time doesn't move although it isn't read to its end."""
PATIENCE_AT_END_MS: Final = 5_000
"""And so long for one that is at its end, if its `Watermark` has no `idle`."""


@dataclass(slots=True)
class _Moves:
    """When an input's event time has last moved."""

    time_ms: int | None
    since_ms: float


@dataclass(slots=True)
class Turn:
    """What has to change after a look.

    Attributes:
        hold: the shards that aren't read on. release: those that are read again.
    """

    hold: list[ShardRunner] = field(default_factory=list[ShardRunner])
    release: list[ShardRunner] = field(default_factory=list[ShardRunner])


class Drift:
    """See the module's docstring.

    Args:
        stages: how the stages keep step; see `graph.drift.keep_step`.

    Attributes:
        held: the held shards.
        slowest: the slowest partition that this worker reads, for each group that has one.
    """

    def __init__(self, stages: Mapping[str, KeepsStep]) -> None:
        self._stages = stages
        self._attended = AttendedTime()
        self._passed_ms = 0.0
        self._moves: dict[InputRunner, _Moves] = {}
        self._runners: dict[ShardId, ShardRunner] = {}
        self._said: Sequence[SlowestInput] = ()
        self._said_ms = 0.0
        self.held: dict[ShardId, Ahead] = {}
        self.slowest: list[SlowestInput] = []

    def look(self, runners: Iterable[ShardRunner], elsewhere: Sequence[SlowestInput], now_ms: float) -> Turn:
        """Find out who waits for whom now. Don't call it within a record.

        Args:
            runners: the runners of the shards that are read.
            elsewhere: the slowest partitions of other workers. Another object than at the last look: it was
                said again.
            now_ms: the time on a clock that never goes back.
        """
        self._passed_ms = self._attended.passed_ms(now_ms)
        runners = [runner for runner in runners if runner.stage.name in self._stages]
        self._forget_others(runners)
        waited_for = {runner.shard: self._waited_for(runner) for runner in runners}
        self.slowest = self._slowest_of(one for found in waited_for.values() for one in found)
        slowest = {one.group: one for one in self._slowest_of([*self.slowest, *self._fresh(elsewhere)])}
        turn = Turn()
        for runner in runners:
            step = self._stages[runner.stage.name]
            if step.max_drift_ms is None:
                continue
            time_ms = self._time_of(runner, waited_for[runner.shard])
            ahead = self._ahead(runner.shard, time_ms, slowest.get(step.group), step.max_drift_ms)
            was_held = runner.shard in self.held
            if ahead is not None:
                self.held[runner.shard] = ahead
                if not was_held:
                    turn.hold.append(runner)
            elif was_held:
                del self.held[runner.shard]
                turn.release.append(runner)
        return turn

    def _forget_others(self, runners: Sequence[ShardRunner]) -> None:
        """Forget what belongs to runners that aren't there any more. New ones are read."""
        present = {runner.shard: runner for runner in runners}
        for shard, runner in self._runners.items():
            if present.get(shard) is not runner:
                self.held.pop(shard, None)
                for one in runner.inputs:
                    self._moves.pop(one, None)
        self._runners = present

    def _waited_for(self, runner: ShardRunner) -> list[SlowestInput]:
        """The inputs of the shard for which others wait, with their event times."""
        clock, step = runner.clock, self._stages[runner.stage.name]
        if clock is None or clock.ended:
            return []
        found: list[SlowestInput] = []
        for number in step.inputs:
            one, time_ms = runner.inputs[number], clock.source(number).watermark()
            moves = self._moves.get(one)
            if moves is None or moves.time_ms != time_ms:
                moves = self._moves[one] = _Moves(time_ms, self._passed_ms)
            if runner.shard in self.held:
                moves.since_ms = self._passed_ms  # it can't move
            if clock.source(number).idle or time_ms == END_MS or one.is_read:
                continue
            if self._passed_ms - moves.since_ms < _patience_ms(one, time_ms):
                found.append(SlowestInput(step.group, time_ms, f"{one.topic}/{one.partition}"))
        return found

    def _fresh(self, elsewhere: Sequence[SlowestInput]) -> Sequence[SlowestInput]:
        if elsewhere is not self._said:
            self._said, self._said_ms = elsewhere, self._passed_ms
        return elsewhere if self._passed_ms - self._said_ms < PATIENCE_MS else ()

    def _slowest_of(self, inputs: Iterable[SlowestInput]) -> list[SlowestInput]:
        slowest: dict[str, SlowestInput] = {}
        for one in inputs:
            known = slowest.get(one.group)
            if known is None or how_far(one.time_ms) < how_far(known.time_ms):
                slowest[one.group] = one
        return list(slowest.values())

    def _time_of(self, runner: ShardRunner, waited_for: Sequence[SlowestInput]) -> int | None:
        """How far the shard is: as far as the slowest of its own inputs, because it takes the records of
        several inputs in the order of their times. None: unknown, or there is nothing to wait with.
        """
        clock = runner.clock
        if clock is None or clock.ended:
            return None
        if waited_for:
            times_ms = [one.time_ms for one in waited_for]
        else:
            inputs = [runner.inputs[number] for number in self._stages[runner.stage.name].inputs]
            sources = [clock.source(one.number) for one in inputs if not one.is_read]
            times_ms = [source.watermark() for source in sources if not source.idle]
        known_ms = [at for at in times_ms if at is not None]
        return min(known_ms, default=None) if len(known_ms) == len(times_ms) else None

    def _ahead(
        self, shard: ShardId, time_ms: int | None, slowest: SlowestInput | None, max_drift_ms: int
    ) -> Ahead | None:
        """Whether the shard has to wait. Once it is held, it does so until it is half as far ahead: each
        pause discards what the client has fetched.
        """
        if slowest is None or time_ms is None:
            return None
        if slowest.time_ms is None:
            return Ahead(0, slowest.partition)
        ahead_ms = time_ms - slowest.time_ms
        bound_ms = max_drift_ms // 2 if shard in self.held else max_drift_ms
        return Ahead(ahead_ms, slowest.partition) if ahead_ms > bound_ms else None


def _patience_ms(one: InputRunner, time_ms: int | None) -> int:
    if not 0 <= one.end <= max(one.read_position, one.next_offset):
        return PATIENCE_MS
    if time_ms is None:
        return 0  # it is empty
    watermark = one.stage.inputs[one.number].watermark
    idle_ms = None if watermark is None else watermark.idle_ms
    return PATIENCE_AT_END_MS if idle_ms is None else idle_ms
